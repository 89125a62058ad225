import itertools

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs.parts import data as presets
from gptjax.data import pipeline
from gptjax.data.batch import Batch
from gptjax.errors import UserError
from tests.data.conftest import DOCUMENTS


def assert_equal(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


def concatenate(batches):
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


@pytest.fixture(params=["plain", "fim", "mixture"])
def config(request, make_config, corpus, tmp_path):
  match request.param:
    case "plain":
      return make_config()
    case "fim":
      return make_config(tokenizer="bpe:400", fim_rate=0.5)
    case "mixture":
      part = presets.PART_DEFAULTS | {"source": "text", "path": str(corpus), "weight": 1.0}
      one_file = part | {"path": str(corpus / "0.txt"), "weight": 2.5}
      return make_config(mixture={"folder": part, "file": one_file})


STEPS = [0, 1, 7, 100, 12345]


@pytest.mark.parametrize("process_count", [2, 4])
def test_batches_do_not_depend_on_the_number_of_hosts(config, tmp_path, process_count):
  alone = pipeline.open_dataset(config, tmp_path)
  hosts = [
    pipeline.open_dataset(config, tmp_path, process_index=index, process_count=process_count)
    for index in range(process_count)
  ]
  for step in STEPS:
    together = concatenate([host.training_batch(step) for host in hosts])
    assert_equal(together, alone.training_batch(step))
  shares = zip(*(host.validation_batches() for host in hosts), strict=True)
  for share, batch in zip(shares, alone.validation_batches(), strict=True):
    assert_equal(concatenate(share), batch)


def test_a_run_resumes_at_any_step(config, tmp_path):
  whole = list(itertools.islice(pipeline.open_dataset(config, tmp_path).training_batches(0), 30))
  assert len({batch.inputs.tobytes() for batch in whole}) == 30
  for start in (0, 1, 17):
    dataset = pipeline.open_dataset(config, tmp_path)
    resumed = list(itertools.islice(dataset.training_batches(start), 30 - start))
    for step, batch in enumerate(resumed, start):
      assert_equal(batch, whole[step])
      assert_equal(dataset.training_batch(step), whole[step])


def test_batch_shapes(config, tmp_path):
  batch = pipeline.open_dataset(config, tmp_path).training_batch(3)
  assert isinstance(batch, Batch)
  dtypes = {"weights": "float32"}
  for name, values in vars(batch).items():
    assert values.shape == (4, 64)
    assert values.dtype == dtypes.get(name, "int32")


def test_seeds_order_the_rows_but_share_split_tokenizer_and_cache(make_config, tmp_path):
  zero = pipeline.open_dataset(make_config("bpe:400", seed=0), tmp_path / "0")
  one = pipeline.open_dataset(make_config("bpe:400", seed=1), tmp_path / "1")
  assert not np.array_equal(zero.training_batch(0).inputs, one.training_batch(0).inputs)
  assert zero.tokenizer.fingerprint() == one.tokenizer.fingerprint()
  assert list(zero.validation_text()) == list(one.validation_text())
  assert len(list((tmp_path / "cache" / "tokens").glob("*/"))) == 2


def test_an_epoch_is_every_training_token_once(make_config, tmp_path):
  dataset = pipeline.open_dataset(make_config(batch_size=1), tmp_path)
  assert dataset.steps_per_epoch == (dataset.num_tokens - 1) // 64
  epoch = [dataset.training_batch(step) for step in range(int(dataset.steps_per_epoch))]
  assert len({batch.inputs.tobytes() for batch in epoch}) == len(epoch)
  text = "".join(dataset.training_text()).encode()
  assert dataset.num_tokens == len(text) + len(list(dataset.training_text())) + 1
  assert all(batch.weights.all() for batch in epoch)


def test_fim_differs_between_epochs(make_config, tmp_path):
  config = make_config(fim_rate=1.0, batch_size=1)
  dataset = pipeline.open_dataset(config, tmp_path)
  steps = int(dataset.steps_per_epoch)
  first, second = (
    {dataset.training_batch(step).inputs.tobytes() for step in range(start, start + steps)}
    for start in (0, steps)
  )
  assert len(first & second) < 0.1 * steps


def test_validation_is_its_text_once_and_never_reordered(make_config, tmp_path):
  dataset = pipeline.open_dataset(make_config(fim_rate=1.0, batch_size=3), tmp_path)
  for _ in range(2):  # It can be run through again.
    tokens = []
    for batch in dataset.validation_batches():
      assert batch.inputs.shape == (3, 64)
      tokens += batch.targets[batch.weights > 0].tolist()
    text = list(dataset.validation_text())
    assert dataset.tokenizer.decode(tokens) == "".join(text)
    assert dataset.validation_bytes == sum(len(document.encode()) for document in text)


def test_training_and_validation_are_apart(make_config, tmp_path):
  dataset = pipeline.open_dataset(make_config(), tmp_path)
  training, validation = list(dataset.training_text()), list(dataset.validation_text())
  assert training
  assert validation
  assert sorted(training + validation) == sorted(DOCUMENTS)


def test_the_tokenizer_stays_with_the_run(make_config, tmp_path, corpus):
  first = pipeline.open_dataset(make_config("bpe:400"), tmp_path / "run").tokenizer
  (corpus / "more.txt").write_text("zebra " * 1000)
  again = pipeline.open_dataset(make_config("bpe:400"), tmp_path / "run").tokenizer
  other = pipeline.open_dataset(make_config("bpe:400"), tmp_path / "other").tokenizer
  assert again.fingerprint() == first.fingerprint() != other.fingerprint()


def test_a_mixture_of_kinds_with_a_tfds_part(make_config, tmp_path):
  config = make_config(preset="stdlib+lm1b", sequence_length=16)
  config.data.mixture.lm1b.weight = 3.0
  with tfds.testing.mock_data(num_examples=20):
    dataset = pipeline.open_dataset(config, tmp_path)
  letters = [bytes(row[row < 256].astype(np.uint8)) for row in dataset.training_batch(5).inputs]
  assert sum(set(row) <= set(b" abcdefghij") for row in letters) == 3


def test_batch_size_must_be_shared_evenly(make_config, tmp_path):
  with pytest.raises(UserError, match="batch_size is 4, which 3 processes cannot share evenly"):
    pipeline.open_dataset(make_config(), tmp_path, process_count=3)


def test_a_part_too_short_for_a_row_is_named(make_config, tmp_path, corpus):
  part = presets.PART_DEFAULTS | {"source": "text", "path": str(corpus), "weight": 1.0}
  short = part | {"path": str(corpus / "5.txt")}
  with pytest.raises(UserError, match="data part 'short': sequence_length is 64"):
    pipeline.open_dataset(make_config(mixture={"long": part, "short": short}), tmp_path)
  with pytest.raises(UserError, match="data part 'text': sequence_length is 100000"):
    pipeline.open_dataset(make_config(sequence_length=100000), tmp_path)
