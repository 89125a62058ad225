"""gptjax's engine for `compare.py`."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from gptjax.devices.hosts import prepare_cpu
from gptjax.inference import engine as engine_lib
from gptjax.inference.request import Answer, Request
from gptjax.inference.sampling import Sampling
from gptjax.training.pretrained import load_model


class Engine:
  """See `worker.Engine`."""

  def __init__(self, format: str, folder: Path, rows: int, length: int):
    prepare_cpu()
    model, tokenizer = load_model(f"hf:{folder / 'hf'}", progress=False)
    # All prompts are read in one step.
    self.engine = engine_lib.Engine(
      model, tokenizer, rows=rows, length=length, chunk=rows * length, weights=format
    )
    self._vocab = tokenizer.vocab_size
    self.version, self.setting = f"jax {jax.__version__}", ""

  def warm_up(self, rows: int, prompt: int, tokens: int) -> None:
    self.measure(rows, prompt, tokens, 0)

  def measure(self, rows: int, prompt: int, tokens: int, seed: int) -> float:
    texts = np.random.default_rng(seed).integers(0, self._vocab, (rows, prompt)).tolist()
    answers = [self._submit(text, tokens + 1) for text in texts]
    self.engine.step()
    assert all(len(answer.tokens) == prompt + 1 for answer in answers)
    start = time.perf_counter()
    while not self.engine.idle:
      self.engine.step()
    return time.perf_counter() - start

  def write(self, prompt: Sequence[int], tokens: int) -> list[int]:
    answer = self._submit(prompt, tokens)
    while not self.engine.idle:
      self.engine.step()
    return answer.tokens[len(prompt) :]

  def _submit(self, text: Sequence[int], tokens: int) -> Answer:
    request = Request(text, tokens, Sampling(temperature=0), ignore_end=True)
    return self.engine.submit(request)
