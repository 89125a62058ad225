import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import tree
from gptjax.errors import UserError
from gptjax.model.gpt import ParameterInfo
from gptjax.optim import optimizer as optim
from gptjax.presets.parts import optim as presets

# A residual network of two stacked layers, that learns which token follows which.
PARAMETERS = {
  "blocks/mlp/down/kernel": ParameterInfo((2, 16, 8), ("layers", "mlp", "embed"), (1,), "hidden"),
  "blocks/mlp/up/bias": ParameterInfo((2, 16), ("layers", "mlp"), None, "bias"),
  "blocks/mlp/up/kernel": ParameterInfo((2, 8, 16), ("layers", "embed", "mlp"), (1,), "hidden"),
  "blocks/norm/scale": ParameterInfo((2, 8), ("layers", "embed"), None, "norm"),
  "embed/embedding": ParameterInfo((16, 8), ("vocab", "embed"), None, "embedding"),
  "head/kernel": ParameterInfo((8, 16), ("embed", "vocab"), (0,), "head"),
}
ALGORITHMS = ("adamw", "adam", "sgd", "lion", "adafactor", "muon", "soap")


def make_params(fill=None):
  rng = np.random.default_rng(0)
  params = {}
  for name, info in PARAMETERS.items():
    node = params
    for part in name.split("/")[:-1]:
      node = node.setdefault(part, {})
    value = rng.normal(size=info.shape) * 0.3 if fill is None else np.full(info.shape, fill)
    node[name.split("/")[-1]] = jnp.asarray(value, jnp.float32)
  return params


def loss_of(params):
  tokens = jnp.arange(16)
  x = params["embed"]["embedding"][tokens]
  for layer in range(2):
    up, down = (params["blocks"]["mlp"][name] for name in ("up", "down"))
    hidden = x * params["blocks"]["norm"]["scale"][layer][None] @ up["kernel"][layer]
    x += jax.nn.relu(hidden + up["bias"][layer][None]) @ down["kernel"][layer]
  logits = x @ params["head"]["kernel"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens * 5 % 16).mean()


def make(name="sgd", learning_rate=1.0, **changes):
  """An optimizer whose update is by default the gradient itself."""
  plain = {"weight_decay": 0.0, "clip_norm": 0.0, "momentum": 0.0, "rules": ((".*", {}),)}
  config = types.SimpleNamespace(**(presets.DEFAULTS | plain | {"name": name} | changes))
  return optim.make_optimizer(config, PARAMETERS, optax.constant_schedule(learning_rate))


def update(optimizer, grads, params, steps=1):
  state = optimizer.init(params)
  for step in range(steps):
    params, state, norm = optimizer.update(grads, state, params, jnp.int32(step))
  return tree.named_leaves(params), norm


def equal(leaves, others):
  return {name for name in leaves if np.array_equal(leaves[name], others[name])}


# --- Algorithms --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns(name):
  # The preset as it is published, at ten times its learning rate for the 20 steps there are.
  config = types.SimpleNamespace(**(presets.DEFAULTS | presets.OPTIMIZERS[name]))
  schedule = optax.constant_schedule(10 * config.learning_rate)
  optimizer = optim.make_optimizer(config, PARAMETERS, schedule)

  @jax.jit
  def step(carry, count):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_of)(params)
    params, state, _ = optimizer.update(grads, state, params, count)
    return (params, state), loss

  params = make_params()
  _, losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(20))
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0] - 0.05


def test_every_preset_is_an_algorithm():
  assert {(presets.DEFAULTS | preset)["name"] for preset in presets.OPTIMIZERS.values()} == {
    *ALGORITHMS
  }


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_adamw_is_optax_adamw(clip_norm):
  ours = make(
    "adamw",
    learning_rate=0.01,
    weight_decay=0.1,
    clip_norm=clip_norm,
    rules=presets.DEFAULTS["rules"],
  )
  theirs = optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.adamw(
      0.01,
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.1,
      mask=lambda params: tree.map_named(lambda n, _: n.endswith(("kernel", "embedding")), params),
    ),
  )
  params = expected = make_params()
  state, their_state = ours.init(params), theirs.init(params)
  gradient, our_update = jax.jit(jax.grad(loss_of)), jax.jit(ours.update)
  their_update = jax.jit(theirs.update)
  for step in range(3):
    params, state, _ = our_update(gradient(params), state, params, step)
    updates, their_state = their_update(gradient(expected), their_state, expected)
    expected = optax.apply_updates(expected, updates)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, expected
  )


