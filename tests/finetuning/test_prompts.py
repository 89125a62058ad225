import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptjax.data import tokenizer as tokenizers
from gptjax.data.sources import Records
from gptjax.errors import UserError
from gptjax.evals import answers
from gptjax.evals.score import Score, encode_pair
from gptjax.evals.subject import Subject
from gptjax.evals.task import load_task
from gptjax.finetuning import prompts
from gptjax.finetuning.chat_encoding import decode_flags
from gptjax.finetuning.prompts import PromptEncoder, Prompts
from gptjax.show import describe_row
from gptjax.templates.prompts import PROMPTS, Example, Template, open_template
from tests.data.conftest import open_dataset
from tests.finetuning.test_chat_encoding import spaced  # noqa: F401

ANSWER = Template("task.answer", " {{ label }}")


def records(*found):
  return Records(found, "", "mine", "1")


def test_our_templates_end_where_the_answer_begins():
  names = ["text", "context", "question", "en", "prompt", "code", "premise", "hypothesis"]
  names += ["titles"]
  for path in PROMPTS.glob("*.jinja"):
    template = open_template(path.name, path.parent, "x")
    text = template.render(Example(dict.fromkeys(names, "x"), "x:1"))
    assert text == text.rstrip()
    assert "x" in text


@pytest.mark.parametrize(
  ("source", "problem"),
  [
    ("{{ text }}", r"cannot be rendered for a\.jsonl:7: 'text' is undefined \(found: 'review'"),
    ("a\n{% if %}", "line 2: "),
    ("{{ review.__class__.__mro__ }}", r"a\.jsonl:7: .* unsafe"),
    ("{{ empty }}", r"a\.jsonl:7: what it writes is null"),
    ("{{ 1 / number }}", r"a\.jsonl:7: division by zero"),
    ("{{ '{a}'.format() }}", r"a\.jsonl:7: 'a'"),
    ("{{ range(10 ** 9) }}", r"a\.jsonl:7: Range too big"),
  ],
)
def test_a_template_that_fails_names_its_file_the_record_and_the_variable(source, problem):
  example = Example({"review": "x", "empty": None, "number": 0, "self": "y"}, "a.jsonl:7")
  with pytest.raises(UserError, match=rf"^p\.jinja: .*{problem}"):
    Template("p.jinja", source).render(example)
  assert Template("p.jinja", "{% if empty %}a{% endif %}{{ review }}").render(example) == "x"


def test_a_template_is_a_file_of_ones_own_or_one_of_ours(tmp_path):
  mine = tmp_path / "sentiment.jinja"
  mine.write_text("{{ text }}\n=>\n")
  assert open_template(str(mine), tmp_path / "elsewhere", "x").source == "{{ text }}\n=>"
  assert open_template("sentiment.jinja", tmp_path / "elsewhere", "x").source.startswith("Review")
  with pytest.raises(UserError, match=r"^task\.prompt: 'sentimant\.jinja' is .* Did you mean 'sen"):
    open_template("sentimant.jinja", tmp_path, "task.prompt")
  mine.write_bytes(b"\xff")
  with pytest.raises(UserError, match=r"sentiment\.jinja: cannot be read"):
    open_template("sentiment.jinja", tmp_path, "x")


@pytest.fixture(params=["bytes", "starts", "spaced"])
def tokenizer(request, write_tokenizer, tmp_path):
  match request.param:
    case "bytes":
      return tokenizers.load("bytes")
    case "starts":
      (tmp_path / "own").mkdir()
      return write_tokenizer(tmp_path / "own", None)
  return request.getfixturevalue("spaced")


def test_the_answer_is_learnt_after_the_tokens_that_evaluation_asks_with(tokenizer):
  # What looks like a special token is text, as it is where a model is asked.
  text, label = "Herman </s><|endoftext|> 他", "Melville wrote"
  prompt = open_template("sentiment.jinja", PROMPTS, "x")
  source = Prompts(records({"text": text, "label": label}), prompt, ANSWER)
  (stored,) = PromptEncoder(tokenizer).encode_batch([source[0]])
  assert stored.dtype == np.uint32
  tokens, learnt = decode_flags(stored)
  asked = tokenizer.encode_prompt(f"Review: {text}\nSentiment:")
  assert tokens[~learnt].tolist() == tokens[: len(asked)].tolist() == asked
  assert tokenizer.decode_bytes(tokens[learnt].tolist()).decode() == f" {label}"
  assert tokens[-1] == tokenizer.end_of_text
  context, continuation = encode_pair(tokenizer, f"Review: {text}\nSentiment:", f" {label}")
  assert tokens.tolist() == [*context, *continuation, tokenizer.end_of_text]
  assert list(prompts.texts(source)) == [f"Review: {text}\nSentiment: {label}"]


