"""Records of pairs, in all their formats, become rows in which only the answers count."""

import json

import numpy as np
import pytest

from gptjax.alignment.pairs import PackedPairs, PairEncoder, Pairs, read_pair
from gptjax.data import cache, files
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.finetuning.chat_templates import set_template

USER, GOOD, BAD = "Say hello.", "Hello!", "No."
END = tokenizers.load("bytes").decode([tokenizers.load("bytes").end_of_text])
ASKED = [{"role": "user", "content": USER}]


def answer(text):
  return [{"role": "assistant", "content": text}]


FORMATS = {
  "texts": {"prompt": USER, "chosen": GOOD, "rejected": BAD},
  "messages": {"prompt": ASKED, "chosen": answer(GOOD), "rejected": answer(BAD)},
  "whole": {"chosen": ASKED + answer(GOOD), "rejected": ASKED + answer(BAD)},
  "ultrafeedback": {
    "prompt": USER,
    "chosen": ASKED + answer(GOOD),
    "rejected": ASKED + answer(BAD),
    "score_chosen": 9.0,
  },
  "sharegpt": {
    "conversations": [{"from": "human", "value": USER}],
    "chosen": {"from": "gpt", "value": GOOD},
    "rejected": {"from": "gpt", "value": BAD},
  },
  "openai": {"info": {"post": USER}, "summaries": [{"text": BAD}, {"text": GOOD}], "choice": 1},
}


@pytest.mark.parametrize("record", FORMATS.values(), ids=FORMATS)
def test_formats_are_recognised(record):
  chosen, rejected = read_pair(record, "x:1")
  for found, text in ((chosen, GOOD), (rejected, BAD)):
    told = [(message["role"], message["content"]) for message in found.messages]
    assert told == [("user", USER), ("assistant", text)]


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"prompt": USER, "chosen": GOOD}, "x:1: no pair of answers: 'rejected' is missing or empty"),
    ({"prompt": USER, "chosen": GOOD, "rejected": ""}, "'rejected' is missing or empty"),
    ({"prompt": USER, "chosen": GOOD, "rejected": " "}, "message 1, of role 'assistant', has no"),
    ({"prompt": USER, "chosen": GOOD, "rejected": GOOD}, "x:1: .* are the same answer"),
    (
      {
        "chosen": ASKED + answer(GOOD),
        "rejected": [{"role": "user", "content": "?"}, *answer(BAD)],
      },
      "x:1: 'chosen' and 'rejected' answer other prompts",
    ),
    (
      {"chosen": ASKED + answer(GOOD) + ASKED, "rejected": ASKED + answer(BAD) + ASKED},
      "does not end with an answer",
    ),
    (
      {"info": {"post": USER}, "summaries": [{"text": BAD}, {"text": GOOD}], "choice": 2},
      "'choice' is 2, not 0 or 1",
    ),
  ],
)
def test_what_is_no_pair_is_refused_in_a_sentence(record, message):
  with pytest.raises(UserError, match=message):
    read_pair(record, "x:1")


@pytest.fixture
def encoded(tmp_path):
  """Returns a function: records -> the tokenizer's encoder and its cache."""

  def encode(records):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    encoder = PairEncoder(set_template(tokenizers.load("bytes"), "alpaca"))
    source = Pairs(files.open_by_suffix(str(path), "", "error"))
    return encoder, cache.open_or_build(source, encoder, str(tmp_path / "cache"))

  return encode


def records(count):
  return [
    {"prompt": "?" * (n % 5 + 1), "chosen": "yes" * (n + 1), "rejected": "no" * (2 * n % 7 + 1)}
    for n in range(count)
  ]


def test_a_row_has_whole_pairs_whose_answers_alone_count(encoded):
  encoder, built = encoded(records(7))
  rows = PackedPairs(built, encoder.mark, 640, "drop")
  assert (rows.truncated, rows.dropped) == (0, 0)
  assert len(rows) > 1
  seen = []
  for row in map(rows.__getitem__, range(len(rows))):
    for number in range(1, row.segment_ids.max() + 1, 2):
      told = []
      for segment, sign in ((number, 1), (number + 1, -1)):
        own = row.segment_ids == segment
        np.testing.assert_array_equal(row.positions[own], np.arange(own.sum()))
        learnt = row.values[own, 0]
        assert set(learnt) == {0, sign}
        told.append(encoder.tokenizer.decode(row.targets[own][learnt != 0].tolist()))
        # One count for a pair, at the first token of its better answer.
        first = np.flatnonzero(row.weights[own])
        assert first.tolist() == ([np.flatnonzero(learnt)[0]] if sign > 0 else [])
      seen.append(tuple(text.removesuffix(END) for text in told))
  assert sorted(seen) == sorted((one["chosen"], one["rejected"]) for one in records(7))


def test_only_the_last_of_several_answers_counts(encoded):
  before = ASKED + answer("Hi.") + [{"role": "user", "content": "Again."}]
  record = {"prompt": before, "chosen": answer(GOOD), "rejected": answer(BAD)}
  encoder, built = encoded([record])
  row = PackedPairs(built, encoder.mark, 640, "drop")[0]
  for sign, text in ((1, GOOD), (-1, BAD)):
    learnt = row.targets[row.values[:, 0] == sign]
    assert encoder.tokenizer.decode(learnt.tolist()).removesuffix(END) == text


def test_a_pair_that_is_too_long_is_cut_or_dropped(encoded):
  long = {"prompt": "?", "chosen": "a" * 200, "rejected": "b" * 100}
  hidden = {"prompt": "?" * 200, "chosen": "a", "rejected": "b"}
  encoder, built = encoded([*records(2), long, hidden])
  cut = PackedPairs(built, encoder.mark, 400, "truncate")
  assert (cut.truncated, cut.dropped) == (1, 1)
  assert max(row.segment_ids.max() for row in map(cut.__getitem__, range(len(cut)))) >= 2
  assert PackedPairs(built, encoder.mark, 400, "drop").dropped == 2
  with pytest.raises(UserError, match="none of 4 pairs fits a row of 16 tokens"):
    PackedPairs(built, encoder.mark, 16, "drop")
