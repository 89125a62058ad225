"""How fast the weights of a step can be read, as a bound for `compare.py`: the sum of an array of
their size, in as many threads as processors."""

import os
import time
from pathlib import Path

import torch

from experiments.decoding.models import bytes_of_step

THREADS = len(os.sched_getaffinity(0))


class Engine:
  """See `worker.Engine`: a token is a sum."""

  def __init__(self, format: str, folder: Path, rows: int, length: int):
    del rows, length
    torch.set_num_threads(THREADS)
    self._weights = torch.ones(bytes_of_step(folder, format) // 4, dtype=torch.float32)
    self.version, self.setting = f"torch {torch.__version__}", ""

  def warm_up(self, rows: int, prompt: int, tokens: int) -> None:
    self.measure(rows, prompt, tokens, 0)

  def measure(self, rows: int, prompt: int, tokens: int, seed: int) -> float:
    del rows, prompt, seed
    start = time.perf_counter()
    for _ in range(tokens):
      self._weights.sum()
    return time.perf_counter() - start
