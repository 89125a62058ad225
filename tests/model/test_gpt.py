import copy
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, count_parameters, describe_parameters, model_graph
from gptjax.model.stats import ActivationStats

CHOICES = {name: typing.get_args(kind) for name, kind in ModelConfig.kinds().items()}
POSITIONS = CHOICES["position.kind"]
T = 8
TOKENS = np.random.default_rng(0).integers(0, 32, (2, T))


def assert_trees_close(actual, expected, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def loss_and_gradients(config):
  graph = model_graph(config)

  def loss(params, key=None):
    logits = nnx.merge(graph, params)(TOKENS, key=key)
    return jnp.square(jax.nn.log_softmax(logits)).mean()

  return jax.jit(jax.value_and_grad(loss))


# --- Who sees whom -----------------------------------------------------------------------------


def make_influence(config, **kwargs):
  """jit(params) -> [T, T]: the gradient of logits[t] with respect to the embedding of token s."""
  graph = model_graph(config)
  tokens = jnp.arange(T)[None]  # so that row s of the table is the embedding of token s

  def gradient(t, table, params):
    def logit(table):
      model = nnx.merge(graph, params | {"embed": {"embedding": table}})
      return model(tokens, **kwargs)[0, t] @ jnp.arange(1.0, 1 + config.vocab_size)

    return jnp.abs(jax.grad(logit)(table)[:T]).max(-1)

  def influence(params):
    table = params["embed"]["embedding"]
    return jax.vmap(gradient, in_axes=(0, None, None))(jnp.arange(T), table, params)

  return jax.jit(influence)


CHOICE_NAMES = ("position.kind", "norm.kind", "norm.placement", "mlp.activation")
# Every choice at least once.
COMBINATIONS = (
  ("learned", "layernorm", "pre", "gelu_tanh"),
  ("learned", "layernorm", "post", "gelu"),
  ("rope", "rmsnorm", "pre", "swiglu"),
  ("alibi", "rmsnorm", "post", "geglu"),
  ("t5", "rmsnorm", "pre", "relu"),
  ("none", "layernorm", "pre", "relu2"),
  ("rope", "rmsnorm", "both", "swiglu_clamped"),
  ("learned", "layernorm", "pre", "silu"),
  ("rope", "rmsnorm", "after", "quick_gelu"),
)


@pytest.mark.parametrize("choices", COMBINATIONS, ids="-".join)
def test_a_token_depends_on_its_past_and_on_nothing_else(tiny_config, random_params, choices):
  # Not tied: through a tied head every logit would depend on every embedding.
  named = dict(zip(CHOICE_NAMES, choices, strict=True))
  config = tiny_config(num_layers=1, **named, **{"head.tied": False})
  influence = np.asarray(make_influence(config)(random_params(config)))
  past = np.tri(T, dtype=bool)
  assert (influence[~past] == 0).all()
  assert (influence[past] > 1e-4).all()


def test_a_bidirectional_model_sees_all_and_a_prefix_model_its_prefix(tiny_config, random_params):
  config = tiny_config(num_layers=1, visibility="bidirectional", **{"head.tied": False})
  assert (np.asarray(make_influence(config)(random_params(config))) > 1e-4).all()

  config = tiny_config(num_layers=1, visibility="prefix", **{"head.tied": False})
  prefix = np.array([[1, 1, 1, 0, 0, 0, 0, 0]])
  influence = np.asarray(make_influence(config, prefix_BS=prefix)(random_params(config)))
  seen = np.tri(T, dtype=bool) | (prefix > 0)
  np.testing.assert_array_equal(influence > 1e-4, seen)


def test_every_choice_is_among_the_combinations():
  for name, tried in zip(CHOICE_NAMES, zip(*COMBINATIONS, strict=True), strict=True):
    assert set(tried) == set(CHOICES[name])


def test_each_layer_of_the_pattern_sees_exactly_its_window(tiny_config, random_params):
  config = tiny_config(
    num_layers=4,
    layer_pattern=("full", "local"),
    window=3,
    **{"position.kind": "alibi", "head.tied": False},
  )
  influence = make_influence(config)
  distance = np.arange(T)[:, None] - np.arange(T)
  for layer in range(4):
    # With the attention of the other layers silenced, what a token sees it sees in this one.
    params = copy.deepcopy(random_params(config))
    out = params["blocks"]["attention"]["out"]
    out["kernel"] *= (np.arange(4) == layer).reshape(4, 1, 1, 1)
    seen = np.asarray(influence(params)) != 0
    np.testing.assert_array_equal(seen, (distance >= 0) & (distance < (3 if layer % 2 else T)))


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_documents_do_not_see_each_other(tiny_config, random_params, make_forward, position):
  pattern = {"layer_pattern": ("full", "local"), "window": 3}
  config = tiny_config(**pattern, **{"position.kind": position})
  params, forward = random_params(config), make_forward(config)
  packed = {
    "segment_ids_BT": np.array([[1, 1, 1, 2, 2, 2, 2, 0]]),
    "positions_BT": np.array([[0, 1, 2, 0, 1, 2, 3, 0]]),
  }
  tokens = TOKENS[:1].copy()
  logits = forward(params, tokens, **packed)
  changed = tokens.copy()
  changed[:, [0, 2, 7]] ^= 1  # the first document and the padding
  np.testing.assert_array_equal(forward(params, changed, **packed)[0, 3:7], logits[0, 3:7])
  assert (forward(params, changed, **packed)[0, :3] != logits[0, :3]).any(-1).all()
  alone = forward(params, np.roll(tokens, -3, axis=1))  # document 2 at the start of the row
  np.testing.assert_allclose(alone[0, :4], logits[0, 3:7], atol=1e-5)


def test_layers_that_do_not_rotate_do_not_know_how_far_a_token_is(
  tiny_config, random_params, make_forward
):
  apart = np.array([[0, 1, 2, 3, 10, 11, 12, 13]])
  for kind, differs in (("full", True), ("nope", False)):
    config = tiny_config(num_layers=1, layer_pattern=(kind,), **{"position.kind": "rope"})
    params, forward = random_params(config), make_forward(config)
    near, far = (forward(params, TOKENS[:1], positions_BT=x) for x in (np.arange(8)[None], apart))
    assert (np.abs(near - far).max() > 1e-2) == differs, kind


def test_a_cache_changes_nothing(tiny_config, random_params, make_forward):
  config = tiny_config(
    layer_pattern=("full", "nope"),
    num_kv_heads=2,
    **{
      "position.kind": "rope",
      "norm.kind": "rmsnorm",
      "norm.placement": "after",
      "attention.qk_norm": True,
      "attention.qk_norm_per_head": False,
      "residual.scale": 0.5,
    },
  )
  params = random_params(config)
  expected = make_forward(config)(params, TOKENS)
  model = nnx.merge(model_graph(config), params)

  @jax.jit
  def go_on(tokens, positions, cache):
    hidden, cache = model.hidden(tokens, positions_BT=positions, cache=cache)
    return model.logits(hidden), cache

  cache, logits = model.empty_cache(2, T), []
  for start, stop in ((0, 5), (5, 6), (6, T)):
    positions = np.tile(np.arange(start, stop), (2, 1))
    part, cache = go_on(TOKENS[:, start:stop], positions, cache)
    logits.append(part)
  np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=1e-5)