def test_sgd_is_heavy_ball_momentum():
  params, grads = make_params(), make_params(fill=2.0)
  leaves, _ = update(make(learning_rate=0.1, momentum=0.5), grads, params, steps=3)
  moved = 0.1 * 2 * (1 + 1.5 + 1.75)
  for name, before in tree.named_leaves(params).items():
    np.testing.assert_allclose(leaves[name], before - moved, rtol=1e-5)


def test_muon_orthogonalises_each_matrix_and_scales_it_like_adam():
  rules = (("bias|norm|embed", {"algorithm": "adamw"}), (".*", {}))
  params = make_params()
  leaves, _ = update(make("muon", rules=rules, momentum=0.95), params, params)
  for name, axis in (("blocks/mlp/up/kernel", 1), ("blocks/mlp/down/kernel", 1)):
    for layer in range(2):
      change = tree.named_leaves(params)[name][layer] - leaves[name][layer]
      singular = np.linalg.svd(change, compute_uv=False)
      # Five Newton-Schulz steps bring them near 1, not onto it.
      assert (singular / (0.2 * np.sqrt(16)) > 0.5).all(), (name, axis)
      assert (singular / (0.2 * np.sqrt(16)) < 1.3).all()


def test_muon_contracts_all_the_input_axes_of_a_kernel():
  info = ParameterInfo((2, 4, 4, 8), ("layers", "heads", "head_dim", "embed"), (1, 2), "hidden")
  config = types.SimpleNamespace(
    **presets.DEFAULTS
    | {"name": "muon", "weight_decay": 0.0, "clip_norm": 0.0, "rules": ((".*", {}),)}
  )
  optimizer = optim.make_optimizer(config, {"out": info}, optax.constant_schedule(1.0))
  params = {"out": jnp.asarray(np.random.default_rng(0).normal(size=info.shape), jnp.float32)}
  leaves, _ = update(optimizer, params, params)
  for layer in range(2):
    change = (params["out"][layer] - leaves["out"][layer]).reshape(16, 8)
    singular = np.linalg.svd(change, compute_uv=False) / (0.2 * np.sqrt(16))
    assert ((singular > 0.5) & (singular < 1.3)).all()


KERNELS = {
  "q": ParameterInfo((2, 128, 4, 64), ("layers", "embed", "heads", "head_dim"), (1,), "hidden"),
  "out": ParameterInfo((2, 4, 64, 128), ("layers", "heads", "head_dim", "embed"), (1, 2), "hidden"),
  "bias": ParameterInfo((2, 128), ("layers", "embed"), None, "bias"),
  "embed": ParameterInfo((256, 128), ("vocab", "embed"), None, "embedding"),
}


def test_adafactor_is_optax_adafactor_on_the_matrices_of_each_layer():
  values = presets.DEFAULTS | presets.OPTIMIZERS["adafactor"] | {"clip_norm": 0.0}
  config = types.SimpleNamespace(**values)
  ours = optim.make_optimizer(config, KERNELS, optax.constant_schedule(0.01))
  theirs = optax.adafactor(0.01, momentum=0.9, multiply_by_parameter_scale=False)
  views = {"q": (2, 128, 256), "out": (2, 256, 128), "bias": (2, 128), "embed": (1, 256, 128)}

  def matrices(params):
    return {name: list(params[name].reshape(shape)) for name, shape in views.items()}

  rng = np.random.default_rng(0)
  params = {name: jnp.zeros(info.shape) for name, info in KERNELS.items()}
  expected = matrices(params)
  state, their_state = ours.init(params), theirs.init(expected)
  for step in range(3):
    grads = {n: jnp.asarray(rng.normal(size=i.shape), jnp.float32) for n, i in KERNELS.items()}
    # The gradients of the second half grow, so that the updates of the second layers are clipped.
    grads = {n: g.at[g.shape[0] // 2 :].multiply(10.0**step) for n, g in grads.items()}
    params, state, _ = ours.update(grads, state, params, jnp.int32(step))
    updates, their_state = theirs.update(matrices(grads), their_state, expected)
    expected = optax.apply_updates(expected, updates)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
      matrices(params),
      expected,
    )


def test_adafactor_keeps_rows_and_columns_of_every_large_matrix():
  config = types.SimpleNamespace(**(presets.DEFAULTS | presets.OPTIMIZERS["adafactor"]))
  optimizer = optim.make_optimizer(config, KERNELS, optax.constant_schedule(0.01))
  params = {name: jnp.zeros(info.shape) for name, info in KERNELS.items()}
  kept = sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(params)))
  momentum = sum(leaf.size for leaf in params.values())
  rows_and_columns = 2 * 2 * (128 + 256) + (128 + 256) + 2 * 128
  assert kept - momentum < rows_and_columns + 20


