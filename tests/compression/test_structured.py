"""A smaller model is the larger one without what was cut, and what was cut mattered least."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compression.calibration import walk
from gptjax.compression.models import params_of
from gptjax.compression.structured import Sizes, choose, cut, measure, shrink
from gptjax.errors import UserError
from gptjax.model.gpt import count_parameters, describe_parameters
from gptjax.training.pretrained import Labels, labels_of, load_model
from tests.compression.saved import LLAMA, TEXT, VOCAB_SIZE, merge, save

MODELS = {
  "gpt2": {},
  "llama": LLAMA,
  "tied llama": LLAMA | {"head.tied": True},
  "gpt-j": {"residual.kind": "parallel_one_norm", "head.tied": False, "head.bias": True},
  "local": LLAMA | {"layer_pattern": ("local", "full"), "window": 3},
  "qk norm": LLAMA | {"attention.qk_norm": True, "attention.sinks": True, "bias": True},
}
TOKENS = np.random.default_rng(0).integers(0, 32, (11, 12)).astype(np.int32)
# Every second layer, and a share of everything else.
SIZES = Sizes(layers=3, mlp_dim=20, kv_heads=1, heads=1)


@pytest.fixture
def make_model(tiny_config, random_params):
  def make(**changes):
    config = tiny_config(**{"num_layers": 4} | changes)
    return merge(config, random_params(config))

  return make


def random_choice(config, sizes, seed=1):
  """Indices that stay, chosen by random importance."""
  rng = np.random.default_rng(seed)
  shapes = {
    "layers": (config.num_layers,),
    "mlp": (config.num_layers, config.mlp_dim),
    "heads": (config.num_layers, config.num_heads),
    "embed": (config.embed_dim,),
  }
  importance = {name: rng.random(shape) for name, shape in shapes.items()}
  return choose(type("Importance", (), importance), sizes, config)


def without_cut_channels(model, kept):
  """The model, as large as it is, with zeros for the weights that read what is cut."""
  config, params = model.config, {n: np.array(x) for n, x in params_of(model).items()}
  params = {name: x.copy() for name, x in params.items()}
  for index in range(config.num_layers):
    if index not in kept["layers"]:
      for name in params:
        if name.startswith(("blocks/attention/out/", "blocks/mlp/down/")):
          params[name][index] = 0
      continue
    place = kept["layers"].tolist().index(index)
    for name, axis in (("blocks/mlp/down", "mlp"), ("blocks/attention/out", "heads")):
      if axis in kept:
        gone = np.setdiff1d(np.arange(params[f"{name}/kernel"].shape[1]), kept[axis][place])
        params[f"{name}/kernel"][index, gone] = 0
  return merge(config, params)


@pytest.mark.parametrize("sizes", [SIZES, Sizes(heads=2)], ids=["all", "heads"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_smaller_model_is_the_larger_one_with_zeros(make_model, changes, sizes):
  model = make_model(**changes)
  kept = random_choice(model.config, sizes)
  smaller = cut(model, kept)
  assert count_parameters(smaller.config) < count_parameters(model.config)
  assert smaller.config.head_dim == model.config.head_dim
  expected = without_cut_channels(model, kept)(TOKENS)
  np.testing.assert_allclose(smaller(TOKENS), expected, rtol=1e-4, atol=1e-4)
  # All that was not cut changes the logits, so that zeros elsewhere would be seen.
  assert np.abs(expected - model(TOKENS)).max() > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama", "tied llama", "gpt-j"])
def test_a_narrower_model_is_the_wider_one_with_each_channel_twice(make_model, name):
  """Channels that are cut hold what others do, which leaves means and variances as they are, and
  nothing reads them."""
  config = make_model(**MODELS[name]).config
  kept = random_choice(config, Sizes(embed_dim=8))
  stay = kept["embed"]
  gone = np.setdiff1d(np.arange(16), stay)
  params = {n: np.array(x) for n, x in params_of(make_model(**MODELS[name])).items()}
  for name, info in describe_parameters(config).items():
    writes = [
      axis
      for axis, what in enumerate(info.axes)
      if what == "embed" and axis not in (info.fan_in_axes or ())
    ]
    for axis in writes:
      columns = np.moveaxis(params[name], axis, -1)
      columns[..., gone] = 0 if "norm" in name else columns[..., stay]
  model = merge(config, params)
  smaller = cut(model, kept)
  assert smaller.config.embed_dim == 8
  np.testing.assert_allclose(smaller(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_what_does_nothing_is_cut(make_model):
  model = make_model(**LLAMA)
  params = {name: np.array(x) for name, x in params_of(model).items()}
  params["blocks/attention/out/kernel"][2] = 0
  params["blocks/mlp/down/kernel"][2] = 0
  dead_channels = [[0, 5, 31], [1, 2, 3], [7, 8, 9], [4, 6, 30]]
  dead_groups, dead_embed = [0, 1, 1, 0], [3, 4]
  for layer in range(4):
    params["blocks/mlp/gate/kernel"][layer][:, dead_channels[layer]] = 0
    params["blocks/attention/value/kernel"][layer][:, dead_groups[layer]] = 0
  for norm in ("attention_norm", "mlp_norm"):
    params[f"blocks/{norm}/scale"][:, dead_embed] = 0
  model = merge(model.config, params)
  importance = measure(model, TOKENS)
  kept = choose(importance, Sizes(3, 29, 1, 2, 14), model.config)
  np.testing.assert_array_equal(kept["layers"], [0, 1, 3])
  for channels, layer in zip(kept["mlp"], (0, 1, 3), strict=True):
    np.testing.assert_array_equal(channels, np.setdiff1d(np.arange(32), dead_channels[layer]))
  np.testing.assert_array_equal(kept["kv_heads"], [[1], [0], [1]])
  np.testing.assert_array_equal(kept["heads"], [[2, 3], [0, 1], [2, 3]])
  np.testing.assert_array_equal(kept["embed"], np.setdiff1d(np.arange(16), dead_embed))
  np.testing.assert_allclose(importance.layers[2], 0, atol=1e-5)
  smaller = cut(model, kept)
  assert smaller.config.num_layers == 3
  assert np.isfinite(smaller(TOKENS)).all()


def test_importance_is_what_it_is_said_to_be(make_model):
  model = make_model(**LLAMA)
  importance = measure(model, TOKENS)
  layers = list(walk(model, TOKENS))
  embed = 0
  for index, layer in enumerate(layers):
    x, y = (np.concatenate(parts).reshape(-1, 16) for parts in (layer.inputs, layer.outputs()))
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(importance.layers[index], 1 - cosines.mean(), rtol=1e-3, atol=1e-5)
    read = layer.measure(lambda x_MI: {"absolute": jnp.abs(x_MI).sum(0), "gram": x_MI.T @ x_MI})
    means = {name: found["absolute"] / len(x) for name, found in read.items()}
    np.testing.assert_allclose(importance.mlp[index], means["mlp/down"], rtol=1e-4)
    squares = np.diagonal(read["attention/out"]["gram"]).reshape(4, 4).sum(1) / len(x)
    np.testing.assert_allclose(importance.heads[index], squares, rtol=1e-4)
    embed += means["attention/key"] + means["mlp/gate"]
  np.testing.assert_allclose(importance.embed, embed, rtol=1e-4)


def test_heads_that_stay_are_those_of_their_groups(tiny_config):
  config = tiny_config(num_heads=8, num_kv_heads=4, num_layers=1, embed_dim=16)
  heads = np.array([[1, 9, 5, 4, 8, 8, 0, 3]], float)  # Groups of 10, 9, 16 and 3.
  importance = type("Importance", (), {"layers": np.ones(1), "heads": heads})
  kept = choose(importance, Sizes(kv_heads=2), config)
  np.testing.assert_array_equal(kept["kv_heads"], [[0, 2]])
  np.testing.assert_array_equal(kept["heads"], [[0, 1, 4, 5]])
  kept = choose(importance, Sizes(heads=4), config)
  np.testing.assert_array_equal(kept["kv_heads"], [[0, 1, 2, 3]])
  np.testing.assert_array_equal(kept["heads"], [[1, 2, 4, 7]])


def test_layers_of_several_kinds_stay_what_they_are(make_model):
  model = make_model(**MODELS["local"])
  kept = {"layers": np.array([0, 1, 2])}
  assert cut(model, kept).config.layer_pattern == ("local", "full", "local")
  assert cut(model, {"layers": np.array([1, 3])}).config.layer_pattern == ("full",)


@pytest.fixture(scope="module")
def checkpoint(tiny_config, random_params, tmp_path_factory):
  """(checkpoint, a file of text)."""
  folder = tmp_path_factory.mktemp("structured")
  (folder / "text.txt").write_text(TEXT)
  config = tiny_config(**LLAMA | {"vocab_size": VOCAB_SIZE, "label_head.num_labels": 0})
  return save(folder / "run", config, random_params(config)), str(folder / "text.txt")


def test_a_smaller_checkpoint_is_loaded_and_writes(checkpoint, tmp_path):
  run, data = checkpoint
  sizes = Sizes(layers=1, mlp_dim=16, kv_heads=1, embed_dim=12)
  text = {"data": data, "rows": 3, "length": 16}
  found = shrink(run, tmp_path / "to", sizes, progress=False, **text)
  model, tokenizer = load_model(tmp_path / "to")
  config = model.config
  assert (config.num_layers, config.mlp_dim, config.embed_dim) == (1, 16, 12)
  assert (config.num_heads, config.num_kv_heads, config.head_dim) == (2, 1, 4)
  assert found.parameters == sum(x.size for x in params_of(model).values())
  assert found.parameters_before == sum(x.size for x in params_of(load_model(run)[0]).values())
  assert found.layers == (int(np.argmax(found.influence)),)
  assert np.isfinite(model(jnp.array([tokenizer.encode("the")]))).all()


def test_labels_go_along(tiny_config, random_params, checkpoint, tmp_path):
  config = tiny_config(**{"vocab_size": VOCAB_SIZE, "label_head.num_labels": 2})
  labels = Labels("classification", ("no", "yes"))
  run = save(tmp_path / "run", config, random_params(config), labels)
  text = {"data": checkpoint[1], "rows": 2, "length": 16}
  shrink(run, tmp_path / "to", Sizes(embed_dim=8), progress=False, **text)
  assert labels_of(tmp_path / "to") == labels


@pytest.mark.parametrize(
  ("changes", "sizes", "sentence"),
  [
    ({}, {}, "nothing to cut: give one or more of --layers, --mlp_dim"),
    ({}, {"layers": 3}, "--layers is 3; it must be at least 1 and at most 2"),
    ({}, {"mlp_dim": 0}, "--mlp_dim is 0"),
    ({}, {"embed_dim": 17}, "--embed_dim is 17; .* at most 16"),
    ({"num_kv_heads": 2}, {"kv_heads": 4}, "--kv_heads is 4; .* at most 2"),
    ({"num_kv_heads": 2}, {"heads": 3}, "--heads=3 is not 1 to 2 times the 2 key-value heads"),
    ({"num_kv_heads": 2}, {"kv_heads": 1, "heads": 4}, "--heads=4 is not 1 to 2 times the 1 key"),
    ({}, {"kv_heads": 2, "heads": 4}, "--heads=4 is not 1 to 1 times the 2 key-value heads"),
    ({"position.kind": "alibi"}, {"heads": 2}, "--heads cannot be cut .*position.kind='alibi'"),
    (
      {"attention.qk_norm": True, "attention.qk_norm_per_head": False},
      {"kv_heads": 2},
      "--kv_heads cannot be cut in a model with a norm over all heads",
    ),
    ({"head.pooler": True}, {"embed_dim": 8}, "--embed_dim cannot be cut .*head.pooler"),
    ({"head.transform": True}, {"embed_dim": 8}, "--embed_dim cannot be cut .*head.transform"),
    (
      {"experts.count": 2, "experts.per_token": 1},
      {"mlp_dim": 8},
      "--mlp_dim cannot be cut in a model with model.experts",
    ),
    (
      {"transfer.parametrization": "mup", "transfer.base_embed_dim": 8},
      {"embed_dim": 8},
      "--embed_dim cannot be cut .*parametrization='mup'",
    ),
  ],
)
def test_a_size_that_does_not_fit_is_named(tiny_config, changes, sizes, sentence):
  with pytest.raises(UserError, match=sentence):
    Sizes(**sizes).check(tiny_config(**changes))


@pytest.mark.slow
def test_experts_are_cut_in_width_and_heads(make_model):
  model = make_model(**LLAMA | {"experts.count": 2, "experts.per_token": 1})
  importance = measure(model, TOKENS)
  smaller = cut(model, choose(importance, Sizes(layers=2, kv_heads=1, embed_dim=8), model.config))
  assert np.isfinite(smaller(TOKENS)).all()