# --- Execution does not change the result ------------------------------------------------------


@pytest.mark.parametrize(
  "shape",
  [
    {"num_layers": 2},
    # With dropout, so that the layers have to get the same keys too.
    pytest.param(
      {"num_layers": 4, "layer_pattern": ("full", "local"), "window": 2, "dropout.residual": 0.2},
      marks=pytest.mark.slow,
    ),
    {"num_layers": 2, "residual.values": True, "residual.embedding": True},
  ],
  ids=["period1", "period2", "mixtures"],
)
def test_scanned_layers_are_the_layers_in_a_loop(tiny_config, random_params, shape):
  configs = [tiny_config(**shape, **{"execution.scan_layers": scan}) for scan in (False, True)]
  params = random_params(configs[0])
  key = jax.random.key(0) if configs[0].dropout else None
  loop, scan = (loss_and_gradients(config)(params, key) for config in configs)
  assert_trees_close(scan, loop, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def without_remat(tiny_config, random_params):
  config = tiny_config(**{"execution.scan_layers": False})
  return loss_and_gradients(config)(random_params(config))


@pytest.mark.parametrize(
  ("remat", "scan_layers"),
  [
    ("full", False),
    ("save_attention", True),
    pytest.param("save_attention", False, marks=pytest.mark.slow),
    pytest.param("save_qkv", False, marks=pytest.mark.slow),
    pytest.param("dots", False, marks=pytest.mark.slow),
    ("offload", True),
  ],
)
def test_remat_changes_neither_loss_nor_gradient(
  tiny_config, random_params, without_remat, remat, scan_layers
):
  if remat == "offload":
    memories = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    if "pinned_host" not in memories:
      pytest.skip(f"no pinned_host among the memories of the device: {sorted(memories)}")
  config = tiny_config(**{"execution.remat": remat, "execution.scan_layers": scan_layers})
  remade = loss_and_gradients(config)(random_params(config))
  assert_trees_close(remade, without_remat, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_keeps_less_for_the_backward_pass(tiny_config, scan_layers):
  def bytes_kept(remat):
    config = tiny_config(**{"execution.remat": remat, "execution.scan_layers": scan_layers})
    model = nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0)))
    graph, params = nnx.split(model)

    def forward(params):
      return jax.vjp(lambda params: nnx.merge(graph, params)(TOKENS), nnx.to_pure_dict(params))[1]

    return sum(
      leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(forward, params))
    )

  kept = [bytes_kept(remat) for remat in ("none", "dots", "save_qkv", "save_attention", "full")]
  assert kept == sorted(set(kept), reverse=True), kept


