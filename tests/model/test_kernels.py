"""The kernels against the attention that is written out. Splash runs in interpret mode."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax._src.cudnn.fused_attention_stablehlo import MaskType

from gptjax import tree
from gptjax.data.batch import Batch
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.model import kernels
from gptjax.model.attention import attend, choose_kernel, make_mask
from gptjax.model.gpt import GPT, describe_parameters, model_graph
from gptjax.objectives.forward import token_loss

ONE = dict.fromkeys(sharding.MESH_AXES, 1)
B, T, N = 2, 384, 4
# Documents of a packed row; what follows them is padding. Edges lie within and on those of blocks.
LENGTHS = ((100, 156, 90), (1, 300))
# A document's softmax and gradients sum up to 300 products, a row's without documents up to 384:
# 384 roundings of 2^-24, if all of them err to one side, are 2.3e-5 of the largest element.
TOLERANCE = 2.5e-5


def make_segments(lengths=LENGTHS, length=T):
  """(segment ids, positions), each [B, T]; padding has the id 0."""
  segments, positions = np.zeros((2, len(lengths), length), np.int32)
  for row, documents in enumerate(lengths):
    start = 0
    for i, size in enumerate(documents):
      segments[row, start : start + size] = i + 1
      positions[row, start : start + size] = np.arange(size)
      start += size
  return segments, positions


def make_heads(head_dim, kv_heads, length=T):
  """Queries, keys, values, and what the attended values are weighed with."""
  rng = np.random.default_rng(0)
  return [
    rng.normal(size=(B, length, heads, head_dim)).astype(np.float32)
    for heads in (N, kv_heads, kv_heads, N)
  ]


def attended_and_gradients(kernel, arrays, segments, positions, window, cap):
  """Attended values, and the gradients of their product with the last of `arrays`.

  In `sharding.time_order`, there and back. Padding counts for nothing: in it the kernels differ.
  """
  order = sharding.time_order(positions.shape[1])
  order = np.arange(positions.shape[1]) if order is None else order
  valid = np.ones_like(positions) if segments is None else segments > 0
  arrays = [array[:, order] for array in arrays]
  ids, positions, valid = (
    None if x is None else jnp.asarray(x[:, order]) for x in (segments, positions, valid)
  )

  @jax.jit
  def run(q, k, v, cotangent):
    q, k, v = (sharding.constrain(x, "batch", "time", "heads", None) for x in (q, k, v))
    mask = make_mask(kernel, positions, positions, window, ids)
    attended, pull = jax.vjp(lambda *qkv: attend(*qkv, mask, cap=cap), q, k, v)
    weight = valid[..., None, None].astype(jnp.float32)
    return attended * weight, *pull(cotangent * weight)

  back = np.argsort(order)
  return [np.asarray(array)[:, back] for array in run(*arrays)]


def assert_close(actual, expected, tolerance=TOLERANCE):
  """Within a part of the largest element of each array."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    b = np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 128, so that a row of 384 has 3 by 3 of them."""
  monkeypatch.setattr(kernels, "MAX_BLOCK", 128)


# --- Splash is the attention that is written out -----------------------------------------------

CASES = {
  "causal": {},
  "window": {"window": 150},
  "narrow-window": {"window": 2},
  "segments": {"packed": True},
  "grouped": {"kv_heads": 2},
  "one-key-head": {"kv_heads": 1},
  "soft-cap": {"cap": 0.5},
  "head-of-32": {"head_dim": 32},
  "head-of-128": {"head_dim": 128},
  "all": {"window": 150, "packed": True, "kv_heads": 2, "cap": 0.5, "head_dim": 32},
}


ALSO_FAST = [("causal", "one pass"), ("grouped", "one pass"), ("narrow-window", "one pass")]


@pytest.mark.parametrize(
  ("case", "backward"),
  [
    pytest.param(
      case,
      backward,
      id=f"{name}-{backward}",
      # The case of all features at once is fast.
      marks=[] if name == "all" or (name, backward) in ALSO_FAST else [pytest.mark.slow],
    )
    for backward in ("one pass", "two kernels")
    for name, case in CASES.items()
  ],
)
def test_splash_is_the_attention_that_is_written_out(monkeypatch, small_blocks, case, backward):
  monkeypatch.setattr(kernels, "MAX_PARTIAL_GRADIENTS", 3 if backward == "one pass" else 2)
  options = {"window": None, "packed": False, "kv_heads": N, "cap": 0.0, "head_dim": 64} | case
  arrays = make_heads(options["head_dim"], options["kv_heads"])
  segments, positions = make_segments() if options["packed"] else (None, np.tile(range(T), (B, 1)))
  masked = (arrays, segments, positions, options["window"], options["cap"])
  assert_close(attended_and_gradients("splash", *masked), attended_and_gradients("xla", *masked))


