import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, processors

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.objectives.task import make_task

END = 256  # Of the tokenizer 'bytes', which starts with it too.


def pair(first, second):
  return {"text": first, "other": second, "label": "a"}


def placed(example):
  """The (place, label) of each target; all of them count 1."""
  assert all(target.weight == 1 for target in example.targets)
  return tuple((target.place, target.label) for target in example.targets)


def bert(path):
  return tokenizers.BertWordPieceTokenizer(str(path))


def test_a_text_is_what_its_tokenizer_makes_of_it(encode, wordpiece):
  record = {"text": "The cat sat", "label": "a"}
  examples, _ = encode([record], wordpiece, labels=("a",), visibility="bidirectional")
  (example,) = examples.examples
  assert example.tokens.tolist() == bert(wordpiece).encode("the cat sat").ids
  assert example.tokens.dtype == np.int32
  assert placed(example) == ((0, 0),)


@pytest.mark.parametrize("sequence_length", [5, 6, 7, 8, 12, 40])
def test_pairs_are_cut_as_the_library_cuts_them(encode, wordpiece, sequence_length):
  pairs = [("cat " * a, "mat " * b) for a in range(1, 12) for b in range(1, 12)]
  reference = bert(wordpiece)
  reference.enable_truncation(sequence_length, strategy="longest_first")
  expected = [reference.encode(*texts) for texts in pairs]
  keys = {"pair_key": "other", "labels": ("a",), "visibility": "bidirectional"}
  examples, _ = encode(
    [pair(*texts) for texts in pairs], wordpiece, sequence_length=sequence_length, **keys
  )
  for example, one in zip(examples.examples, expected, strict=True):
    assert example.tokens.tolist() == one.ids
    start, stop = example.second
    assert [int(start <= place < stop) for place in range(len(one.ids))] == one.type_ids
  assert examples.truncated == sum(bool(one.overflowing) for one in expected)
  assert examples.dropped == 0


def test_robertas_family_has_two_separators_between_texts(encode, write_tokenizer, tmp_path):
  folder = tmp_path / "roberta"
  folder.mkdir()
  made = write_tokenizer(folder, "")
  reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  start, end = ((text, made.specials[text]) for text in ("<s>", "</s>"))
  reference.post_processor = processors.RobertaProcessing(end, start)
  reference.save(str(folder / "tokenizer.json"))
  roles = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(roles))
  keys = {"pair_key": "other", "labels": ("a",), "visibility": "bidirectional"}
  examples, _ = encode([pair("a little", "text")], folder, **keys)
  assert examples.examples[0].tokens.tolist() == reference.encode("a little", "text").ids


@pytest.mark.parametrize(
  ("visibility", "tokens", "place"),
  [
    ("causal", [*b"hi", END, *b"yo", END], 5),
    ("bidirectional", [END, *b"hi", END, *b"yo", END], 0),
  ],
)
def test_the_label_is_where_the_model_has_read_all(encode, visibility, tokens, place):
  keys = {"pair_key": "other", "labels": ("b", "a"), "visibility": visibility}
  (example,) = encode([pair("hi", "yo")], **keys)[0].examples
  assert example.tokens.tolist() == tokens
  assert placed(example) == ((place, 1),)
  assert tokens[slice(*example.second)] == [*b"yo", END]


def test_what_is_longer_than_a_row_may_be_left_out(encode):
  records = [{"text": text, "label": "a"} for text in ("short", "a long one", "fits")]
  examples, tokenizer = encode(records, labels=("a",), sequence_length=6, overlong="drop")
  texts = [tokenizer.decode(example.tokens.tolist()) for example in examples.examples]
  assert texts == ["short", "fits"]
  assert (examples.truncated, examples.dropped, examples.num_tokens) == (0, 1, 11)
  examples, _ = encode(records, labels=("a",), sequence_length=6)
  assert examples.examples[1].tokens.tolist() == [*b"a lon", END]
  assert (examples.truncated, examples.dropped) == (1, 0)


@pytest.mark.parametrize(
  ("visibility", "tokens", "places"),
  [("causal", [*b"Ann saw X", END], (2, 6, 8)), ("bidirectional", [END, *b"Ann saw X", END], None)],
)
def test_a_tag_is_at_the_token_of_its_word(encode, visibility, tokens, places):
  record = {"text": ["Ann", "saw", "X"], "label": ["P", "O", "P"]}
  keys = {"task": "tagging", "label_key": "label", "labels": ("O", "P"), "visibility": visibility}
  (example,) = encode([record], **keys)[0].examples
  assert example.tokens.tolist() == tokens
  # The first token of a word after another is the space before it.
  places = places or (1, 4, 8)
  assert placed(example) == tuple(zip(places, (1, 0, 1), strict=True))


def test_words_of_chinese_characters_have_nothing_between_them(encode, wordpiece):
  record = {"text": ["我", "爱", "\u200b", "cats"], "label": ["O", "P", "O", "P"]}
  keys = {"task": "tagging", "label_key": "label", "labels": ("O", "P"), "word_separator": ""}
  examples, _ = encode([record], wordpiece, visibility="bidirectional", **keys)
  (example,) = examples.examples
  assert example.tokens.tolist() == bert(wordpiece).encode("我爱cats").ids
  # The third has no token at all; a tag is at the first token of 'cat', '##s'.
  assert placed(example) == ((1, 0), (2, 1), (3, 1))
  assert examples.empty_words == 1


