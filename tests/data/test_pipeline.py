import itertools
import json
import re

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.errors import UserError
from gptjax.presets.parts import data as presets
from tests.data.conftest import DOCUMENTS, open_dataset


def assert_equal(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


def concatenate(batches):
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


TOKENIZERS = {"prefix": "bytes", "masked": "bytes+mask", "span_corruption": "bytes+sentinels"}


@pytest.fixture
def chats(tmp_path):
  """Returns a JSONL file of 60 conversations, of 100 to 400 bytes as Alpaca's template has them."""
  path = tmp_path / "chats.jsonl"
  records = [
    {"prompt": f"{number}?" + " why" * (number % 7), "completion": f"{number}!" * (1 + number % 50)}
    for number in range(60)
  ]
  path.write_text("\n".join(map(json.dumps, records)))
  return path


@pytest.fixture
def make_chat_config(make_config, chats):
  """Returns a function that makes a config over the conversations."""
  keys = {"preset": "jsonl", "path": str(chats), "validation_fraction": 0.2}

  def make(sequence_length=512, task="chat", **changes):
    own = {"chat_template": "alpaca"} if task == "chat" else {}
    changes = keys | own | changes
    return make_config(sequence_length=sequence_length, task=task, **changes)

  return make


@pytest.fixture(params=["plain", "fim", "mixture", "chat", "labels", "prompt", *TOKENIZERS])
def config(request, make_config, make_chat_config, make_label_config, corpus, tmp_path):
  match request.param:
    case "plain":
      return make_config()
    case "fim":
      return make_config(tokenizer="bpe:400", fim_rate=0.5)
    case "chat":
      return make_chat_config()
    case "labels":
      records = [{"text": f"{n} " * (n % 9 + 3), "label": n % 2} for n in range(100)]
      return make_label_config(records, labels=("odd", "even"), validation_fraction=0.2)
    case "prompt":
      return make_chat_config(task="prompt", prompt="code.jinja", answer="{{ completion }}")
    case "mixture":
      part = presets.PART_DEFAULTS | {"source": "text", "path": str(corpus), "weight": 1.0}
      one_file = part | {"path": str(corpus / "0.txt"), "weight": 2.5}
      return make_config(mixture={"folder": part, "file": one_file})
    case task:
      return make_config(TOKENIZERS[task], task=task)


STEPS = [0, 1, 7, 100, 12345]


@pytest.mark.parametrize("process_count", [2, 4])
def test_batches_do_not_depend_on_the_number_of_hosts(config, tmp_path, process_count):
  # On one mesh, whoever holds its devices.
  alone = open_dataset(config, tmp_path, row_multiple=4)
  sizes = {"row_multiple": 4, "process_count": process_count}
  hosts = [
    open_dataset(config, tmp_path, process_index=index, **sizes) for index in range(process_count)
  ]
  for step in STEPS:
    together = concatenate([host.training_batch(step) for host in hosts])
    assert_equal(together, alone.training_batch(step))
  shares = zip(*(host.validation_batches() for host in hosts), strict=True)
  for share, batch in zip(shares, alone.validation_batches(), strict=True):
    assert_equal(concatenate(share), batch)


def test_a_run_resumes_at_any_step(config, tmp_path):
  whole = list(itertools.islice(open_dataset(config, tmp_path).training_batches(0), 30))
  assert len({batch.inputs.tobytes() for batch in whole}) == 30
  for start in (0, 1, 17):
    dataset = open_dataset(config, tmp_path)
    resumed = list(itertools.islice(dataset.training_batches(start), 30 - start))
    for step, batch in enumerate(resumed, start):
      assert_equal(batch, whole[step])
      assert_equal(dataset.training_batch(step), whole[step])


def test_batch_shapes(config, tmp_path):
  batch = open_dataset(config, tmp_path, row_multiple=4).training_batch(3)
  assert isinstance(batch, Batch)
  # With an encoder it has sequence_length, and the decoder what 0.15 of the window takes.
  decoder_length = config.sequence_length if batch.encoder_inputs is None else 16
  for name, values in vars(batch).items():
    if values is None:
      assert name in ("prefix", "token_types", "values") or name.startswith("encoder_")
    else:
      assert values.shape == (4, 64 if name.startswith("encoder_") else decoder_length)
      assert values.dtype == ("float32" if name == "weights" else "int32")


def test_seeds_order_the_rows_but_share_split_tokenizer_and_cache(make_config, tmp_path):
  zero = open_dataset(make_config("bpe:400", seed=0), tmp_path / "0")
  one = open_dataset(make_config("bpe:400", seed=1), tmp_path / "1")
  assert not np.array_equal(zero.training_batch(0).inputs, one.training_batch(0).inputs)
  assert zero.tokenizer.fingerprint() == one.tokenizer.fingerprint()
  assert list(zero.validation_text()) == list(one.validation_text())
  assert len(list((tmp_path / "cache" / "tokens").glob("*/"))) == 2


def test_an_epoch_is_every_training_token_once(make_config, tmp_path):
  dataset = open_dataset(make_config(batch_size=1), tmp_path)
  assert dataset.steps_per_epoch == (dataset.num_tokens - 1) // 64
  epoch = [dataset.training_batch(step) for step in range(int(dataset.steps_per_epoch))]
  assert len({batch.inputs.tobytes() for batch in epoch}) == len(epoch)
  text = "".join(dataset.training_text()).encode()
  assert dataset.num_tokens == len(text) + len(list(dataset.training_text())) + 1
  assert all(batch.weights.all() for batch in epoch)


def test_fim_differs_between_epochs(make_config, tmp_path):
  config = make_config(fim_rate=1.0, batch_size=1)
  dataset = open_dataset(config, tmp_path)
  steps = int(dataset.steps_per_epoch)
  first, second = (
    {dataset.training_batch(step).inputs.tobytes() for step in range(start, start + steps)}
    for start in (0, steps)
  )
  assert len(first & second) < 0.1 * steps


@pytest.mark.parametrize("task", TOKENIZERS)
def test_what_is_predicted_differs_between_epochs_but_not_in_validation(
  make_config, tmp_path, task
):
  config = make_config(TOKENIZERS[task], task=task, batch_size=1)
  dataset = open_dataset(config, tmp_path)
  steps = int(dataset.steps_per_epoch)

  def rows(batches):
    return {b"".join(x.tobytes() for x in jax.tree.leaves(batch)) for batch in batches}

  first, second = (
    rows(dataset.training_batch(step) for step in range(start, start + steps))
    for start in (0, steps)
  )
  assert len(first & second) < 0.1 * steps
  validation = rows(dataset.validation_batches())
  assert rows(dataset.validation_batches()) == validation
  config.seed = 1
  assert rows(open_dataset(config, tmp_path).validation_batches()) != validation
  assert dataset.validation_bytes is None  # Not all of them are predicted.


def test_validation_rows_are_masked_apart(make_config, tmp_path, corpus):
  same = corpus / "same.txt"
  same.write_text("a" * 1000)
  config = make_config(
    "bytes+mask", task="masked", whole_words=False, validation_path=str(same), batch_size=1
  )
  batches = [*open_dataset(config, tmp_path).validation_batches()][1:-1]
  assert len({batch.weights.tobytes() for batch in batches}) == len(batches) > 10


def test_every_validation_token_is_read_by_a_masked_language_model(make_config, tmp_path):
  dataset = open_dataset(make_config("bytes+mask", task="masked"), tmp_path)
  tokens = [batch.targets[batch.segment_ids > 0] for batch in dataset.validation_batches()]
  assert dataset.tokenizer.decode(np.concatenate(tokens)) == "".join(dataset.validation_text())


def test_validation_is_its_text_once_and_never_reordered(make_config, tmp_path):
  dataset = open_dataset(make_config(fim_rate=1.0, batch_size=3), tmp_path)
  for _ in range(2):  # It can be run through again.
    tokens = []
    for batch in dataset.validation_batches():
      assert batch.inputs.shape == (3, 64)
      tokens += batch.targets[batch.weights > 0].tolist()
    text = list(dataset.validation_text())
    assert dataset.tokenizer.decode(tokens) == "".join(text)
    assert dataset.validation_bytes == sum(len(document.encode()) for document in text)


def test_training_and_validation_are_apart(make_config, tmp_path):
  dataset = open_dataset(make_config(), tmp_path)
  training, validation = list(dataset.training_text()), list(dataset.validation_text())
  assert training
  assert validation
  assert sorted(training + validation) == sorted(DOCUMENTS)


def test_the_tokenizer_stays_with_the_run(make_config, tmp_path, corpus):
  first = open_dataset(make_config("bpe:400"), tmp_path / "run").tokenizer
  (corpus / "more.txt").write_text("zebra " * 1000)
  again = open_dataset(make_config("bpe:400"), tmp_path / "run").tokenizer
  other = open_dataset(make_config("bpe:400"), tmp_path / "other").tokenizer
  assert again.fingerprint() == first.fingerprint() != other.fingerprint()


def test_a_mixture_of_kinds_with_a_tfds_part(make_config, tmp_path):
  config = make_config(preset="stdlib+lm1b", sequence_length=16)
  config.data.mixture.lm1b.weight = 3.0
  with tfds.testing.mock_data(num_examples=20):
    dataset = open_dataset(config, tmp_path)
  letters = [bytes(row[row < 256].astype(np.uint8)) for row in dataset.training_batch(5).inputs]
  assert sum(set(row) <= set(b" abcdefghij") for row in letters) == 3


def test_batch_size_must_be_shared_evenly(make_config, tmp_path):
  with pytest.raises(UserError, match="batch_size is 4, which 3 processes cannot share evenly"):
    open_dataset(make_config(), tmp_path, process_count=3)


def test_a_part_too_short_for_a_row_is_named(make_config, tmp_path, corpus):
  part = presets.PART_DEFAULTS | {"source": "text", "path": str(corpus), "weight": 1.0}
  short = part | {"path": str(corpus / "5.txt")}
  with pytest.raises(UserError, match="data part 'short': a row takes 64 tokens"):
    open_dataset(make_config(mixture={"long": part, "short": short}), tmp_path)
  with pytest.raises(UserError, match="data part 'text': a row takes 100000 tokens"):
    open_dataset(make_config(sequence_length=100000), tmp_path)


def numbers(batches):
  """The conversations of batches, by the number that each begins its answer with."""
  rows = [row for batch in batches for row in zip(*map(np.asarray, parts(batch)), strict=True)]
  found = []
  for targets, weights, segments in rows:
    for segment in range(1, segments.max() + 1):
      answer = bytes(targets[(segments == segment) & (weights > 0) & (targets < 256)].tolist())
      found.append(int(answer.split(b"!")[0]))
  return found


def parts(batch):
  return batch.targets, batch.weights, batch.segment_ids


def test_an_epoch_is_every_conversation_once(make_chat_config, tmp_path):
  dataset = open_dataset(make_chat_config(batch_size=1), tmp_path)
  steps = int(dataset.steps_per_epoch)
  assert steps == dataset.steps_per_epoch > 10
  first, second = (
    [dataset.training_batch(step) for step in range(start, start + steps)] for start in (0, steps)
  )
  training, validation = numbers(first), numbers(dataset.validation_batches())
  assert sorted(training + validation) == list(range(60))
  assert len(validation) >= 5
  assert numbers(dataset.validation_batches()) == validation
  assert training != numbers(second)
  assert sorted(training) == sorted(numbers(second))
  assert dataset.validation_bytes is None
  assert sum("why" in text for text in dataset.validation_text()) > 0


def test_what_becomes_of_overlong_conversations_is_said_once(make_chat_config, tmp_path, caplog):
  open_dataset(make_chat_config(), tmp_path)
  assert "truncated" not in caplog.text
  config = make_chat_config(sequence_length=250, overlong="drop", validation_fraction=0.02)
  open_dataset(config, tmp_path, process_index=1, process_count=2)
  assert "truncated" not in caplog.text
  dataset = open_dataset(config, tmp_path)
  assert len(caplog.messages) == 1
  (dropped,) = map(int, re.findall(r"0 are truncated and (\d+) dropped", caplog.text))
  steps = range(int(dataset.steps_per_epoch * 4) // 4 + 1)
  kept = set(numbers(dataset.training_batch(step) for step in steps))
  validation = numbers(dataset.validation_batches())
  assert len(kept | {*validation}) + dropped == 60


def test_a_run_keeps_the_template_that_it_was_trained_with(make_chat_config, tmp_path):
  config = make_chat_config(tokenizer="bpe:300")
  first = open_dataset(config, tmp_path / "run")
  kept = tokenizers.open_saved(tmp_path / "run" / "tokenizer")
  assert kept.fingerprint() == first.tokenizer.fingerprint()
  assert "### Instruction" in kept.chat_template
  again = open_dataset(config, tmp_path / "run")
  assert again.tokenizer.fingerprint() == kept.fingerprint()
  assert_equal(again.training_batch(3), first.training_batch(3))


def test_a_tokenizer_without_a_template_needs_one_by_name(make_chat_config, tmp_path):
  with pytest.raises(UserError, match="'bytes' has no chat template of its own"):
    open_dataset(make_chat_config(chat_template=""), tmp_path)


def test_a_conversation_that_cannot_be_read_is_named_and_nothing_is_cached(
  make_chat_config, tmp_path, chats
):
  chats.write_text(chats.read_text() + '\n{"prompt": "x", "completion": ""}\n' * 2)
  with pytest.raises(
    UserError, match=r"chats\.jsonl:6\d: message 1, of role 'assistant', has no c"
  ):
    open_dataset(make_chat_config(), tmp_path)
  assert not [*(tmp_path / "cache" / "tokens").glob("*/")]


def test_conversations_mix_by_the_rows_of_their_parts(make_chat_config, tmp_path, chats):
  other = tmp_path / "others.jsonl"
  record = {"instruction": "Say it.", "output": "99!"}
  other.write_text("\n".join([json.dumps(record)] * 40))
  part = presets.PART_DEFAULTS | {"source": "jsonl", "validation_fraction": 0.2}
  mixture = {
    "chats": part | {"path": str(chats), "weight": 3.0},
    "others": part | {"path": str(other), "weight": 1.0},
  }
  batch = open_dataset(make_chat_config(mixture=mixture), tmp_path).training_batch(3)
  rows = (
    Batch(*(field[None] for field in row)) for row in zip(*jax.tree.leaves(batch), strict=True)
  )
  assert sum(set(numbers([row])) == {99} for row in rows) == 1