@pytest.mark.parametrize("end_of_text", [True, False])
def test_the_candidate_that_was_learnt_is_scored_as_it_was_learnt(
  tokenizer, tmp_path, monkeypatch, end_of_text
):
  record = {
    "titles": ["Heat", "他"],
    "offered": ["Up", "Herman </s>", "Up 2"],
    "next": "Herman </s>",
  }
  (tmp_path / "films.jsonl").write_text(json.dumps(record))
  settings = {"kind": "ranking", "data": "films.jsonl", "prompt": "recommendation.jinja"}
  settings |= {"candidates": "offered", "target": "next", "end_of_text": end_of_text}
  settings |= {"domain_premise": "Next:"}
  (tmp_path / "films.json").write_text(json.dumps(settings))
  scored = []

  def score(subject, pairs):
    scored.extend(pairs)
    return [Score(-1.0, len(after), False) for _, after in pairs]

  monkeypatch.setattr(Subject, "score", score)
  questions = answers.prepare(load_task(str(tmp_path / "films.jsonl")))
  answers.evaluate(questions, Subject(None, tokenizer), resamples=2)
  source = Prompts(
    records(record),
    open_template("recommendation.jinja", PROMPTS, "x"),
    Template("task.answer", " {{ next }}"),
  )
  tokens, _ = decode_flags(PromptEncoder(tokenizer).encode_batch([source[0]])[0])
  end = [] if end_of_text else [tokenizer.end_of_text]
  assert [[*context, *after, *end] for context, after in scored][1] == tokens.tolist()
  assert {after[-1] == tokenizer.end_of_text for _, after in scored} == {end_of_text}


def test_records_of_bytes_numbers_and_lists_are_as_in_json():
  found = records({"text": "é".encode(), "label": np.int64(1), "names": np.array(["a", "b"])})
  answer = Template("task.answer", " {{ names[label] }}")
  source = Prompts(found, Template("p", "{{ text }}"), answer)
  assert json.loads(source[0]) == ["é", " b", "mine[0]"]


def test_half_a_surrogate_pair_is_named_by_its_record():
  source = Prompts(records({"text": "a", "label": "\ud800"}), Template("p", "{{ text }}"), ANSWER)
  with pytest.raises(UserError, match=r"^mine\[0\]: a text has half of a surrogate pair"):
    PromptEncoder(tokenizers.load("bytes")).encode_batch([source[0]])


# --- As a format of data -----------------------------------------------------------------------


@pytest.fixture
def make_prompt_config(make_config, tmp_path):
  """Returns a function that makes a config over reviews, in JSON lines or Parquet."""
  reviews = [{"text": f"review {n}", "label": ("bad", "good")[n % 2], "n": n} for n in range(20)]
  (tmp_path / "reviews.jsonl").write_text("\n".join(["", *map(json.dumps, reviews)]))
  pq.write_table(pa.Table.from_pylist(reviews), tmp_path / "reviews.parquet")

  def make(preset="jsonl", **changes):
    keys = {"path": str(tmp_path / f"reviews.{preset}"), "task": "prompt"}
    keys |= {"prompt": "sentiment.jinja", "answer": " {{ label }}", "validation_fraction": 0.2}
    return make_config(preset=preset, batch_size=2, **(keys | changes))

  return make


@pytest.mark.parametrize("preset", ["jsonl", "parquet"])
def test_rows_are_whole_prompts_with_their_answers_alone_learnt(
  make_prompt_config, tmp_path, preset
):
  dataset = open_dataset(make_prompt_config(preset), tmp_path)
  row = jax.tree.map(lambda field: field[0], dataset.training_batch(0))
  first, _, text, label = "\n".join(describe_row(row, dataset.tokenizer, colours=False)).split("\n")
  assert first.startswith("1 segments in ")
  assert text.startswith("<|endoftext|>Review: review ")
  number = int(text.split()[-1])
  assert label == f"Sentiment:⟦ {('bad', 'good')[number % 2]}<|endoftext|>⟧"
  assert dataset.validation_bytes is None
  assert len([*dataset.training_text(), *dataset.validation_text()]) == 20


def test_another_template_makes_other_tokens(make_prompt_config, tmp_path):
  (tmp_path / "mine.jinja").write_text("{{ text }}:")
  first, other, again = (
    open_dataset(make_prompt_config(**changes), tmp_path).num_tokens
    for changes in ({}, {"prompt": str(tmp_path / "mine.jinja")}, {"answer": "{{ n }}"})
  )
  assert len({first, other, again}) == 3


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"prompt": "code.jinja"}, r"code\.jinja: .*reviews\.jsonl:\d+: 'prompt' is undefined"),
    ({"answer": "{{ lable }}"}, r"task\.answer: .*reviews\.jsonl:\d+: 'lable' is undefined"),
    ({"answer": " "}, r"reviews\.jsonl:\d+: task\.answer makes an answer without text of it"),
    ({"prompt": "sentimant.jinja"}, r"task\.prompt: 'sentimant\.jinja' is neither"),
    ({"prompt": ""}, r"task='prompt' needs task\.prompt"),
  ],
)
def test_what_cannot_be_made_is_named_and_nothing_is_cached(
  make_prompt_config, tmp_path, changes, problem
):
  with pytest.raises(UserError, match=problem):
    open_dataset(make_prompt_config(**changes), tmp_path)
  assert not [*(tmp_path / "cache" / "tokens").glob("*/")]
