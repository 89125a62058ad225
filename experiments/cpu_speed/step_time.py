"""Seconds of one training step of GPT-2 on this CPU.

    python -m experiments.cpu_speed.step_time IMPLEMENTATION 124m|char STEPS

IMPLEMENTATION is gptjax, transformers, gptjax-without-heap (freed memory goes back to the system),
gptjax-without-layout (JAX's own rule for the gradients of kernels) or gptjax-without-copies (one
compiled layer, scanned, in place of a copy for each).

Forward, cross-entropy, backward, clipping to norm 1 and AdamW, float32, no dropout, random tokens.
Prints one JSON object. `compare.py` runs both in turn.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np

# layers, width, heads, vocabulary, batch, sequence
SHAPES = {
  "124m": (12, 768, 12, 50_257, 4, 256),
  "char": (6, 384, 6, 65, 12, 256),
}
WARMUP = 3


def gptjax_step(shape: tuple[int, ...], without: str = "") -> Callable[[np.ndarray], float]:
  """The step that `gptjax.train` runs, from its own config, without one of its measures."""
  import jax
  import jax.numpy as jnp

  from gptjax import config as config_lib
  from gptjax.data.batch import Batch
  from gptjax.devices import hosts as host
  from gptjax.devices import sharding
  from gptjax.model import layers as layers_lib
  from gptjax.training.resolve import resolve
  from gptjax.training.setup import make_setup
  from gptjax.training.step import init_state

  layers, width, heads, vocab, batch_size, length = shape
  config = config_lib.load(
    "configs/pretrain.py:model=tiny-gpt2,optim=adamw",
    {
      "model.num_layers": layers,
      "model.embed_dim": width,
      "model.num_heads": heads,
      "model.mlp_dim": 4 * width,
      "model.vocab_size": vocab,
      "batch_size": batch_size,
      "sequence_length": length,
      "optim.schedule": "constant",
      "model.execution.scan_layers": without == "copies",
    },
  )
  if without == "layout":
    layers_lib.contract = lambda x, kernel, count, axes: jnp.tensordot(x, kernel, axes=count)
  if without == "heap":
    host.keep_freed_memory = lambda: None
  host.prepare_cpu()
  setup = make_setup(resolve(config))
  optimizer = setup.make_optimizer(setup.run_length)
  train_step = setup.make_train_step(optimizer)
  with jax.set_mesh(setup.mesh):
    state = init_state(setup.model, optimizer, 0, setup.abstract_state(optimizer))
  # One document a row, as the pipeline would deliver it.
  ones = np.ones((batch_size, length), np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)

  def step(tokens: np.ndarray) -> float:
    nonlocal state
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)
    with jax.set_mesh(setup.mesh):
      state, metrics = train_step(state, sharding.to_global(batch, setup.mesh))
      jax.block_until_ready(state)
    return float(metrics["loss"])

  return step


def transformers_step(shape: tuple[int, ...]) -> Callable[[np.ndarray], float]:
  """GPT-2 of the `transformers` library, with its default attention and PyTorch's fused AdamW."""
  import torch
  from transformers import GPT2Config, GPT2LMHeadModel

  layers, width, heads, vocab, _, length = shape
  model = GPT2LMHeadModel(
    GPT2Config(
      vocab_size=vocab,
      n_positions=1024,
      n_embd=width,
      n_layer=layers,
      n_head=heads,
      resid_pdrop=0.0,
      embd_pdrop=0.0,
      attn_pdrop=0.0,
      bos_token_id=None,
      eos_token_id=None,
    )
  )
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )

  def step(tokens: np.ndarray) -> float:
    inputs = torch.from_numpy(tokens[:, :length].astype(np.int64))
    loss = model(input_ids=inputs, labels=inputs).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)

  return step


def main(implementation: str, shape_name: str, steps: int) -> None:
  shape = SHAPES[shape_name]
  vocab, batch_size, length = shape[3:]
  rng = np.random.default_rng(0)
  name, _, without = implementation.partition("-without-")
  step = transformers_step(shape) if name == "transformers" else gptjax_step(shape, without)
  seconds = []
  for _ in range(WARMUP + steps):
    tokens = rng.integers(0, vocab, (batch_size, length + 1), dtype=np.int32)
    start = time.perf_counter()
    loss = step(tokens)
    seconds.append(time.perf_counter() - start)
  seconds = seconds[WARMUP:]
  print(json.dumps({"median_seconds": float(np.median(seconds)), "loss": loss}))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