def test_offload_keeps_in_the_memory_of_the_host_what_dots_keeps(tiny_config):
  def sizes(remat):
    """(bytes kept, of which in the host's memory) of the residuals of the backward pass."""
    config = tiny_config(**{"execution.remat": remat, "execution.scan_layers": True})
    graph, params = nnx.split(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))

    def forward(params):
      return jax.vjp(lambda params: nnx.merge(graph, params)(TOKENS), params)[1]

    kept = jax.tree.leaves(jax.make_jaxpr(forward)(nnx.to_pure_dict(params)).out_avals)
    on_host = [leaf for leaf in kept if leaf.memory_space == jax.memory.Space.Host]
    return tuple(sum(x.size * x.dtype.itemsize for x in leaves) for leaves in (kept, on_host))

  wide = 2 * TOKENS.size * 32 * 4  # of two layers, float32
  assert sizes("dots")[1] == 0
  assert sizes("offload") == (sizes("dots")[0], wide)


# --- What a forward pass tells of itself ---------------------------------------------------------

PACKED = {
  "segment_ids_BT": np.array([[1, 1, 1, 2, 2, 2, 2, 2]] * 2),
  "positions_BT": np.array([[0, 1, 2, 0, 1, 2, 3, 4]] * 2),
}


def make_observed(config, whole=False):
  """jit(params) -> (hidden states, stats), beside a gradient as in training."""
  graph = model_graph(config)

  def loss(params):
    stats = ActivationStats(whole)
    hidden, _ = nnx.merge(graph, params).hidden(TOKENS, stats=stats, **PACKED)
    return jnp.square(hidden).mean(), (hidden, dict(stats))

  return jax.jit(lambda params: jax.grad(loss, has_aux=True)(params)[1])


def test_the_branches_add_up_to_the_residual_stream(tiny_config, random_params):
  base = {"transfer.base_embed_dim": 16, "transfer.base_num_layers": 2}
  config = tiny_config(num_layers=4, **base, **{"transfer.parametrization": "completep"})
  params = random_params(config)
  hidden, whole = make_observed(config, whole=True)(params)
  assert {name: x.shape for name, x in whole.items() if x.ndim > 1} == dict.fromkeys(
    ("attention", "mlp", "residual"), (4, 2, T, 16)
  )
  added = whole["residual"][1:] - whole["residual"][:-1]
  np.testing.assert_allclose(added, (whole["attention"] + whole["mlp"])[1:], atol=1e-5)
  model = nnx.merge(model_graph(config), params)
  np.testing.assert_allclose(model.final_norm(whole["residual"][-1]), hidden, atol=1e-5)
  _, stats = make_observed(config)(params)
  for name in ("attention", "mlp", "residual"):
    expected = np.sqrt(np.square(whole[name]).mean((1, 2, 3)))
    np.testing.assert_allclose(stats[f"{name}_rms"], expected, rtol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [{}, {"attention.qk_norm": True, "num_kv_heads": 2}],
  ids=["plain", "qk_norm"],
)
def test_the_largest_logit_is_of_the_queries_and_keys_of_the_layer(
  tiny_config, random_params, changes
):
  config = tiny_config(num_layers=1, **changes)
  params = random_params(config)
  model = nnx.merge(model_graph(config), params)
  model.unstack()
  block = model.blocks[0]
  x_BTD = block.attention_norm(model.embed(TOKENS) + model.position(PACKED["positions_BT"]))
  q_BTNH, k_BTKH = block.attention.query(x_BTD), block.attention.key(x_BTD)
  if config.attention.qk_norm:
    q_BTNH, k_BTKH = block.attention.query_norm(q_BTNH), block.attention.key_norm(k_BTKH)
  k_BTNH = np.repeat(k_BTKH, config.num_heads // config.num_kv_heads, axis=2)
  logits = np.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) / np.sqrt(config.head_dim)
  same = PACKED["segment_ids_BT"][:, :, None] == PACKED["segment_ids_BT"][:, None, :]
  seen = np.broadcast_to((np.tri(T, dtype=bool) & same)[:, None], logits.shape)
  figure = make_observed(config)(params)[1]["largest_logit"]
  np.testing.assert_allclose(figure, [logits[seen].max()], rtol=1e-4)


