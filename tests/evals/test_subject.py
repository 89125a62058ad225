import dataclasses

import pytest
from absl import logging

from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.evals.subject import Subject

CHATML = (
  "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHOTS = [("2+2?", " 4"), ("3+3?", " 6")]


@pytest.fixture(scope="module")
def chat(subject):
  bytes_ = tokenizers.load("bytes")
  settings = dataclasses.replace(bytes_._settings, chat_template=CHATML)
  tokenizer = dataclasses.replace(bytes_, _settings=settings)
  return dataclasses.replace(subject, tokenizer=tokenizer, chat=True)


def test_a_prompt_is_text_with_its_examples(subject):
  shown = subject.prompt("Add.", SHOTS, "4+4?", "\n--\n")
  assert shown == "Add.\n--\n2+2? 4\n--\n3+3? 6\n--\n4+4?"
  assert subject.prompt("", [], "4+4?", "\n") == "4+4?"


def test_in_a_chat_examples_are_turns(chat):
  shown = chat.tokenizer.decode(chat.prompt("Add.", SHOTS[:1], "4+4?", "\n"))
  assert shown == "<system>Add.</><user>2+2?</><assistant>4</><user>4+4?</><assistant>"


def test_in_a_chat_an_answer_begins_without_a_space(chat):
  prompt = chat.prompt("", [], "4+4?", "")
  assert chat.likelihoods([(prompt, " 8")]) == chat.likelihoods([(prompt, "8")])


def test_in_a_chat_the_end_of_text_is_not_scored(chat):
  with pytest.raises(UserError, match="end_of_text=true: in a chat the template ends an answer"):
    chat.likelihoods([(chat.prompt("", [], "4+4?", ""), " 8")], end_of_text=True)


def test_a_model_without_a_template_is_no_chat_model(subject):
  with pytest.raises(UserError, match="no chat template"):
    dataclasses.replace(subject, chat=True)
  with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
    Subject(None, None, batch_size=0)


def test_answers_come_in_the_order_of_their_prompts(subject):
  prompts = ["a", "a longer prompt", "b", "of middle size", "c"]  # more than a batch
  together = subject.write(prompts, max_tokens=4)
  assert together == [subject.write([prompt], max_tokens=4)[0] for prompt in prompts]
  assert len(set(together)) > 1


def test_the_start_of_a_long_prompt_is_left_out_and_this_is_told(subject, monkeypatch):
  told = []
  monkeypatch.setattr(logging, "warning", lambda text, *values: told.append(text % values))
  tail = "x" * 100
  assert subject.write(["one" + tail], max_tokens=4) == subject.write(["two" + tail], max_tokens=4)
  assert told == ["1 of 1 prompts are longer than 60 tokens; their start is left out."] * 2
  with pytest.raises(UserError, match="max_tokens=64 leaves no room"):
    subject.write(["x"], max_tokens=64)
