"""Pruned weights are those that the papers' formulas choose, and what stays makes up for them."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compression.calibration import walk
from gptjax.compression.models import params_of
from gptjax.compression.prune import METHODS, Sparsity, check_mask, prune, prune_model, sparsegpt
from gptjax.errors import UserError
from gptjax.model.gpt import describe_parameters
from gptjax.training.pretrained import Labels, labels_of, load_model
from tests.compression.saved import LLAMA, TEXT, VOCAB_SIZE, merge, save

MODELS = {"gpt2": {}, "llama": LLAMA}
TOKENS = np.random.default_rng(0).integers(0, 32, (11, 12)).astype(np.int32)
EXPERTS = {"experts.count": 4, "experts.per_token": 2}


@pytest.fixture
def make_model(tiny_config, random_params):
  def make(**changes):
    config = tiny_config(**changes)
    return merge(config, random_params(config))

  return make


def kernels(model):
  """{name: (kernel [L, inputs, outputs], description)} of what is pruned."""
  params = params_of(model)
  return {
    name: (np.asarray(params[name]).reshape(-1, info.fan_in, info.fan_out), info)
    for name, info in describe_parameters(model.config).items()
    if info.role == "hidden"
  }


def wanda_in_torch(torch, kernel_IO, squares_I, sparsity):
  """W (Sun et al. 2023, algorithm 1) for a torch.nn.Linear, whose weight is [outputs, inputs]."""
  weight = torch.tensor(np.array(kernel_IO.T))
  metric = weight.abs() * torch.tensor(np.array(squares_I)).sqrt().reshape(1, -1)
  mask = torch.zeros_like(metric, dtype=torch.bool)
  if sparsity == "2:4":
    for start in range(0, metric.shape[1], 4):
      lowest = torch.topk(metric[:, start : start + 4], 2, dim=1, largest=False).indices
      mask.scatter_(1, start + lowest, True)
  else:
    indices = torch.sort(metric, dim=-1, stable=True).indices
    mask.scatter_(1, indices[:, : int(metric.shape[1] * sparsity)], True)
  weight[mask] = 0
  return weight.numpy().T


@pytest.mark.parametrize("sparsity", [0.3, "2:4"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_wanda_is_its_formula_in_torch_layer_after_layer(make_model, changes, sparsity):
  torch = pytest.importorskip("torch")
  model = make_model(**changes)
  pruned = prune_model(model, "wanda", Sparsity.parse(sparsity), TOKENS)
  before, after, checked = kernels(model), kernels(pruned), 0
  whole = params_of(model)
  # What reaches a layer, once those before it are pruned; measured in the layer that is not yet.
  for layer in walk(pruned, TOKENS):
    own = layer.params
    layer.params = {name: whole[f"blocks/{name}"][layer.index] for name in own}
    squares = layer.measure(lambda x_MI: jnp.square(x_MI).sum(0))
    layer.params = own
    for projection, squares_I in squares.items():
      name = f"blocks/{projection}/kernel"
      kernel_IO = before[name][0][layer.index]
      expected = wanda_in_torch(torch, kernel_IO, squares_I, sparsity)
      np.testing.assert_array_equal(after[name][0][layer.index], expected)
      checked += 1
  assert checked == 2 * len(before)


def test_magnitude_takes_the_smallest_of_each_output(make_model):
  model = make_model(**EXPERTS)
  pruned = prune_model(model, "magnitude", Sparsity.parse(0.25))
  for name, (after, info) in kernels(pruned).items():
    before = kernels(model)[name][0]
    zero = after == 0
    assert (zero.sum(1) == info.fan_in // 4).all()
    largest_gone = np.where(zero, np.abs(before), 0).max(1)
    assert (largest_gone < np.where(zero, np.inf, np.abs(before)).min(1)).all()
    np.testing.assert_array_equal(after[~zero], before[~zero])


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_holds_and_all_else_stays(make_model, method):
  model = make_model()
  pruned = prune_model(model, method, Sparsity.parse("1:4"), TOKENS)
  check_mask(pruned, "1:4")
  check_mask(pruned, "2:4")
  with pytest.raises(UserError, match=r"'blocks/attention/key/kernel' is not 2:4: .* as many as 4"):
    check_mask(model, "2:4")
  params = params_of(pruned)
  for name, x in params_of(model).items():
    if name in kernels(model):
      assert (params[name] == 0).mean() == 0.75
    else:
      np.testing.assert_array_equal(params[name], x)


def test_one_weight_too_many_is_no_pattern(make_model):
  params = params_of(prune_model(make_model(), "magnitude", Sparsity.parse("2:4")))
  name = "blocks/mlp/down/kernel"
  zero = np.argwhere(np.asarray(params[name]) == 0)[-1]
  params[name] = params[name].at[tuple(zero)].set(1e-9)
  with pytest.raises(UserError, match=r"'blocks/mlp/down/kernel' is not 2:4: .* as many as 3"):
    check_mask(merge(make_model().config, params), "2:4")


@pytest.fixture(scope="module")
def correlated():
  """A kernel [24, 16], and inputs of which the second half is nearly a mixture of the first."""
  rng = np.random.default_rng(1)
  first = rng.normal(size=(200, 12))
  second = first @ rng.normal(size=(12, 12)) + 0.1 * rng.normal(size=(200, 12))
  x_MI = np.concatenate([first, second], 1)[:, rng.permutation(24)].astype(np.float32)
  return rng.normal(size=(24, 16)).astype(np.float32), x_MI


def sparsegpt_by_definition(kernel_IO, x_MI, count, group, block):
  """Frantar and Alistarh 2023, with the inverse Hessian of the inputs that are left computed anew
  for each input, in float64."""
  kernel_IO, inputs = kernel_IO.astype(np.float64), len(kernel_IO)
  hessian = x_MI.astype(np.float64).T @ x_MI
  hessian += 0.01 * np.diagonal(hessian).mean() * np.eye(inputs)
  inverses = [np.linalg.inv(hessian[i:, i:]) for i in range(inputs)]
  errors = np.array([inverse[0, 0] for inverse in inverses])[:, None]
  zero = np.zeros(kernel_IO.shape, bool)
  for i in range(inputs):
    if i % (group or block) == 0:
      chosen = slice(i, i + (group or block))
      scores = kernel_IO[chosen] ** 2 / errors[chosen]
      if group:
        lowest = np.argsort(scores, axis=0)[:count]
        np.put_along_axis(zero[chosen], lowest, True, 0)
      else:
        flat = np.zeros(scores.size, bool)
        flat[np.argsort(scores.ravel())[:count]] = True
        zero[chosen] = flat.reshape(scores.shape)
    gone = np.where(zero[i], kernel_IO[i], 0)
    kernel_IO[i:] -= np.outer(inverses[i][:, 0] / inverses[i][0, 0], gone)
    kernel_IO[i, zero[i]] = 0
  return kernel_IO


@pytest.mark.parametrize(
  ("sparsity", "count", "group", "most"), [(0.5, 64, 0, 10), ("2:4", 2, 4, 9), ("1:3", 2, 3, 128)]
)
def test_sparsegpt_is_the_papers_algorithm(correlated, sparsity, count, group, most):
  # A block is 8 inputs, 8 with groups of 4, or all 24.
  kernel_IO, x_MI = correlated
  expected = sparsegpt_by_definition(kernel_IO, x_MI, count, group, 8)
  actual = sparsegpt(kernel_IO, x_MI.T @ x_MI, Sparsity.parse(sparsity), most)
  np.testing.assert_array_equal(np.asarray(actual) == 0, expected == 0)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_sparsegpt_reconstructs_what_magnitude_loses(correlated, sparsity):
  kernel_IO, x_MI = correlated
  lost = {}
  for method in ("magnitude", "sparsegpt"):
    if method == "sparsegpt":
      pruned = sparsegpt(kernel_IO, x_MI.T @ x_MI, Sparsity.parse(sparsity))
    else:
      group = 4 if sparsity == "2:4" else 24
      parts = np.abs(kernel_IO).reshape(-1, group, 16)
      keep = np.argsort(np.argsort(parts, axis=1), axis=1) >= group // 2
      pruned = kernel_IO * keep.reshape(24, 16)
    lost[method] = np.square(x_MI @ (pruned - kernel_IO)).mean()
  assert lost["sparsegpt"] < 0.5 * lost["magnitude"]


def test_an_input_that_is_always_zero_breaks_nothing():
  kernel_IO, x_MI = np.ones((8, 3), np.float32), np.ones((5, 8), np.float32)
  x_MI[:, 2] = 0
  for gram in (x_MI.T @ x_MI, np.zeros((8, 8), np.float32)):
    pruned = np.asarray(sparsegpt(kernel_IO, gram, Sparsity.parse(0.5)))
    assert np.isfinite(pruned).all()
    assert (pruned == 0).sum() == 12


@pytest.mark.parametrize(
  "text", ["0", "1", "1.5", "-0.5", "nan", "half", "4:2", "2:2", "0:4", "2:4:8", ""]
)
def test_what_is_no_sparsity_is_named(text):
  with pytest.raises(UserError, match=f"--sparsity={text} is neither a share"):
    Sparsity.parse(text)


def test_of_equal_weights_exactly_a_share_goes(make_model):
  model = make_model()
  params = params_of(model)
  for name, info in describe_parameters(model.config).items():
    if info.role == "hidden":  # Few values, as if they had been rounded.
      params[name] = jnp.round(params[name] * 4) + 0.5
  for sparsity, share in (("0.5", 0.5), ("1:4", 0.75), ("0.03", 0.0)):
    pruned = prune_model(merge(model.config, params), "magnitude", Sparsity.parse(sparsity))
    for kernel, info in kernels(pruned).values():
      assert ((kernel == 0).sum(1) == int(share * info.fan_in)).all()


def test_a_share_is_the_decimal_that_is_written():
  assert Sparsity.parse("0.29").count(100) == 29
  assert str(Sparsity.parse(0.29)) == "0.29"
  assert str(Sparsity.parse("2:4")) == "2:4"


@pytest.fixture(scope="module")
def checkpoint(tiny_config, random_params, tmp_path_factory):
  """(checkpoint, a file of text)."""
  folder = tmp_path_factory.mktemp("prune")
  (folder / "text.txt").write_text(TEXT)
  config = tiny_config(vocab_size=VOCAB_SIZE)
  return save(folder / "run", config, random_params(config)), str(folder / "text.txt")


@pytest.mark.slow
def test_a_pruned_checkpoint_is_loaded_and_writes(checkpoint, tmp_path):
  run, data = checkpoint
  text = {"data": data, "rows": 3, "length": 16}
  found = prune(run, tmp_path / "to", method="wanda", sparsity="2:4", progress=False, **text)
  model, tokenizer = load_model(tmp_path / "to")
  check_mask(model, "2:4")
  assert found.zeros == found.weights // 2
  assert found.parameters == sum(x.size for x in params_of(model).values())
  assert found.weights == sum(x.size for x, _ in kernels(model).values())
  assert np.isfinite(model(jnp.array([tokenizer.encode("the")]))).all()


def test_labels_go_along(tiny_config, random_params, tmp_path):
  config = tiny_config(**{"vocab_size": VOCAB_SIZE, "label_head.num_labels": 2})
  labels = Labels("classification", ("no", "yes"))
  run = save(tmp_path / "run", config, random_params(config), labels)
  prune(run, tmp_path / "to", method="magnitude", sparsity=0.5, progress=False)
  assert labels_of(tmp_path / "to") == labels


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    ({"method": "random"}, "--method: no choice 'random'"),
    ({"method": "wanda"}, "--method=wanda needs --data, text to measure on"),
    ({"method": "wanda", "data": "x", "rows": 0}, "--rows is 0"),
    (
      {"method": "magnitude", "data": "x"},
      "--method=magnitude looks at weights alone: leave --data out",
    ),
    ({"sparsity": "2:5"}, "'blocks/attention/key/kernel' has 16 inputs, no multiple of the 5"),
    ({"sparsity": "half"}, "--sparsity=half is neither"),
  ],
)
def test_what_cannot_be_pruned_is_named(checkpoint, options, sentence, tmp_path):
  options = {"method": "magnitude", "sparsity": 0.5, "progress": False} | options
  with pytest.raises(UserError, match=sentence):
    prune(checkpoint[0], tmp_path / "to", **options)
  assert not (tmp_path / "to").exists()


def test_experts_are_pruned_by_magnitude_alone(make_model):
  with pytest.raises(UserError, match="prune a mixture of experts by --method=magnitude"):
    prune_model(make_model(**EXPERTS), "wanda", Sparsity.parse(0.5), TOKENS)


def test_nothing_is_overwritten(checkpoint, tmp_path):
  (tmp_path / "mine").write_text("")
  with pytest.raises(UserError, match="nothing is overwritten"):
    prune(checkpoint[0], tmp_path, method="magnitude", sparsity=0.5)


def test_a_share_is_no_pattern(make_model):
  with pytest.raises(UserError, match=r"a share of 0\.5 is no pattern: give N:M"):
    check_mask(make_model(), "0.5")