def test_tags_of_what_is_cut_are_lost(encode):
  record = {"text": ["Ann", "saw", "X"], "label": ["P", "O", "P"]}
  keys = {"task": "tagging", "label_key": "label", "labels": ("O", "P")}
  examples, _ = encode([record, record], sequence_length=8, **keys)
  assert examples.examples[0].tokens.tolist() == [*b"Ann saw", END]
  assert placed(examples.examples[0]) == ((2, 1), (6, 0))
  assert examples.truncated == 2


CONTEXT = "It was Ann Lee, of course, who sat on the mat."


def question(answer, context=CONTEXT):
  answers = {"text": [answer], "answer_start": [context.index(answer)]}
  return {"text": "Who was it?", "context": context, "label": answers}


SPAN = {"task": "span", "pair_key": "context", "label_key": "label"}


def answer_of(example, tokenizer):
  (start, _, _), (last, _, _) = example.values
  return tokenizer.decode(example.tokens[start : last + 1].tolist())


@pytest.mark.parametrize("visibility", ["causal", "bidirectional"])
@pytest.mark.parametrize("answer", ["Ann Lee", "It", "on the mat.", "u"])
def test_an_answer_is_whole_tokens_of_the_context(encode, visibility, answer):
  (example,) = (examples := encode([question(answer)], visibility=visibility, **SPAN))[0].examples
  assert answer_of(example, examples[1]) == answer
  assert [column for _, column, _ in example.values] == [0, 1]
  context = example.tokens[slice(*example.second)].tolist()
  assert context == [*CONTEXT.encode(), examples[1].end_of_text]
  assert placed(example) == ((len(example.tokens) - 1 if visibility == "causal" else 0, 0),)


def test_a_cut_context_has_the_tokens_of_a_whole_one(encode, wordpiece, tmp_path):
  text = "the cats sat on ann lee."
  examples, tokenizer = encode([question("ann lee", text)], wordpiece, **SPAN)
  (example,) = examples.examples
  assert answer_of(example, tokenizer) == " ann lee"
  assert example.tokens[slice(*example.second)].tolist()[:-1] == tokenizer.encode(text)
  trained = tokenizer_lib.train("bpe:400", [text] * 9)
  assert len(trained.encode(" ann")) == 1
  trained.save(tmp_path / "bpe")
  examples, _ = encode([question("ann lee", text)], tmp_path / "bpe", **SPAN)
  (example,) = examples.examples
  assert answer_of(example, trained) == " ann lee"
  assert example.tokens[slice(*example.second)].tolist()[:-1] == trained.encode(text)


def test_an_answer_beyond_the_row_leaves_its_example_out(encode):
  records = [question("Ann Lee"), question("mat")]
  examples, tokenizer = encode(records, sequence_length=40, **SPAN)
  (example,) = examples.examples
  assert answer_of(example, tokenizer) == "Ann Lee"
  assert len(example.tokens) == 40
  assert (examples.truncated, examples.dropped) == (1, 1)


@pytest.fixture
def spacing_tokenizer(tmp_path):
  """The path of a tokenizer that puts a space before each text."""
  pieces = ["</s>", "<unk>", "▁", "a", "b", "▁a", "▁b", "."]
  made = tokenizers.Tokenizer(models.Unigram([(piece, -(len(piece) ** -1)) for piece in pieces], 1))
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # As Llama's.
  )
  made.add_special_tokens(["</s>", "<unk>"])
  made.save(str(tmp_path / "tokenizer.json"))
  return tmp_path / "tokenizer.json"


def test_a_tokenizer_that_adds_a_space_gets_no_second_one(encode, spacing_tokenizer):
  tagged = {"text": ["a", "b"], "label": ["O", "O"]}
  examples, tokenizer = encode(
    [tagged], spacing_tokenizer, task="tagging", label_key="label", labels=("O",)
  )
  assert tokenizer.adds_space
  assert examples.examples[0].tokens.tolist() == [*tokenizer.encode("a b"), tokenizer.end_of_text]
  examples, _ = encode([question("b", "a b a")], spacing_tokenizer, **SPAN)
  (example,) = examples.examples
  assert example.tokens[slice(*example.second)].tolist()[:-1] == tokenizer.encode("a b a")
  assert answer_of(example, tokenizer) == "b"


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"sequence_length": 1}, "sequence_length=1 has no room for a text beside 1 special tokens"),
    (
      {"sequence_length": 3, "overlong": "drop"},
      r"none of 2 records from .*records\.jsonl:1 on fits a row of 3 tokens",
    ),
  ],
)
def test_a_row_too_short_for_any_text_is_an_error(encode, changes, problem):
  with pytest.raises(UserError, match=problem):
    encode([{"text": "long", "label": "a"}] * 2, labels=("a",), **changes)


@pytest.mark.parametrize(
  ("text_key", "problem"),
  [
    ("", r"data\.text_key is empty; task='classification' needs the key of its texts"),
    ("label", r"data\.text_key and task\.label_key are both 'label'; give each its own key"),
  ],
)
def test_a_text_and_its_label_have_keys_of_their_own(text_key, problem):
  task = make_task({"name": "classification", "label_key": "label"})
  with pytest.raises(UserError, match=problem):
    task.record_keys(text_key)
