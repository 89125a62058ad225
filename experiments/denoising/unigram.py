"""A run's validation loss beside that of a prediction that looks at nothing.

    python -m experiments.denoising.unigram runs/bert

The latter gives each target its share among the targets of an epoch of training (plus one, over the
vocabulary). Both are of the targets that have to be guessed: text and not sentinels, and of a
masked language model only where the input is the mask.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax import config as config_lib
from gptjax.data.batch import Batch
from gptjax.errors import UserError
from gptjax.objectives.task import make_task
from gptjax.training.datasets import open_dataset
from gptjax.training.metrics import Sums
from gptjax.training.pretrained import load_checkpoint
from gptjax.training.step import make_eval_step


def guessed_only(
  batches: Iterable[Batch], is_text: np.ndarray, mask: int | None
) -> Iterator[Batch]:
  for batch in batches:
    guessed = is_text[batch.targets]
    if mask is not None:
      guessed &= batch.inputs == mask
    yield dataclasses.replace(batch, weights=batch.weights * guessed)


def counts(batches: Iterable[Batch], vocab_size: int) -> np.ndarray:
  """Counts how often each token is a target, by its weight: float64 [V]."""
  total = np.zeros(vocab_size)
  for batch in batches:
    total += np.bincount(batch.targets.ravel(), batch.weights.ravel(), vocab_size)
  return total


def compare(workdir: str) -> tuple[float, float]:
  """Returns the losses without and with the model, in nats a target."""
  config = config_lib.open_saved(workdir)
  dataset = open_dataset(config, workdir)
  tokenizer = dataset.tokenizer
  mask = tokenizer.mask if config.task.name == "masked" else None
  is_text = tokenizer.bytes_per_token() > 0
  epoch = map(dataset.training_batch, range(int(dataset.steps_per_epoch)))
  validation = [*guessed_only(dataset.validation_batches(), is_text, mask)]
  shares = counts(guessed_only(epoch, is_text, mask), tokenizer.vocab_size) + 1
  shares /= shares.sum()
  occurrences = counts(validation, tokenizer.vocab_size)
  unigram = -(occurrences @ np.log(shares)) / occurrences.sum()
  graph, params = nnx.split(load_checkpoint(workdir)[0])
  eval_step, sums = make_eval_step(graph, make_task(config.task)), Sums()
  for batch in validation:
    sums.add(eval_step(params, jax.tree.map(jnp.asarray, batch))[0])
  return float(unigram), sums.finish()["loss"]


if __name__ == "__main__":
  try:
    if len(sys.argv) != 2:
      raise UserError("name the work directory of one run.")
    unigram, model = compare(sys.argv[1])
    print(f"nats a target: unigram {unigram:.4f}, the model {model:.4f}")
  except UserError as error:
    sys.exit(f"error: {error}")