PATTERN = {
  "num_layers": 4,
  "layer_pattern": ("full", "local"),
  "window": 2,
  "position.kind": "rope",
}


@pytest.mark.parametrize(
  ("scan_layers", "remat"),
  [(True, "none"), (True, "dots"), (False, "full")],
)
def test_figures_do_not_depend_on_execution(tiny_config, random_params, scan_layers, remat):
  plain = tiny_config(**PATTERN, **{"execution.scan_layers": False})
  params = random_params(plain)
  _, expected = make_observed(plain)(params)
  assert {name: x.shape for name, x in expected.items()} == dict.fromkeys(
    ("attention_rms", "mlp_rms", "residual_rms", "largest_logit"), (4,)
  )
  assert len({float(x) for x in expected["largest_logit"]}) == 4
  config = tiny_config(
    **PATTERN, **{"execution.scan_layers": scan_layers, "execution.remat": remat}
  )
  assert_trees_close(make_observed(config)(params)[1], expected, rtol=1e-4)


def test_nothing_is_told_when_nobody_asks(tiny_config, random_params, monkeypatch):
  def refuse(*_, **__):
    raise AssertionError

  monkeypatch.setattr("gptjax.model.stats.root_mean_square", refuse)
  monkeypatch.setattr("gptjax.model.attention.largest_logit", refuse)
  config = tiny_config(**{"execution.scan_layers": True})
  loss_and_gradients(config).trace(random_params(config))
  with pytest.raises(AssertionError):
    make_observed(config).trace(random_params(config))


def test_unstacked_layers_compute_the_same(tiny_config, random_params):
  config = tiny_config(layer_pattern=("full", "local"), window=2, **{"position.kind": "rope"})
  model = nnx.merge(model_graph(config), random_params(config))
  expected = jax.jit(lambda model: model.hidden(TOKENS, cache=model.empty_cache(2, T))[0])(model)
  model.unstack()
  assert len(model.blocks) == 2
  actual = jax.jit(lambda model: model.hidden(TOKENS, cache=model.empty_cache(2, T))[0])(model)
  np.testing.assert_array_equal(actual, expected)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(tiny_config, random_params, make_forward):
  choices = {"norm.kind": "rmsnorm", "position.kind": "rope", "mlp.activation": "swiglu"}
  config = tiny_config(dtype="bfloat16", **choices)
  abstract = nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0)))
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))}
  assert dtypes == {jnp.dtype("float32")}
  hidden, _ = nnx.eval_shape(lambda model: model.hidden(TOKENS), abstract)
  assert hidden.dtype == jnp.bfloat16
  cache = nnx.eval_shape(lambda model: model.empty_cache(1, 4), abstract)
  assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}

  params = random_params(config)
  gradients = jax.eval_shape(loss_and_gradients(config), params)[1]
  assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
  logits = make_forward(config)(params, TOKENS)
  assert logits.dtype == jnp.float32
  expected = make_forward(tiny_config(**choices))(params, TOKENS)
  difference = np.abs(logits - expected).max()
  assert 1e-5 < difference < 0.05 * np.abs(expected).max()


