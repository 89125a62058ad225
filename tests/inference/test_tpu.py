"""The form for TPUs, its kernel replaced by JAX's own reference of it, against XLA's attention.

The kernel itself runs on TPUs alone: Pallas's interpreters of jax 0.10.2 cannot run it. That it
compiles is seen in tests/compiler/test_decoding.py.
"""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.inference import form, tpu
from gptjax.inference import reader as reader_lib
from gptjax.inference.embed import embed
from gptjax.inference.engine import Engine
from gptjax.inference.forward import forward
from gptjax.inference.pages import PAGE, page_bytes
from gptjax.inference.reader import Reader, Row
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.model.attention import Attention
from gptjax.model.gpt import model_graph

BYTES = tokenizer_lib.load("bytes")
LENGTH = 48
LLAMA = {
  **{"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False, "mlp.activation": "swiglu"},
  **{"num_kv_heads": 2, "vocab_size": 264, "num_layers": 1},
}
LOCAL = {"num_layers": 2, "layer_pattern": ("local", "full"), "window": 7}
KINDS = {
  "grouped heads": LLAMA,
  "a window": LLAMA | LOCAL,
  "a soft cap and a scale": LLAMA | {"attention.soft_cap": 2.0, "attention.scale": 0.4},
  "heads of 64": LLAMA | {"head_dim": 64},
  "heads of 128": LLAMA | {"head_dim": 128, "num_kv_heads": 4},
}
FAST = ("heads of 64",)


@pytest.fixture
def on_tpu(monkeypatch):
  """Returns a function after which forms are made as on a TPU, with the reference in the place of
  the kernel. That cannot be traced."""

  def attend(*arrays, num_kv_pages_per_block, num_queries_per_block, **options):
    queries, _, _, tables = arrays[:4]
    assert 0 < num_kv_pages_per_block <= tables.shape[1]
    assert 0 < num_queries_per_block <= len(queries)
    assert queries.shape[-1] % 128 == 0
    return ref_ragged_paged_attention(*arrays, **options)

  def step(*args, **kwargs):
    with jax.disable_jit():
      return forward(*args, **kwargs)

  def start():
    monkeypatch.setattr(reader_lib, "forward", step)
    monkeypatch.setattr(tpu.sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "ragged_paged_attention", attend)

  monkeypatch.setattr(form.kernels, "available", lambda: False)
  return start


@pytest.fixture(scope="module")
def make(tiny_config, random_params):
  def make(**changes):
    config = tiny_config(**changes)
    return nnx.merge(model_graph(config), random_params(config, seed=5))

  return make


def read_in_turn(model):
  """Logits of three texts, of which parts of several lengths are read together."""
  reader = Reader(model, rows=4, length=LENGTH, pages=20)
  rows, rng, found = [Row(), Row(), Row()], np.random.default_rng(0), []
  # Prompts; then a token beside parts of prompts.
  for sizes in ((17, 3, 30), (1, 5, 2)):
    tokens = [rng.integers(0, 264, size).tolist() for size in sizes]
    for row, new in zip(rows, tokens, strict=True):
      assert reader.make_room(row, len(new))
    logits = reader.read(rows, tokens, all_scored=True)
    found += [np.asarray(logits[i, :size]) for i, size in enumerate(sizes)]
    for row, new in zip(rows, tokens, strict=True):
      reader.advance(row, [0] * (row.read + len(new)))
  return reader, np.concatenate(found)


@pytest.mark.parametrize(
  "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_logits_are_those_of_xla(make, on_tpu, kind):
  model = make(**KINDS[kind])
  _, expected = read_in_turn(model)
  on_tpu()
  reader, found = read_in_turn(model)
  assert reader.joined
  np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_answers_and_vectors_are_those_of_xla(make, on_tpu):
  model = make(**LLAMA | LOCAL)
  wanted = [
    Request(BYTES.encode(text), 3, Sampling(temperature=0), ignore_end=True, log_probs=1)
    for text in ("A prompt of more than one page.", "b")
  ]

  def answer():
    engine = Engine(model, BYTES, rows=2, length=LENGTH, chunk=16)
    answers = engine.run(wanted)
    scores = [score.log_prob for one in answers for score in one.scores]
    return [one.tokens for one in answers], scores, embed(engine.reader, [5, 3, 9])

  expected = answer()
  on_tpu()
  with jax.disable_jit():
    found = answer()
  assert found[0] == expected[0]
  np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
  np.testing.assert_allclose(found[2], expected[2], atol=1e-5)


def test_what_is_written_is_joined_and_padded(make, on_tpu):
  on_tpu()
  reader, _ = read_in_turn(make(**LLAMA))
  pool = reader._pools[0]
  assert pool.shape == (20, PAGE, 4, 128)
  assert page_bytes(reader.config, joined=True) == pool[0].nbytes
  written = np.asarray(pool.reshape(20 * PAGE, -1) != 0).any(1)
  assert written.sum() == 18 + 8 + 32
  assert not np.asarray(pool[..., reader.config.head_dim :]).any()
  # Beside each other, keys and values take what they hold.
  values = PAGE * 2 * reader.config.head_dim
  assert page_bytes(reader.config, joined=False) == 2 * values * 4


@pytest.mark.parametrize(
  "changes",
  [
    {"attention.sinks": True},
    {"position.kind": "alibi"},
    {"position.kind": "t5", "position.t5_buckets": 8},
    {"visibility": "prefix"},
    {"encoder_layers": 1},
    # Two heads, or eight, fill the sublanes of a register; twelve do not.
    {"num_heads": 6, "num_kv_heads": 6, "head_dim": 4},
  ],
  ids=str,
)
def test_what_the_kernel_cannot_do_stays_with_xla(make, on_tpu, changes):
  on_tpu()
  assert tpu.joins_pages(make(**LLAMA))
  model = make(**LLAMA | changes)
  assert not tpu.joins_pages(model)
  if "encoder_layers" not in changes:
    reader = Reader(model, rows=1, length=LENGTH, pages=5)
    model = reader.form.model(reader.arrays)
    assert not [m for _, m in nnx.iter_modules(model) if type(m) is tpu.RaggedAttention]


def test_adapters_with_keys_of_their_own_stay_with_xla(make, on_tpu):
  on_tpu()
  model = make(**LLAMA)

  class WithKeys(Attention):
    def __init__(self):
      pass

  model.extra = WithKeys()
  assert not tpu.joins_pages(model)


def test_elsewhere_nothing_is_joined(make):
  assert not tpu.joins_pages(make(**LLAMA))