@pytest.mark.parametrize("length", [256, 512])  # a block of queries over two chunks, or in one
@pytest.mark.parametrize(
  "sizes",
  [{"tensor": 2, "context": 2}, {"data": 2, "context": 2}, {"fsdp": 2, "tensor": 2}],
  ids=str,
)
def test_splash_on_a_mesh_is_that_on_one_device(small_blocks, sizes, length):
  segments, positions = make_segments(((100, 56, 90), (1, 230)), length)
  masked = (make_heads(32, 2, length), segments, positions, 150, 0.5)
  expected = attended_and_gradients("xla", *masked)
  with jax.set_mesh(sharding.make_mesh(ONE | sizes)):
    actual = attended_and_gradients("splash", *masked)
  assert_close(actual, expected)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("backward", ["one pass", "two kernels"])
def test_splash_lowers_to_kernels_of_a_tpu(monkeypatch, small_blocks, head_dim, backward):
  monkeypatch.setattr(kernels, "MAX_PARTIAL_GRADIENTS", 3 if backward == "one pass" else 2)
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in make_heads(head_dim, 2))
  segments = jnp.asarray(make_segments()[0])

  def loss(q, k, v):
    mask = make_mask("splash", segments, segments, 150, segments)
    return attend(q, k, v, mask, cap=0.5).astype(jnp.float32).sum()

  lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("tpu",))
  kernel_calls = lowered.as_text().count("@tpu_custom_call")
  assert kernel_calls == (2 if backward == "one pass" else 3)


@pytest.mark.parametrize(
  ("length", "side"), [(128, 128), (384, 384), (1024, 1024), (1152, 384), (2048, 1024)]
)
def test_a_block_is_the_largest_that_divides_the_row(length, side):
  assert kernels.block_size(length) == side


# --- cuDNN is given documents, not a mask ------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
  """A GPU that cuDNN's packed layout runs on, as far as tracing goes."""
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  monkeypatch.setattr(fused_attention, "check_cudnn_version", lambda: 9_10_00)
  monkeypatch.setattr(fused_attention, "check_compute_capability", lambda capability: True)


@pytest.mark.parametrize("kv_heads", [2, N])
@pytest.mark.parametrize("window", [None, 150])
def test_cudnn_of_packed_rows_makes_no_mask(hopper, kv_heads, window):
  length = 2048
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  q, k = shape((B, length, N, 64)), shape((B, length, kv_heads, 64))
  rows = jax.ShapeDtypeStruct((B, length), jnp.int32)

  def loss(q, k, v, positions, segments):
    mask = make_mask("cudnn", positions, positions, window, segments)
    return attend(q, k, v, mask).astype(jnp.float32).sum()

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, rows, rows)
  program = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert f"{length}x{length}x" not in program
  assert re.findall(r"@(__cudnn\$\w+)", program) == [
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaSoftmaxBackward",
  ]
  assert program.count("PADDING_CAUSAL") == 2


def attend_documents(
  q, k, v, q_seqlen=None, kv_seqlen=None, q_offsets=None, kv_offsets=None, **options
):
  """Attention as the documentation of JAX's cuDNN module describes it, document by document.

  Outside of all documents the result is undefined: here it is not a number.
  """
  assert q.dtype == k.dtype == v.dtype
  B, T, N, _ = q.shape
  packed = q_offsets is not None
  assert not packed or q.shape == k.shape  # JAX counts the offsets of keys in heads of queries
  starts_BM1 = q_offsets[:, :-1, None] if packed else jnp.zeros((B, 1, 1), jnp.int32)
  ends_BM1 = starts_BM1 + (q_seqlen[..., None] if packed else T)
  at_11T = jnp.arange(T)[None, None]
  is_in_BMT = (at_11T >= starts_BM1) & (at_11T < ends_BM1) & (starts_BM1 >= 0)
  seen_BTT = (is_in_BMT[:, :, :, None] & is_in_BMT[:, :, None, :]).any(1)
  distance_1TT = at_11T.swapaxes(1, 2) - at_11T
  if options["mask_type"] in (MaskType.CAUSAL, MaskType.PADDING_CAUSAL):
    seen_BTT &= distance_1TT >= 0
  if options["sliding_window_length"] is not None:
    seen_BTT &= distance_1TT < options["sliding_window_length"]
  k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
  logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * options["scale"]
  weights = jax.nn.softmax(jnp.where(seen_BTT[:, None], logits, -1e30), axis=-1)
  defined = is_in_BMT.any(1)[..., None, None]
  return jnp.where(defined, jnp.einsum("BNTS,BSNH->BTNH", weights, v), jnp.nan)


