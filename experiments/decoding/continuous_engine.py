"""Continuous batching of `transformers` for `compare.py`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from experiments.decoding.transformers_engine import load


class Engine:
  """See `worker.Engine`."""

  def __init__(self, format: str, folder: Path, rows: int, length: int):
    self._model = load(format, folder)
    # All prompts are read in one step.
    self._settings = {
      "block_size": 32,
      "num_blocks": rows * (length // 32 + 2),
      "max_batch_tokens": rows * length,
    }
    self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    self.setting = ""

  def warm_up(self, rows: int, prompt: int, tokens: int) -> None:
    self.measure(rows, prompt, min(tokens, 8), 0)

  def measure(self, rows: int, prompt: int, tokens: int, seed: int) -> float:
    vocab = self._model.config.vocab_size
    texts = np.random.default_rng(seed).integers(0, vocab, (rows, prompt)).tolist()
    times = [output.timestamps for output in self._generate(texts, tokens + 1)]
    return max(row[-1] for row in times) - max(row[0] for row in times)

  def write(self, prompt: Sequence[int], tokens: int) -> list[int]:
    (output,) = self._generate([list(prompt)], tokens)
    return output.generated_tokens

  def _generate(self, texts: list[list[int]], tokens: int) -> list:
    outputs = self._model.generate_batch(
      texts,
      GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
      ContinuousBatchingConfig(**self._settings),
      record_timestamps=True,
    )
    found = list(outputs.values())
    if len(found) < len(texts) or any(len(row.generated_tokens) < tokens for row in found):
      raise RuntimeError(f"generate_batch answers {len(found)} of {len(texts)} prompts in full")
    return found