# --- Architecture ------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_are_all_heads_with_repeated_keys_and_values(
  tiny_config, random_params, make_forward, kv_heads
):
  grouped, full = (tiny_config(num_kv_heads=n, **{"position.kind": "rope"}) for n in (kv_heads, 4))
  params = random_params(grouped)
  repeated = copy.deepcopy(params)
  for name in ("key", "value"):
    for leaf, axis in (("kernel", -2), ("bias", -2)):
      value = params["blocks"]["attention"][name][leaf]
      repeated["blocks"]["attention"][name][leaf] = np.repeat(value, 4 // kv_heads, axis)
  expected = make_forward(full)(repeated, TOKENS)
  np.testing.assert_allclose(make_forward(grouped)(params, TOKENS), expected, atol=1e-5)


def test_query_and_key_norm_make_the_scale_of_their_kernels_irrelevant(
  tiny_config, random_params, make_forward
):
  for qk_norm in (True, False):
    config = tiny_config(bias=False, **{"attention.qk_norm": qk_norm})
    params, forward = random_params(config), make_forward(config)
    scaled = copy.deepcopy(params)
    for name in ("query", "key"):
      scaled["blocks"]["attention"][name]["kernel"] *= 100
    difference = np.abs(forward(scaled, TOKENS) - forward(params, TOKENS)).max()
    assert difference < 1e-2 if qk_norm else difference > 0.1


def test_soft_caps_bound_the_logits_and_reach_attention(tiny_config, random_params, make_forward):
  def logits(**caps):
    config = tiny_config(**caps, **{"head.tied": False})
    params = copy.deepcopy(random_params(config))
    params["head"]["kernel"] *= 100
    return np.asarray(make_forward(config)(params, TOKENS))

  free, capped = logits(), logits(**{"head.soft_cap": 3.0})
  assert np.abs(free).max() > 30
  assert np.abs(capped).max() <= 3
  np.testing.assert_allclose(capped, 3 * np.tanh(free / 3), atol=1e-4)
  assert np.abs(logits(**{"attention.soft_cap": 0.1}) - free).max() > 1


def test_a_tied_head_is_the_embedding(tiny_config, random_params, make_forward):
  tied, untied = tiny_config(), tiny_config(**{"head.tied": False})
  params = random_params(tied)
  assert "head" not in params
  assert count_parameters(untied) - count_parameters(tied) == 32 * 16
  with_head = params | {"head": {"kernel": params["embed"]["embedding"].T}}
  expected = make_forward(untied)(with_head, TOKENS)
  np.testing.assert_allclose(make_forward(tied)(params, TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("rate", ["dropout.embed", "dropout.attention", "dropout.residual"])
def test_dropout_needs_a_key_and_is_decided_by_it(tiny_config, random_params, make_forward, rate):
  config = tiny_config(num_layers=1, **{rate: 0.3})
  params, forward = random_params(config), make_forward(config)
  without = make_forward(tiny_config(num_layers=1))(params, TOKENS)
  np.testing.assert_array_equal(forward(params, TOKENS), without)
  draws = [forward(params, TOKENS, key=jax.random.key(seed)) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert (draws[0] != without).any()
  assert (draws[0] != draws[2]).any()


def test_no_rate_is_no_dropout_even_with_a_key(tiny_config, random_params, make_forward):
  config = tiny_config(num_layers=1)
  params, forward = random_params(config), make_forward(config)
  np.testing.assert_array_equal(
    forward(params, TOKENS, key=jax.random.key(0)), forward(params, TOKENS)
  )


def test_post_norm_ends_in_the_norm_of_the_last_layer(tiny_config):
  assert "final_norm/scale" not in describe_parameters(tiny_config(**{"norm.placement": "post"}))
  assert "final_norm/scale" in describe_parameters(tiny_config(**{"norm.placement": "pre"}))


def test_bias_false_leaves_no_bias_anywhere(tiny_config):
  for norm in CHOICES["norm.kind"]:
    names = describe_parameters(tiny_config(bias=False, **{"norm.kind": norm, "head.tied": False}))
    assert not [name for name in names if name.endswith("bias")]
  assert len([n for n in describe_parameters(tiny_config()) if n.endswith("bias")]) == 9


# --- Initialisation ----------------------------------------------------------------------------


def test_initial_values(tiny_config):
  config = tiny_config(
    num_layers=8,
    embed_dim=64,
    mlp_dim=128,
    vocab_size=64,
    **{"position.max_positions": 64, "head.tied": False},
  )
  state = jax.jit(lambda: nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(0)), nnx.Param)))()
  described = describe_parameters(config)
  flat = traverse_util.flatten_dict(state, sep="/")
  assert set(flat) == set(described)
  for name, value in flat.items():
    value = np.asarray(value)
    assert value.shape == described[name].shape
    assert value.dtype == np.float32
    if name.endswith("bias"):
      assert (value == 0).all()
    elif name.endswith("scale"):
      assert (value == 1).all()
    else:
      residual = name in ("blocks/attention/out/kernel", "blocks/mlp/down/kernel")
      std = 0.02 / math.sqrt(2 * 8) if residual else 0.02
      assert value.std() == pytest.approx(std, rel=0.05), name
      assert abs(value.mean()) < 4 * std / math.sqrt(value.size), name
      if name.startswith("blocks"):
        assert len({layer.tobytes() for layer in value}) == 8, f"{name}: equal layers"
  kernels = [v for n, v in flat.items() if n.endswith("kernel")]
  assert len({np.asarray(v).ravel()[:10].tobytes() for v in kernels}) == len(kernels)


def test_mixtures_start_as_the_layers_own_values_and_inputs(tiny_config, random_params):
  plain = tiny_config()
  mixed = tiny_config(**{"residual.values": True, "residual.embedding": True})
  params = random_params(mixed)
  blocks = params["blocks"]
  blocks["embed_mix"]["weights"] = np.array([[1.0, 0.0]] * 2, np.float32)
  blocks["attention"]["value_mix"]["weights"] = np.array([[1.0, 0.0]] * 2, np.float32)
  without = copy.deepcopy(params)
  del without["blocks"]["embed_mix"], without["blocks"]["attention"]["value_mix"]
  logits = jax.jit(lambda p: nnx.merge(model_graph(mixed), p)(TOKENS))(params)
  expected = jax.jit(lambda p: nnx.merge(model_graph(plain), p)(TOKENS))(without)
  np.testing.assert_allclose(logits, expected, atol=1e-6)
  # What they are there for: with the first layer's values alone, its value kernel is the only one.
  blocks["attention"]["value_mix"]["weights"] = np.array([[0.0, 1.0]] * 2, np.float32)
  only_first = jax.jit(lambda p: nnx.merge(model_graph(mixed), p)(TOKENS))
  reached = only_first(params)
  blocks["attention"]["value"]["kernel"] = blocks["attention"]["value"]["kernel"].copy()
  blocks["attention"]["value"]["kernel"][1] = 0
  np.testing.assert_array_equal(only_first(params), reached)
  assert np.abs(reached - logits).max() > 0.1


def test_zero_residual_init_starts_as_the_embedding(tiny_config):
  config = tiny_config(**{"init.residual": "zero", "position.kind": "none"})

  @jax.jit
  def both():
    model = GPT(config, nnx.Rngs(0))
    return model.hidden(TOKENS)[0], model.final_norm(model.embed(TOKENS))

  np.testing.assert_allclose(*both(), atol=1e-6)


def test_the_parametrizations_are_one_at_their_base(tiny_config):
  def logits(**changes):
    config = tiny_config(**changes)
    return jax.jit(lambda: GPT(config, nnx.Rngs(0))(TOKENS))()

  bases = {"transfer.base_embed_dim": 16, "transfer.base_num_layers": 2}
  for parametrization in ("mup", "completep"):
    np.testing.assert_array_equal(
      logits(**bases, **{"transfer.parametrization": parametrization}), logits()
    )


def test_width_and_depth_shrink_what_the_parametrization_says(tiny_config):
  shape = {"num_layers": 8, "embed_dim": 64, "num_heads": 8, "mlp_dim": 128}
  bases = {"transfer.base_embed_dim": 16, "transfer.base_num_layers": 2}
  config = tiny_config(**shape, **bases, **{"transfer.parametrization": "completep"})
  flat = traverse_util.flatten_dict(
    nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(0)), nnx.Param)), sep="/"
  )
  for name, std in {
    "embed/embedding": 0.02,
    "blocks/mlp/up/kernel": 0.02 / math.sqrt(4),
    "blocks/mlp/down/kernel": 0.02 / math.sqrt(4) / math.sqrt(2 * 2),
  }.items():
    assert np.std(flat[name]) == pytest.approx(std, rel=0.05)
  assert (config.width_ratio, config.depth_ratio) == (4, 4)
  with pytest.raises(UserError, match=r"'mup' needs model\.transfer\.base_embed_dim"):
    tiny_config(**{"transfer.parametrization": "mup"})