def test_soap_takes_the_experts_of_a_layer_as_matrices_of_their_own():
  info = ParameterInfo((2, 3, 8, 4), ("layers", "experts", "embed", "mlp"), (2,), "hidden")
  config = types.SimpleNamespace(**(presets.DEFAULTS | {"name": "soap", "weight_decay": 0.0}))
  optimizer = optim.make_optimizer(config, {"experts": info}, optax.constant_schedule(0.01))
  params = {"experts": jnp.asarray(np.random.default_rng(0).normal(size=info.shape), jnp.float32)}
  leaves, _ = update(optimizer, params, params, steps=2)
  assert not np.any(leaves["experts"] == params["experts"])


# --- Groups ------------------------------------------------------------------------------------


def test_lr_multiplies_the_learning_rate_of_what_a_rule_matches():
  params, grads = make_params(), make_params(fill=1.0)
  rules = (("embed", {"lr": 0.25}), ("bias", {"lr": 0.0}), (".*", {}))
  leaves, _ = update(make(learning_rate=0.1, rules=rules), grads, params)
  for name, before in tree.named_leaves(params).items():
    share = 0.25 if "embed" in name else 0 if "bias" in name else 1
    np.testing.assert_allclose(leaves[name], before - 0.1 * share, rtol=1e-5, atol=1e-7)


def test_decoupled_decay_shrinks_by_learning_rate_and_multiplier():
  params, zeros = make_params(), make_params(fill=0.0)
  rules = (("bias|norm", {"decay": 0.0}), ("embed", {"decay": 0.5, "lr": 2.0}), (".*", {}))
  leaves, _ = update(make("adamw", learning_rate=0.1, weight_decay=0.3, rules=rules), zeros, params)
  for name, before in tree.named_leaves(params).items():
    share = 0 if name.endswith(("bias", "scale")) else 1  # embed: half the decay, twice the rate
    np.testing.assert_allclose(leaves[name], before * (1 - 0.03 * share), rtol=1e-6)


