"""llama.cpp's answers to `gguf_perplexity.py`: tokens of texts, and the loss of rows of tokens.

    LLAMA/bin/python -m experiments.compression.llama_nats FILE.gguf < QUESTION.json

QUESTION is {"texts": [...], "rows": [[token, ...], ...]} with rows of one length; the answer is
{"version": ..., "tokens": a list for each text, "nats": the mean loss of each row}. Imports nothing
but llama_cpp and numpy, since its interpreter may lack all others.
"""

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np

THREADS = len(os.sched_getaffinity(0))


@llama.llama_log_callback
def _say_nothing(level, text, data):
  del level, text, data


def answer(path: str, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
  """Answers a question about a GGUF file. The cache is float16, as is llama.cpp's default."""
  llama.llama_log_set(_say_nothing, ctypes.c_void_p(0))
  llama.llama_backend_init()
  params = llama.llama_model_default_params()
  params.use_extra_bufts = False  # Weights rearranged for AMX crash some builds.
  model = llama.llama_model_load_from_file(str(path).encode(), params)
  if not model:
    raise RuntimeError(f"llama.cpp cannot load {path}")
  vocab = llama.llama_model_get_vocab(model)
  return {
    "version": llama.__version__,
    "tokens": [_tokenize(vocab, text.encode()) for text in texts],
    "nats": _read(model, llama.llama_vocab_n_tokens(vocab), np.array(rows, np.int32)),
  }


def _tokenize(vocab: int, text: bytes) -> list[int]:
  """The tokens of a text, without special ones."""
  room = len(text) + 1
  tokens = (llama.llama_token * room)()
  count = llama.llama_tokenize(vocab, text, len(text), tokens, room, False, False)
  return list(tokens[:count])


def _read(model: int, vocab_size: int, tokens_BT: np.ndarray) -> list[float]:
  """The mean loss in nats of the tokens of each row but the first."""
  length = tokens_BT.shape[1]
  params = llama.llama_context_default_params()
  params.n_ctx = -(-length // 256) * 256
  params.n_batch = params.n_ubatch = length
  params.n_threads = params.n_threads_batch = THREADS
  context = llama.llama_init_from_model(model, params)
  batch = llama.llama_batch_init(length, 0, 1)
  batch.n_tokens = length
  np.ctypeslib.as_array(batch.pos, (length,))[:] = np.arange(length)
  np.ctypeslib.as_array(batch.n_seq_id, (length,))[:] = 1
  np.ctypeslib.as_array(batch.logits, (length,))[:] = 1
  for i in range(length):
    batch.seq_id[i][0] = 0
  nats = []
  for row in tokens_BT:
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    np.ctypeslib.as_array(batch.token, (length,))[:] = row
    if status := llama.llama_decode(context, batch):
      raise RuntimeError(f"llama_decode answers {status}")
    pointer = llama.llama_get_logits(context)
    logits = np.ctypeslib.as_array(pointer, (length, vocab_size))[:-1].astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    nats.append(float(-log_p[np.arange(length - 1), row[1:]].mean()))
  llama.llama_batch_free(batch)
  llama.llama_free(context)
  return nats


if __name__ == "__main__":
  question = json.load(sys.stdin)
  print(json.dumps(answer(sys.argv[1], question["texts"], question["rows"])))