def test_parameters_are_named_with_their_logical_axes(tiny_config):
  described = describe_parameters(
    tiny_config(num_kv_heads=2, **{"position.kind": "t5", "head.tied": False})
  )
  query = described["blocks/attention/query/kernel"]
  assert query.shape == (2, 16, 4, 4)
  assert query.axes == ("layers", "embed", "heads", "head_dim")
  assert (query.fan_in, query.fan_out) == (16, 16)
  key = described["blocks/attention/key/kernel"]
  assert (key.fan_in, key.fan_out) == (16, 8)
  out = described["blocks/attention/out/kernel"]
  assert out.axes == ("layers", "heads", "head_dim", "embed")
  assert (out.fan_in, out.fan_out) == (16, 16)
  assert (out.fan_in_axes, out.fan_out_axes) == ((1, 2), (3,))
  assert described["blocks/mlp/down/bias"].axes == ("layers", "embed")
  assert described["attention_bias/relative/embedding"].axes == ("buckets", "heads")
  assert described["embed/embedding"].fan_in_axes is None
  assert described["head/kernel"].fan_in_axes == (0,)


# --- Length ------------------------------------------------------------------------------------


def test_learned_positions_refuse_a_longer_row(tiny_config, random_params):
  config = tiny_config(num_layers=1)
  model = nnx.merge(model_graph(config), random_params(config))
  with pytest.raises(UserError, match=r"17 positions do not fit the 16 learned positions.*rope"):
    model(np.zeros((1, 17), np.int32))
  with pytest.raises(UserError, match=r"17 positions do not fit"):
    model.hidden(np.zeros((1, 2), np.int32), cache=model.empty_cache(1, 17))
  assert nnx.eval_shape(lambda: model(np.zeros((1, 16), np.int32))).shape == (1, 16, 32)


