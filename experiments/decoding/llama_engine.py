"""llama.cpp for `compare.py`, through the functions of its library.

Each step is one batch of a token for each of the rows, each row a sequence of its own; the next
tokens are the largest logits. Of four settings each batch gets the fastest.
"""

import ctypes
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as llama
import numpy as np

THREADS = len(os.sched_getaffinity(0))
# Attention as one operation or several; one cache for all sequences or one for each.
SETTINGS = {
  f"{'flash' if flash else 'plain'} attention, {'one cache' if unified else 'a cache each'}": (
    flash,
    unified,
  )
  for flash, unified in itertools.product((True, False), (True, False))
}
# To choose a setting: how often each is tried, in turn, and for how many tokens.
TRIALS, TRIAL_TOKENS = 2, 16


@llama.llama_log_callback
def _say_nothing(level, text, data):
  del level, text, data


class Engine:
  """See `worker.Engine`. The cache is float16, as is llama.cpp's default."""

  def __init__(self, format: str, folder: Path, rows: int, length: int):
    path = folder / f"{format}.gguf"
    self._rearranges = _can_rearrange(path)
    self._model = _load(path, self._rearranges)
    self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
    self._chosen: dict[int, str] = {}
    self._context: tuple[int, int, str, int] | None = None  # rows, length, setting, address
    self.version = f"llama-cpp-python {llama.__version__}"

  @property
  def setting(self) -> str:
    chosen = [f"batch {rows}: {setting}" for rows, setting in sorted(self._chosen.items())]
    crash = [] if self._rearranges else ["without rearranged weights, with which it crashes"]
    return "; ".join(chosen + crash)

  def warm_up(self, rows: int, prompt: int, tokens: int) -> None:
    few = min(tokens, TRIAL_TOKENS)
    seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for trial in range(1 + TRIALS):
      for setting, found in seconds.items():
        self._open(rows, prompt + tokens + 1, setting)
        found.append(self._time(rows, prompt, few, trial))
    self._chosen[rows] = min(seconds, key=lambda setting: np.median(seconds[setting][1:]))
    self.measure(rows, prompt, tokens, 0)

  def measure(self, rows: int, prompt: int, tokens: int, seed: int) -> float:
    self._open(rows, prompt + tokens + 1, self._chosen[rows])
    return self._time(rows, prompt, tokens, seed)

  def write(self, prompt: Sequence[int], tokens: int) -> list[int]:
    setting = self._chosen.get(1, next(iter(SETTINGS)))
    self._open(1, len(prompt) + tokens, setting)
    (next_token,) = self._read(np.array([prompt], np.int32), 0)
    written = [int(next_token)]
    while len(written) < tokens:
      (next_token,) = self._read(next_token[None, None], len(prompt) + len(written) - 1)
      written.append(int(next_token))
    return written

  def _time(self, rows: int, prompt: int, tokens: int, seed: int) -> float:
    texts = np.random.default_rng(seed).integers(0, self._vocab, (rows, prompt), np.int32)
    llama.llama_memory_clear(llama.llama_get_memory(self._pointer), True)
    next_tokens = self._read(texts, 0)
    start = time.perf_counter()
    for step in range(tokens):
      next_tokens = self._read(next_tokens[:, None], prompt + step)
    return time.perf_counter() - start

  @property
  def _pointer(self) -> int:
    return self._context[3]

  def _open(self, rows: int, length: int, setting: str) -> None:
    """Makes an empty cache and its batch, unless they are those of the last time."""
    if self._context and self._context[:3] == (rows, length, setting):
      llama.llama_memory_clear(llama.llama_get_memory(self._pointer), True)
      return
    if self._context:
      llama.llama_batch_free(self._batch)
      llama.llama_free(self._pointer)
    params = llama.llama_context_default_params()
    # A cache for each sequence is as long as its share.
    params.n_ctx = rows * -(-length // 256) * 256
    params.n_batch = rows * length
    params.n_seq_max = rows
    params.n_threads = params.n_threads_batch = THREADS
    flash, params.kv_unified = SETTINGS[setting]
    params.flash_attn_type = int(flash)
    pointer = llama.llama_init_from_model(self._model, params)
    if not pointer:
      raise RuntimeError(f"llama.cpp has no room for {rows} rows of {length}")
    self._context = (rows, length, setting, pointer)
    self._batch = llama.llama_batch_init(rows * length, 0, 1)

  def _read(self, tokens_BT: np.ndarray, position: int) -> np.ndarray:
    """Reads the next tokens of all rows; returns the likeliest ones after them, int32 [B]."""
    B, T = tokens_BT.shape
    batch, count = self._batch, B * T

    def fill(pointer, values) -> None:
      np.ctypeslib.as_array(pointer, (count,))[:] = values

    batch.n_tokens = count
    fill(batch.token, tokens_BT.reshape(-1))
    fill(batch.pos, np.tile(np.arange(position, position + T), B))
    fill(batch.n_seq_id, 1)
    for i, row in enumerate(np.repeat(np.arange(B), T).tolist()):
      batch.seq_id[i][0] = row
    fill(batch.logits, np.tile(np.arange(T) == T - 1, B))
    if status := llama.llama_decode(self._pointer, batch):
      raise RuntimeError(f"llama_decode answers {status}")
    logits = llama.llama_get_logits(self._pointer)
    return np.ctypeslib.as_array(logits, (B, self._vocab)).argmax(1).astype(np.int32)


def _load(path: Path, rearrange: bool) -> int:
  """Loads a model; `rearrange` its weights as AMX and other instructions want them."""
  llama.llama_log_set(_say_nothing, ctypes.c_void_p(0))
  llama.llama_backend_init()
  params = llama.llama_model_default_params()
  params.use_extra_bufts = rearrange
  if not (model := llama.llama_model_load_from_file(str(path).encode(), params)):
    raise RuntimeError(f"llama.cpp cannot load {path.name}")
  return model


def _can_rearrange(path: Path) -> bool:
  """Whether a process with rearranged weights survives the reading of a prompt."""
  command = [sys.executable, "-m", "experiments.decoding.llama_engine", str(path)]
  return subprocess.run(command, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
  model = _load(Path(sys.argv[1]), True)
  context_params = llama.llama_context_default_params()
  context_params.n_ctx = 256
  context = llama.llama_init_from_model(model, context_params)
  tokens = (llama.llama_token * 64)(*range(64))
  sys.exit(llama.llama_decode(context, llama.llama_batch_get_one(tokens, 64)))