CUDNN_CASES = {
  "causal": {},
  "window": {"window": 150},
  "segments": {"packed": True},
  "segments-grouped": {"packed": True, "kv_heads": 2},
  "segments-window": {"packed": True, "window": 50},
  "more-segments-than-room": {"packed": True, "room": 2},
  "a-gpu-before-hopper": {"packed": True, "capable": False},
  "mesh": {"packed": True, "kv_heads": 2, "mesh": {"data": 2, "tensor": 2}},
  "context": {"packed": True, "kv_heads": 2, "window": 150, "mesh": {"context": 2, "tensor": 2}},
  "context-without-segments": {"mesh": {"context": 2, "data": 2}},
}


@pytest.mark.parametrize("case", CUDNN_CASES.values(), ids=CUDNN_CASES)
def test_cudnn_is_asked_for_the_attention_that_is_written_out(hopper, monkeypatch, case):
  defaults = {
    "window": None,
    "packed": False,
    "kv_heads": N,
    "room": 32,
    "capable": True,
    "mesh": {},
  }
  options = defaults | case
  monkeypatch.setattr(fused_attention, "dot_product_attention", attend_documents)
  monkeypatch.setattr(fused_attention, "check_compute_capability", lambda _: options["capable"])
  monkeypatch.setattr(kernels, "MAX_DOCUMENTS", options["room"])
  arrays = make_heads(32, options["kv_heads"])
  segments, positions = make_segments() if options["packed"] else (None, np.tile(range(T), (B, 1)))
  masked = (arrays, segments, positions, options["window"], 0.0)
  expected = attended_and_gradients("xla", *masked)
  if not options["mesh"]:
    assert_close(attended_and_gradients("cudnn", *masked), expected)
    return
  with jax.set_mesh(sharding.make_mesh(ONE | options["mesh"])):
    assert_close(attended_and_gradients("cudnn", *masked), expected)


def test_documents_are_found_by_where_segments_change():
  segments = jnp.array(
    [[1, 1, 2, 2, 2, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6, 0, 0]]
  )
  with mock.patch.object(kernels, "MAX_DOCUMENTS", 4):
    starts, lengths, are_all = kernels.find_documents(segments)
  np.testing.assert_array_equal(starts, [[0, 2, 5, 6, -1], [0, -1, -1, -1, -1], [0, 1, 2, 3, 4]])
  np.testing.assert_array_equal(lengths[:2], [[2, 3, 1, 2], [8, -1, -1, -1]])
  assert not are_all


# --- The whole model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_loss(tiny_config, random_params):
  """Returns a function that makes (loss, gradients) of a packed batch, by the name of a kernel."""
  length = 256
  segments, positions = make_segments(((100, 56, 90), (1, 230)), length)
  rng = np.random.default_rng(0)
  inputs, targets = rng.integers(0, 32, (2, B, length)).astype(np.int32)
  batch = Batch(inputs, targets, (segments > 0).astype(np.float32), segments, positions)

  @functools.cache
  def compute(attention, **mesh):
    config = tiny_config(
      head_dim=32,
      num_kv_heads=2,
      layer_pattern=("full", "local"),
      window=150,
      **{"position.kind": "rope", "attention.soft_cap": 2.0, "attention.kernel": attention},
    )
    graph, parameters = model_graph(config), describe_parameters(config)

    @jax.jit
    def differentiate(params, batch):
      batch = sharding.balance_time(batch)

      def loss(params):
        return token_loss(nnx.merge(graph, params), batch).total

      return jax.value_and_grad(loss)(params)

    if not mesh:
      return jax.device_get(differentiate(random_params(config), batch))
    mesh = sharding.make_mesh(ONE | mesh)
    shardings = sharding.parameter_shardings(parameters, mesh)
    params = tree.map_named(
      lambda name, leaf: jax.device_put(leaf, shardings[name]), random_params(config)
    )
    with jax.set_mesh(mesh):
      return jax.device_get(differentiate(params, sharding.to_global(batch, mesh)))

  return compute