@pytest.mark.parametrize("position", [position for position in POSITIONS if position != "learned"])
def test_other_positions_run_on_any_length(tiny_config, random_params, make_forward, position):
  config = tiny_config(
    num_layers=1,
    **{"position.kind": position, "position.max_positions": 4, "position.t5_max_distance": 16},
  )
  params, forward = random_params(config), make_forward(config)
  tokens = np.arange(32)[None]
  logits = forward(params, tokens)
  assert np.isfinite(logits).all()
  # Shifting all positions changes nothing where only distances count, which is everywhere here.
  shifted = forward(params, tokens, positions_BT=1000 + np.arange(32)[None])
  np.testing.assert_allclose(shifted, logits, atol=2e-3)


# --- Decoding with a cache ---------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("position", POSITIONS)
def test_cached_decoding_is_the_uncached_forward_pass(
  tiny_config, random_params, position, kv_heads
):
  choices = {"layer_pattern": ("local", "full"), "window": 3, "attention.qk_norm": True}
  if kv_heads == 2:
    choices |= {"residual.values": True, "residual.embedding": True}
  config = tiny_config(num_kv_heads=kv_heads, **choices, **{"position.kind": position})
  graph = model_graph(config)
  lengths = np.array([2, 5])  # of the prompts; what is read of the first behind 2 is padding
  steps = T - lengths.max()

  @jax.jit
  def compare(params):
    model = nnx.merge(graph, params)
    whole = model(TOKENS)
    hidden, cache = model.hidden(
      TOKENS[:, :5] * (np.arange(5) < lengths[:, None]), cache=model.empty_cache(2, T + 1)
    )

    def step(carry, _):
      cache, now = carry
      token = jnp.take_along_axis(jnp.asarray(TOKENS), now[:, None], axis=1)
      hidden, cache = model.hidden(token, positions_BT=now[:, None], cache=cache)
      return (cache, now + 1), model.logits(hidden)[:, 0]

    _, decoded = jax.lax.scan(step, (cache, jnp.asarray(lengths)), length=steps)
    return whole, model.logits(hidden), decoded

  whole, prefilled, decoded = compare(random_params(config))
  for row, length in enumerate(lengths):
    expected = whole[row, length : length + steps]
    np.testing.assert_allclose(decoded[:, row], expected, atol=1e-5)
    np.testing.assert_allclose(prefilled[row, :length], whole[row, :length], atol=1e-5)
