"""`generate` of `transformers` for `compare.py`: greedy, with its cache and default attention."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

THREADS = len(os.sched_getaffinity(0))


class Engine:
  """See `worker.Engine`."""

  def __init__(self, format: str, folder: Path, rows: int, length: int):
    del rows, length  # The cache grows.
    self._model = load(format, folder)
    self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    self.setting = ""

  def warm_up(self, rows: int, prompt: int, tokens: int) -> None:
    self.measure(rows, prompt, min(tokens, 8), 0)

  def measure(self, rows: int, prompt: int, tokens: int, seed: int) -> float:
    vocab = self._model.config.vocab_size
    texts = np.random.default_rng(seed).integers(0, vocab, (rows, prompt))
    times = []

    def note(tokens_BT, scores, **_) -> torch.Tensor:
      """Is called after each token; ends no row."""
      del scores
      times.append(time.perf_counter())
      return torch.zeros(len(tokens_BT), dtype=torch.bool)

    self._generate(texts, tokens + 1, stopping_criteria=[note])
    return times[-1] - times[0]

  def write(self, prompt: Sequence[int], tokens: int) -> list[int]:
    return self._generate(np.array([prompt]), tokens)[0, len(prompt) :].tolist()

  def _generate(self, texts_BT: np.ndarray, tokens: int, **options: Any) -> torch.Tensor:
    texts = torch.from_numpy(texts_BT)
    with torch.inference_mode():
      return self._model.generate(
        texts,
        attention_mask=torch.ones_like(texts),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        **options,
      )


def load(format: str, folder: Path) -> Any:
  """The model, which goes on after the end of a text."""
  torch.set_num_threads(THREADS)
  transformers.logging.set_verbosity_error()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / "hf", dtype=getattr(torch, format)
  ).eval()
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0
  return model