def test_l2_is_a_term_of_the_gradient():
  params, zeros = make_params(), make_params(fill=0.0)
  # Adam makes a step of the learning rate out of any gradient, however small.
  adam, _ = update(make("adam", learning_rate=0.01, weight_decay=0.3), zeros, params)
  sgd, _ = update(make("sgd", learning_rate=0.01, weight_decay=0.3), zeros, params)
  for name, before in tree.named_leaves(params).items():
    np.testing.assert_allclose(adam[name], before - 0.01 * np.sign(before), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(sgd[name], before * (1 - 0.003), rtol=1e-5)


def test_a_rule_may_choose_another_algorithm():
  params, grads = make_params(), make_params(fill=5.0)
  rules = (("embed", {"algorithm": "lion"}), (".*", {}))
  leaves, _ = update(make("sgd", learning_rate=0.1, rules=rules), grads, params)
  for name, before in tree.named_leaves(params).items():
    step = 1 if "embed" in name else 5  # Lion knows but the sign
    np.testing.assert_allclose(leaves[name], before - 0.1 * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_frozen_parameters_stay_and_cost_no_memory(name):
  rules = (
    ("blocks/mlp", {"frozen": True}),
    ("bias|norm|embed|head", {"algorithm": "adamw" if name in optim.MATRIX_ALGORITHMS else ""}),
    (".*", {}),
  )
  optimizer = make(name, learning_rate=0.1, weight_decay=0.1, clip_norm=1.0, rules=rules)
  params = make_params()
  poisoned = make_params(fill=1.0)
  poisoned["blocks"]["mlp"]["up"]["kernel"] *= jnp.nan  # what is frozen is not looked at
  leaves, norm = update(optimizer, poisoned, params, steps=2)
  frozen = {name for name in PARAMETERS if name.startswith("blocks/mlp")}
  assert equal(leaves, tree.named_leaves(params)) == frozen
  counted = sum(np.prod(info.shape) for n, info in PARAMETERS.items() if n not in frozen)
  assert float(norm) == pytest.approx(np.sqrt(counted))
  kept = {leaf.shape for leaf in jax.tree.leaves(optimizer.init(params))}
  assert not kept & {PARAMETERS[name].shape for name in frozen}


def test_clipping_bounds_the_norm_of_the_whole_gradient():
  params, grads = make_params(), make_params(fill=3.0)
  whole = float(optax.global_norm(grads))
  for clip_norm, expected in ((0.5, 0.5), (1e6, whole), (0.0, whole)):
    leaves, norm = update(make(clip_norm=clip_norm), grads, params)
    assert float(norm) == pytest.approx(whole)  # reported as it was before
    change = {name: leaves[name] - p for name, p in tree.named_leaves(params).items()}
    assert float(optax.global_norm(change)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"name": "adamv"}, r"no algorithm 'adamv'\. Did you mean 'adam"),
    ({"rules": ((".*", {"algorithm": "lions"}),)}, r"no algorithm 'lions'\. Did you mean 'lion'"),
    ({"rules": ((".*", {"weight_decay": 0.0}),)}, r"no key 'weight_decay' in a rule.*decay"),
    ({"rules": (("kernel", {}),)}, r"no rule matches parameter 'blocks/mlp/up/bias'"),
    ({"rules": (("(", {}), (".*", {}))}, r"'\(' is not a regular expression"),
  ],
)
def test_what_no_optimizer_can_be_made_of_is_named(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    make(**changes)


@pytest.mark.parametrize("name", optim.MATRIX_ALGORITHMS)
def test_what_is_no_matrix_is_refused_by_name(name):
  rules = (("bias|norm", {"algorithm": "adamw"}), (".*", {}))
  with pytest.raises(UserError, match=r"'embed/embedding' is not a projection's kernel"):
    make(name, rules=rules)


@pytest.mark.parametrize(("name", "power"), [("adamw", -1), ("lion", -1), ("muon", -0.5)])
def test_across_widths_matrices_alone_change_their_rate_and_keep_their_decay(name, power):
  config = types.SimpleNamespace(**(presets.DEFAULTS | presets.OPTIMIZERS[name]))
  made = optim.make_optimizer(config, PARAMETERS, optax.constant_schedule(1.0), width_ratio=4.0)
  for parameter, group in made.groups.items():
    hidden = parameter.startswith("blocks/mlp") and parameter.endswith("kernel")
    assert group.lr == (4**power if hidden else 1), parameter
    if hidden:
      assert group.lr * group.decay == 1
  config = types.SimpleNamespace(**(presets.DEFAULTS | presets.OPTIMIZERS["sgd"]))
  with pytest.raises(UserError, match="no rule for optim 'sgd' across widths"):
    optim.make_optimizer(config, PARAMETERS, optax.constant_schedule(1.0), width_ratio=4.0)


# --- Schedules ---------------------------------------------------------------------------------


def schedule(kind, *, final=0.1, total=110, warmup=10, decay=40):
  config = types.SimpleNamespace(learning_rate=2.0, schedule=kind, final_fraction=final)
  made = optim.make_schedule(config, total_steps=total, warmup_steps=warmup, decay_steps=decay)
  return lambda step: float(made(jnp.int32(step)))


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "rsqrt", "constant"])
def test_every_schedule_warms_up_linearly_and_learns_from_the_first_step(kind):
  rate = schedule(kind)
  assert rate(0) == pytest.approx(2 / 11)
  assert rate(4) == pytest.approx(2 * 5 / 11)
  assert rate(9) == pytest.approx(2 * 10 / 11)
  assert rate(10) == pytest.approx(2)
  assert schedule(kind, warmup=0)(0) == pytest.approx(2)


