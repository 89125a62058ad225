import io
import itertools
import json

import numpy as np
import pytest
import sentencepiece

from gptjax.data import cache
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.sources import Records
from gptjax.errors import UserError
from gptjax.finetuning.chat_encoding import ChatEncoder, decode_flags, encode_pieces
from gptjax.finetuning.chat_templates import set_template
from gptjax.finetuning.conversations import Conversation, Conversations
from gptjax.finetuning.record_packing import PackedConversations
from gptjax.show import text_of
from gptjax.templates.chat import ChatTemplate
from tests.templates.test_chat import (
  ANSWER,
  CHATML,
  INSTRUCTIONS,
  MARKED,
  SYSTEM,
  THINKING,
  THOUGHTS,
  USER,
)

LATER = {"role": "assistant", "content": "\n Still him. 他。"}
CHAT = (SYSTEM, USER, ANSWER, USER, LATER)
FIRST = "Herman Melville."
# The published template of Llama 3, without tools.
LLAMA3 = """{{ bos_token }}{% for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# A tool's answer and the assistant's around it are three messages.
TOOL_CHAT = (USER, {"role": "assistant", "content": "<call>"}, {"role": "tool", "content": "5"},
             {"role": "assistant", "content": "It is 5."})  # fmt: skip


def encode(tokenizer, messages, train_on="assistant"):
  conversation = Conversation(tuple(messages), (), "a.jsonl:3")
  ((stored,),) = ChatEncoder(tokenizer, train_on).encode_batch([conversation.to_json()])
  assert stored.dtype == np.uint32
  return decode_flags(stored)


def runs(tokenizer, messages, **options):
  """The text of each run of tokens that are, or are not, to be learnt."""
  tokens, learnt = encode(tokenizer, messages, **options)
  pairs = zip(tokens.tolist(), learnt.tolist(), strict=True)
  return [
    (text_of(tokenizer, [token for token, _ in run]), is_learnt)
    for is_learnt, run in itertools.groupby(pairs, key=lambda pair: pair[1])
  ]


@pytest.mark.parametrize(
  ("template", "messages", "answers"),
  [
    # The line end after an end of turn is the template's, and never asked of the model.
    (CHATML, CHAT, [f"{FIRST}<|im_end|>", "\n Still him. 他。<|im_end|>"]),
    (CHATML, TOOL_CHAT, ["<call><|im_end|>", "It is 5.<|im_end|>"]),
    (LLAMA3, CHAT, [f"{FIRST}<|eot_id|>", "Still him. 他。<|eot_id|>"]),
    (INSTRUCTIONS, CHAT, [f" {FIRST}</s>", " \n Still him. 他。</s>"]),
    (MARKED, CHAT, [f"{FIRST}</s>", "\n Still him. 他。</s>"]),
    ("alpaca", CHAT, [f"{FIRST}</s>", "\n Still him. 他。</s>"]),
    ("chatml", CHAT[:3], [f"{FIRST}<|im_end|>"]),
  ],
  ids=["chatml", "tools", "llama3", "instructions", "marked", "named alpaca", "named chatml"],
)
def test_what_the_assistant_writes_is_learnt_and_nothing_else(
  write_tokenizer, tmp_path, template, messages, answers
):
  named = template in ("alpaca", "chatml")
  tokenizer = write_tokenizer(tmp_path, None if named else template)
  tokenizer = set_template(tokenizer, template if named else "")
  found = runs(tokenizer, messages)
  assert [text for text, learnt in found if learnt] == answers
  whole = ChatTemplate(tokenizer).render(messages, add_generation_prompt=False)
  assert "".join(text for text, _ in found) == whole
  # Up to an answer the tokens are those that a model is asked with.
  tokens, learnt = encode(tokenizer, messages)
  before = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
  prompt = ChatTemplate(tokenizer).encode(messages[:before])
  assert tokens[: np.argmax(learnt)].tolist() == prompt


def test_chatml_token_by_token(write_tokenizer, tmp_path):
  tokenizer = write_tokenizer(tmp_path, CHATML)
  tokens, learnt = encode(tokenizer, [{"role": "user", "content": "U"}, ANSWER])
  start, end = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
  parts = [
    ([start, *tokenizer.encode("system\nYou help."), end, *tokenizer.encode("\n")], False),
    ([start, *tokenizer.encode("user\nU"), end, *tokenizer.encode("\n")], False),
    ([start, *tokenizer.encode("assistant\n")], False),
    ([*tokenizer.encode(FIRST), end], True),
    (tokenizer.encode("\n"), False),
  ]
  assert tokens.tolist() == [token for ids, _ in parts for token in ids]
  assert learnt.tolist() == [is_learnt for ids, is_learnt in parts for _ in ids]


def test_all_of_a_conversation_can_be_learnt_and_the_cache_tells_the_two_apart(
  write_tokenizer, tmp_path
):
  tokenizer = write_tokenizer(tmp_path, CHATML)
  tokens, learnt = encode(tokenizer, CHAT, train_on="all")
  assert learnt.all()
  assert tokens.tolist() == ChatTemplate(tokenizer).encode(CHAT, add_generation_prompt=False)
  one, other = (ChatEncoder(tokenizer, train_on).fingerprint() for train_on in ("assistant", "all"))
  assert len({one, other, tokenizer.fingerprint()}) == 3


def test_a_conversation_has_the_same_tokens_every_day(write_tokenizer, tmp_path):
  template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
  tokenizer = write_tokenizer(tmp_path, template)
  assert runs(tokenizer, [USER, ANSWER])[0][0].startswith("26 Jul 2024")


@pytest.mark.parametrize(
  ("template", "problem"),
  [
    (INSTRUCTIONS, "refuses these messages: users and assistants take turns"),
    ("{{ messages | length }}", "does not write message 2 behind what asks for it"),
  ],
)
def test_what_a_template_refuses_is_named_by_its_line(write_tokenizer, tmp_path, template, problem):
  tokenizer = write_tokenizer(tmp_path, template)
  with pytest.raises(UserError, match=rf"^a\.jsonl:3: the chat template of .* {problem}"):
    encode(tokenizer, [USER, ANSWER, ANSWER])


def test_several_examples_of_a_conversation_are_documents_of_the_cache(write_tokenizer, tmp_path):
  encoder = ChatEncoder(write_tokenizer(tmp_path, THINKING), "assistant")
  source = Conversations(Records([{"messages": THOUGHTS}, {"messages": THOUGHTS[:2]}], "", "", ""))
  found = cache.open_or_build(source, encoder, str(tmp_path / "cache"))
  assert found.num_documents == 3
  rows = [*PackedConversations(found, 512, "drop")]
  learnt = np.concatenate([row.targets[row.weights > 0] for row in rows]).tolist()
  answers = text_of(encoder.tokenizer, learnt).split("<|im_end|>")
  assert sorted(answers) == sorted(
    ["", "<think>Hm.</think>Ask."] + [m["content"] for m in THOUGHTS if m["role"] == "assistant"]
  )
  assert sum(row.segment_ids.max() for row in rows) == 3


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
  """A tokenizer as Llama 2's, which puts a space before a text."""
  folder, stream = tmp_path_factory.mktemp("spaced"), io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["Herman Melville wrote it, answer in one sentence."] * 20),
    model_writer=stream,
    vocab_size=300,
    model_type="bpe",
    byte_fallback=True,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    minloglevel=2,
  )
  (folder / "tokenizer.model").write_bytes(stream.getvalue())
  config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": INSTRUCTIONS}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = tokenizer_lib.load(str(folder))
  assert tokenizer.adds_space
  return tokenizer


def test_no_space_is_added_where_a_piece_begins(spaced):
  tokens, learnt = encode(spaced, CHAT)
  whole = ChatTemplate(spaced).encode(CHAT, add_generation_prompt=False)
  assert tokens.tolist() == whole
  answers = [text for text, is_learnt in runs(spaced, CHAT) if is_learnt]
  assert answers == [f" {FIRST}</s>", " \n Still him. 他。</s>"]
  assert tokens[: np.argmax(learnt)].tolist() == ChatTemplate(spaced).encode(CHAT[:2])


def test_a_token_across_two_pieces_is_of_the_second(spaced):
  text = "Herman Melville"
  whole, inside = spaced.encode_with_specials(text), []
  for cut in range(1, len(text)):
    first, second = encode_pieces(spaced, [text[:cut], text[cut:]])
    assert [*first, *second] == whole
    assert text[:cut].startswith(spaced.decode(first))
    inside.append(spaced.decode(first) != text[:cut])
  assert any(inside)