@pytest.mark.parametrize(
  "mesh",
  [
    {},
    pytest.param({"tensor": 2, "context": 2}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "context": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_model_learns_the_same_by_splash(model_loss, small_blocks, mesh):
  assert_close(model_loss("splash", **mesh), model_loss("xla"))


@pytest.mark.slow
def test_what_remat_keeps_of_splash_is_not_computed_again(tiny_config):
  def exponentials(remat):
    # Of these layers only attention has any.
    choices = {
      "num_layers": 1,
      "position.kind": "rope",
      "mlp.activation": "relu",
      "execution.scan_layers": True,
    }
    config = tiny_config(**choices, **{"attention.kernel": "splash", "execution.remat": remat})
    graph = model_graph(config)
    params = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(GPT(config, nnx.Rngs(0)))))
    tokens = jnp.zeros((B, 128), jnp.int32)

    def loss(params):
      return nnx.merge(graph, params).hidden(tokens)[0].sum()

    return jax.jit(jax.grad(loss)).lower(params).compile().as_text().count(" exponential(")

  with jax.set_mesh(sharding.make_mesh(ONE | {"data": 2, "tensor": 2})):
    counts = {remat: exponentials(remat) for remat in ("none", "save_attention", "full")}
  assert counts["none"] == counts["save_attention"] < counts["full"]


# --- Which kernel ------------------------------------------------------------------------------


def choose(config, length=256, *, cached=False, training=True):
  return choose_kernel(config, length, cached=cached, training=training)


@pytest.mark.parametrize(
  ("platform", "own"), [("cpu", "xla"), ("tpu", "splash"), ("gpu", "cudnn"), ("other", "xla")]
)
def test_auto_is_the_kernel_of_the_platform(tiny_config, monkeypatch, platform, own):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  assert choose(tiny_config(dtype="bfloat16", head_dim=8)) == own


# What no kernel but 'xla' can do, and whose it is.
OBSTACLES = [
  ("splash", {"dropout.attention": 0.1}, 256, "attention dropout"),
  ("splash", {"position.kind": "alibi"}, 256, "position.kind='alibi', a bias"),
  ("splash", {"position.kind": "t5"}, 256, "position.kind='t5', a bias"),
  ("splash", {}, 200, "a row of 200: not a multiple of 128"),
  ("cudnn", {"dropout.attention": 0.1}, 256, "attention dropout"),
  ("cudnn", {"position.kind": "alibi"}, 256, "position.kind='alibi', a bias"),
  ("cudnn", {"position.kind": "t5"}, 256, "position.kind='t5', a bias"),
  ("cudnn", {"visibility": "prefix"}, 256, "visibility='prefix'"),
  ("cudnn", {"attention.soft_cap": 1.0}, 256, "attention.soft_cap"),
  ("cudnn", {"dtype": "float32"}, 256, "dtype='float32': it needs bfloat16"),
  ("cudnn", {"head_dim": 4}, 256, "head_dim=4: not a multiple of 8"),
  ("cudnn", {}, 255, "a row of 255: odd"),
]


@pytest.mark.parametrize(("kernel", "changes", "length", "obstacle"), OBSTACLES)
def test_what_a_kernel_cannot_do_is_refused_or_left_to_xla(
  tiny_config, monkeypatch, kernel, changes, length, obstacle
):
  changes = {"dtype": "bfloat16", "head_dim": 8} | changes
  with pytest.raises(UserError) as error:
    choose(tiny_config(**changes, **{"attention.kernel": kernel}), length)
  assert str(error.value) == (
    f"model.attention.kernel={kernel!r} cannot do {obstacle}. Set model.attention.kernel=xla."
  )
  monkeypatch.setattr(sharding, "platform", lambda: {"splash": "tpu", "cudnn": "gpu"}[kernel])
  assert choose(tiny_config(**changes), length) == "xla"
  assert choose(tiny_config(**changes, **{"attention.kernel": "xla"}), length) == "xla"


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_does_the_rest(tiny_config, kernel):
  config = tiny_config(
    dtype="bfloat16", head_dim=8, **{"attention.kernel": kernel, "dropout.attention": 0.1}
  )
  assert choose(config, training=False) == kernel  # dropout is of training alone
  assert choose(config, 1, cached=True) == "xla"  # a cache is not in the order of its positions


def test_a_row_is_counted_on_each_device(tiny_config):
  config = tiny_config(**{"attention.kernel": "splash"})
  with jax.set_mesh(sharding.make_mesh(ONE | {"context": 4})):
    assert choose(config, 512) == "splash"
    with pytest.raises(UserError, match="a row of 640: not a multiple of 512"):
      choose(config, 640)