@pytest.mark.parametrize(
  ("kind", "middle", "end"),
  [
    ("cosine", 2 * (0.1 + 0.9 * 0.5), 0.2),
    ("linear", 2 * (0.1 + 0.9 * 0.5), 0.2),
    ("wsd", 2.0, 0.2),
    ("rsqrt", 2 * (10 / 60) ** 0.5, 2 * (10 / 110) ** 0.5),
    ("constant", 2.0, 2.0),
  ],
)
def test_the_middle_and_the_end_of_a_schedule(kind, middle, end):
  rate = schedule(kind)
  assert rate(60) == pytest.approx(middle, rel=1e-5)
  assert rate(110) == pytest.approx(end, rel=1e-5)
  assert rate(111) <= rate(110)


def test_cosine_is_a_cosine():
  assert schedule("cosine")(35) == pytest.approx(0.2 + 1.8 * (1 + np.cos(np.pi / 4)) / 2, rel=1e-5)


def test_wsd_is_flat_then_linear():
  rate = schedule("wsd", final=0.0)
  assert rate(69) == rate(70) == 2
  assert rate(90) == pytest.approx(1)
  assert rate(109) == pytest.approx(2 / 40)
  assert rate(110) == 0


@pytest.mark.parametrize(
  ("kind", "changes", "sentence"),
  [
    ("cosin", {}, r"optim\.schedule: no schedule 'cosin'\. Did you mean 'cosine'"),
    ("cosine", {"warmup": 111}, r"warmup of 111 steps is longer than the run of 110"),
    ("wsd", {"decay": 101}, r"decay of 101 steps does not fit after a warmup of 10 in the run's"),
  ],
)
def test_an_impossible_schedule_is_refused(kind, changes, sentence):
  with pytest.raises(UserError, match=sentence):
    schedule(kind, **changes)


def test_a_frozen_layer_neither_moves_nor_counts_in_the_norm():
  params = make_params()
  grads = jax.tree.map(jnp.ones_like, params)
  moved, norm = update(make("adamw", freeze_layers=1, weight_decay=0.1), grads, params, steps=3)
  before = tree.named_leaves(params)
  for name in PARAMETERS:
    still = np.all(np.asarray(moved[name]) == np.asarray(before[name]), axis=None)
    if name.startswith("blocks/"):
      assert np.array_equal(moved[name][0], before[name][0])
      assert not np.array_equal(moved[name][1], before[name][1])
    else:
      assert still == name.startswith("embed")
  trained = 16 * 8 + 16 + 8 * 16 + 8 + 8 * 16  # One layer of each stack, and the head.
  assert float(norm) == pytest.approx(trained**0.5, rel=1e-6)


def test_the_learning_rate_falls_with_the_distance_from_the_head():
  params = make_params(0.0)
  grads = jax.tree.map(jnp.ones_like, params)
  moved, _ = update(make("sgd", layer_decay=0.5), grads, params)
  assert set(np.unique(moved["head/kernel"])) == {-1.0}
  assert np.unique(moved["blocks/norm/scale"], axis=-1).tolist() == [[-0.25], [-0.5]]
  assert set(np.unique(moved["embed/embedding"])) == {-0.125}


def test_what_a_pattern_is_found_in_freezes():
  params = make_params()
  grads = jax.tree.map(jnp.ones_like, params)
  moved, norm = update(make("sgd", freeze="^(?!head)"), grads, params)
  for name, before in tree.named_leaves(params).items():
    assert np.array_equal(moved[name], before) == (name != "head/kernel")
  assert float(norm) == pytest.approx((8 * 16) ** 0.5)


@pytest.mark.parametrize(("pattern", "found"), [("nowhere", "none of the"), (".", "all")])
def test_a_pattern_that_freezes_nothing_or_all_is_an_error(pattern, found):
  with pytest.raises(UserError, match=f"optim.freeze='{pattern}' is found in the names of {found}"):
    make(freeze=pattern)
