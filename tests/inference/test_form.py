"""The inference form against the model itself, and what its compiled step does not do."""

import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.inference import form
from gptjax.inference.engine import Engine
from gptjax.inference.forward import forward
from gptjax.inference.reader import Reader
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.model.gpt import model_graph

BYTES = tokenizer_lib.load("bytes")
LENGTH = 64
LLAMA = {
  **{"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False, "mlp.activation": "swiglu"},
  **{"num_kv_heads": 2},
}
KINDS = {
  "gpt2": {"position.max_positions": LENGTH},
  "llama": LLAMA,
  "gemma": LLAMA
  | {
    **{"layer_pattern": ("local", "full"), "window": 7, "head.tied": True},
    **{"attention.soft_cap": 3.0, "head.soft_cap": 5.0, "norm.placement": "both"},
  },
  "bloom": {"position.kind": "alibi", "embed.norm": True},
  "t5 bias": {"position.kind": "t5", "position.t5_buckets": 8, "position.t5_max_distance": 20},
  "gpt-oss": LLAMA
  | {
    **{"attention.sinks": True, "layer_pattern": ("local", "full"), "window": 9},
    **{"experts.count": 4, "experts.per_token": 2},
  },
  "neox": {"position.kind": "rope", "residual.kind": "parallel"},
}
FAST = ("gemma",)


@pytest.fixture(scope="module")
def make(tiny_config, random_params):
  def make(kind="gpt2", **changes):
    config = tiny_config(vocab_size=264, **(KINDS[kind] | changes))
    return nnx.merge(model_graph(config), random_params(config, seed=5))

  return make


def requests():
  texts = ["a", "def main(x):", "A prompt of several pages, " * 2, "And one more."]
  options = {"max_tokens": 9, "ignore_end": True, "log_probs": 1}
  samplings = [Sampling(temperature=0), Sampling(0.9, top_p=0.9)] * 2
  return [
    Request(BYTES.encode(text)[:40], seed=i, sampling=samplings[i], **options)
    for i, text in enumerate(texts)
  ]


def told(answer):
  return answer.tokens, answer.scores


@pytest.mark.parametrize(
  "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_log_probabilities_are_the_models_and_the_same_bits_in_any_batch(make, kind):
  model = make(kind)
  wanted = requests()
  engine = Engine(model, BYTES, rows=4, length=LENGTH, chunk=16)
  together = engine.run(wanted)
  rows = np.zeros((4, LENGTH), np.int32)
  for row, answer in zip(rows, together, strict=True):
    row[: len(answer.tokens)] = answer.tokens
  log_probs = jax.nn.log_softmax(jax.jit(model)(rows))
  for row, answer in zip(np.asarray(log_probs), together, strict=True):
    for at, score in enumerate(answer.scores, answer.prompt_length - 1):
      np.testing.assert_allclose(score.log_prob, row[at, score.token], atol=2e-4)
  # Alone; in another order, two at a time; and from what was read before.
  alone = Engine(model, BYTES, rows=1, length=LENGTH, chunk=64)
  assert [told(alone.run([one])[0]) for one in wanted] == [told(answer) for answer in together]
  assert [told(one) for one in engine.run(wanted[::-1])[::-1]] == [told(one) for one in together]
  two = Engine(model, BYTES, rows=2, length=LENGTH, chunk=32)
  assert [told(answer) for answer in two.run(wanted)] == [told(answer) for answer in together]


def rounded(values, inputs, weights):
  """Values as they are kept: with one scale for each output, over the axes `inputs`, for int8."""
  if weights == "bfloat16":
    return np.asarray(values, jax.numpy.bfloat16).astype(np.float32)
  scales = np.abs(values).max(inputs, keepdims=True) / 127
  return np.round(values / scales) * scales


@pytest.mark.parametrize("kernels", ["own", "of XLA"])
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_weights_are_those_of_a_model_with_rounded_weights(
  make, weights, kernels, monkeypatch
):
  if kernels != "own":
    monkeypatch.setattr(form.kernels, "available", lambda: False)
  model = make("llama")
  by_hand = nnx.to_flat_state(nnx.state(make("llama"), nnx.Param))
  for path, parameter in by_hand:
    if path[-1] == "kernel":
      inputs = tuple(range(1, 1 + parameter.fan_in_axes))
      parameter.set_value(rounded(np.asarray(parameter[...]), inputs, weights))
    elif path == ("embed", "embedding"):
      parameter.set_value(rounded(np.asarray(parameter[...]), 1, weights))
  other = nnx.merge(nnx.graphdef(model), nnx.from_flat_state(by_hand))
  wanted = [Request(BYTES.encode("A text that is scored."), 0, log_probs=0, scores_prompt=True)]

  def score(model, weights):
    (answer,) = Engine(model, BYTES, length=LENGTH, weights=weights).run(wanted)
    return np.array([score.log_prob for score in answer.prompt_scores[1:]])

  np.testing.assert_allclose(score(model, weights), score(other, "float32"), atol=1e-5)
  assert np.abs(score(model, weights) - score(model, "float32")).max() > 1e-3


def large(program: str, size: int) -> list[str]:
  """Instructions of a compiled program that make an array of at least `size` elements anew, but
  for those within a fusion, which make an element where one is read."""
  found, fused = [], False
  for line in program.splitlines():
    if line.endswith("{"):
      fused = line.startswith(("%fused_", "%wrapped_"))
    if fused:
      continue
    match = re.match(r"\s+(?:ROOT )?%?\S+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
    if match is None or match[2] in ("parameter", "get-tuple-element", "bitcast", "custom-call"):
      continue
    if math.prod(int(side) for side in match[1].split(",") if side) >= size:
      found.append(line.strip())
  return found


@pytest.mark.parametrize("weights", form.WEIGHTS)
@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_step_makes_no_array_of_the_size_of_a_weight_or_of_the_cache(
  make, weights, rows, monkeypatch
):
  sizes = {"embed_dim": 64, "num_heads": 4, "mlp_dim": 256, "num_kv_heads": 4}
  model = make("llama", **sizes)

  def compile_step(weights):
    reader = Reader(model, rows=rows, length=LENGTH, pages=rows * 16, weights=weights)
    step = np.zeros((rows, 1), np.int32)
    arguments = (reader.form, reader.arrays, reader._pools, step, step)
    tables = np.zeros((rows, 4), np.int32)
    return forward.lower(*arguments, tables, step, length=LENGTH).compile().as_text()

  # The smallest matrix is 64 x 64, the cache of a layer as large.
  assert large(compile_step(weights), 64 * 64) == []
  if weights != "int8" and rows == 1:
    # What the check would find: without the kernels, XLA gathers the pages.
    monkeypatch.setattr(form.kernels, "available", lambda: False)
    assert large(compile_step(weights), 64 * 64)


def test_what_there_is_no_form_for_is_refused(make):
  with pytest.raises(UserError, match=r"weights: no choice 'int9'. Did you mean 'int8'"):
    Engine(make(), BYTES, length=LENGTH, weights="int9")


def test_int8_spares_the_router_and_the_experts(make, monkeypatch):
  monkeypatch.setattr(form.kernels, "available", lambda: False)
  reader = Reader(make("gpt-oss"), rows=1, length=LENGTH, pages=4, weights="int8")
  model = reader.form.model(reader.arrays)
  block = model.blocks[0]
  assert block.mlp.router.kernel.dtype == block.mlp.up.kernel.dtype == "float32"
  assert block.attention.query.kernel.values.dtype == model.embed.embedding.dtype == "int8"


def test_forms_of_alike_models_are_one(make):
  first, second = (Reader(make(), rows=1, length=LENGTH, pages=4) for _ in range(2))
  assert first.form is second.form


def test_weights_lie_in_large_pages(make):
  if not form.kernels.available() or not Path("/proc/self/smaps").exists():
    pytest.skip("needs numba and Linux")
  reader = Reader(make(), rows=1, length=LENGTH, pages=4)
  for array in reader.arrays:
    assert array.is_fully_addressable
    assert "hg" in flags_at(array.unsafe_buffer_pointer())


def flags_at(address: int) -> list[str]:
  """What the system was told of the memory at an address."""
  inside = False
  for line in Path("/proc/self/smaps").read_text().splitlines():
    if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
      inside = int(found[1], 16) <= address < int(found[2], 16)
    elif inside and line.startswith("VmFlags:"):
      return line.split()[1:]
  raise AssertionError("no such memory")
