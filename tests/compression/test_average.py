"""Averages are what their papers define, on numbers that can be checked by hand."""

import numpy as np
import pytest
from flax import nnx

from gptjax.compress import average as averages
from gptjax.compression.average import METHODS, average
from gptjax.compression.models import params_of
from gptjax.compression.prune import prune
from gptjax.compression.structured import Sizes, shrink
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.inference.generate import generate
from gptjax.training.checkpoints import Checkpoints
from gptjax.training.pretrained import Labels, labels_of, load_model
from tests.compression.saved import LLAMA, TEXT, VOCAB_SIZE, merge, save


def vector(*values):
  return {"x": np.array(values, np.float32)}


def test_a_mean_is_weighted_by_shares():
  models = [vector(1, 2), vector(3, 6), vector(5, 1)]
  np.testing.assert_allclose(averages.mean(models)["x"], [3, 3])
  np.testing.assert_allclose(averages.mean(models, [2, 2, 0])["x"], [2, 4])


def test_the_mean_of_equal_models_is_that_model():
  model = {"x": np.random.default_rng(0).normal(size=1000).astype(np.float32)}
  for count in (1, 3, 7):
    np.testing.assert_array_equal(averages.mean([model] * count)["x"], model["x"])


def test_a_greedy_soup_takes_what_makes_it_better():
  """The score is the distance from 10: 9 is the best alone, 12 improves it, 30 and 0 do not."""
  models, asked = [vector(0), vector(12), vector(9), vector(30)], []

  def score(params):
    asked.append(float(params["x"][0]))
    return -abs(asked[-1] - 10)

  soup, chosen = averages.greedy_soup(models, score)
  assert chosen == [2, 1]
  np.testing.assert_allclose(soup["x"], [10.5])
  # Each alone, then the mean with each of the others in the order of their scores.
  np.testing.assert_allclose(asked, [0, 12, 9, 30, 10.5, 7, 17])


def test_an_equal_model_joins_the_soup():
  assert averages.greedy_soup([vector(1), vector(1)], lambda params: 0.0)[1] == [0, 1]


def test_slerp_goes_along_the_arc():
  a, b = vector(1, 0), vector(0, 1)
  half = np.sqrt(0.5)
  np.testing.assert_allclose(averages.slerp(a, b, 0.5)["x"], [half, half], rtol=1e-6)
  third = averages.slerp(a, b, 1 / 3)["x"]
  np.testing.assert_allclose(third, [np.cos(np.pi / 6), np.sin(np.pi / 6)], rtol=1e-6)


def test_slerp_has_its_ends_and_keeps_lengths():
  rng = np.random.default_rng(0)
  a, b = ({"x": rng.normal(size=(5, 8)).astype(np.float32)} for _ in range(2))
  np.testing.assert_allclose(averages.slerp(a, b, 0.0)["x"], a["x"], rtol=1e-6)
  np.testing.assert_allclose(averages.slerp(a, b, 1.0)["x"], b["x"], rtol=1e-6)
  b["x"] *= np.linalg.norm(a["x"]) / np.linalg.norm(b["x"])
  for fraction in (0.2, 0.5, 0.9):
    length = np.linalg.norm(averages.slerp(a, b, fraction)["x"])
    np.testing.assert_allclose(length, np.linalg.norm(a["x"]), rtol=1e-5)


def test_slerp_takes_each_layer_by_itself_and_parallel_vectors_straight():
  a, b = {"x": np.array([[1, 0], [1, 1]], "f")}, {"x": np.array([[0, 1], [3, 3]], "f")}
  half = np.sqrt(0.5)
  by_layer = averages.slerp(a, b, 0.5, {"x"})["x"]
  np.testing.assert_allclose(by_layer, [[half, half], [2, 2]], rtol=1e-6)
  assert np.abs(averages.slerp(a, b, 0.5)["x"] - by_layer).max() > 0.1
  zero = averages.slerp(vector(0, 0), vector(2, 4), 0.25)["x"]
  np.testing.assert_allclose(zero, [0.5, 1])


def test_task_vectors_are_added_to_the_base():
  base, tasks = vector(1, 1), [vector(1, 0), vector(2, -4)]
  np.testing.assert_allclose(averages.add_tasks(base, tasks, 0.5)["x"], [2.5, -1])
  np.testing.assert_array_equal(averages.add_tasks(base, tasks, 0.0)["x"], base["x"])


def test_ties_is_trim_elect_and_disjoint_mean():
  """Yadav et al. 2023, section 4.2, by hand: of each task the 3 largest of 5 stay.

  trimmed: [3, -2, 0, 5, 0], [-1, -4, 0, 0, 2] and [2, 0, 3, -6, 0]; signs of the sums: + - + - +;
  means of those that agree: (3 + 2) / 2, (-2 - 4) / 2, 3, -6, 2.
  """
  tasks = [vector(3, -2, 1, 5, -1), vector(-1, -4, 0.5, 0.5, 2), vector(2, 1, 3, -6, 1)]
  expected = np.array([2.5, -3, 3, -6, 2])
  merged = averages.merge_ties(vector(1, 1, 1, 1, 1), tasks, 1.0, 0.6)["x"]
  np.testing.assert_allclose(merged, 1 + expected)
  merged = averages.merge_ties(vector(0, 0, 0, 0, 0), tasks, 0.5, 0.6)["x"]
  np.testing.assert_allclose(merged, 0.5 * expected)


def test_ties_trims_over_all_parameters_and_opposites_cancel():
  task = {"a": np.array([1, 2], "f"), "b": np.array([10, 20], "f")}
  zero = {name: 0 * x for name, x in task.items()}
  merged = averages.merge_ties(zero, [task], 1.0, 0.5)
  np.testing.assert_array_equal(merged["a"], [0, 0])
  np.testing.assert_array_equal(merged["b"], [10, 20])
  opposite = averages.merge_ties(vector(7), [vector(2), vector(-2)], 1.0, 1.0)
  np.testing.assert_array_equal(opposite["x"], [7])


def test_dare_drops_a_share_and_keeps_the_expectation():
  task = {"x": np.full(20_000, 2.0, np.float32)}
  dropped = averages.drop_and_rescale(task, 0.75, (1, 0))["x"]
  np.testing.assert_allclose(np.unique(dropped), [0, 8])
  # Five standard deviations of the share of 20,000 draws.
  assert abs((dropped == 0).mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 20_000)
  assert abs(dropped.mean() - 2) < 5 * 8 * np.sqrt(0.75 * 0.25 / 20_000)
  np.testing.assert_array_equal(dropped, averages.drop_and_rescale(task, 0.75, (1, 0))["x"])
  for seed in ((2, 0), (1, 1)):
    assert (dropped != averages.drop_and_rescale(task, 0.75, seed)["x"]).any()
  np.testing.assert_array_equal(averages.drop_and_rescale(task, 0.0, (1, 0))["x"], task["x"])


@pytest.fixture(scope="module")
def runs(tiny_config, random_params, tmp_path_factory):
  """The names of checkpoints: a base, two models of it, and some that do not go with them."""
  folder = tmp_path_factory.mktemp("average")
  (folder / "text.txt").write_text(TEXT)
  config = tiny_config(**LLAMA | {"vocab_size": VOCAB_SIZE})
  found = {"text": str(folder / "text.txt")}
  for seed, name in enumerate(("base", "a", "b")):
    found[name] = save(folder / name, config, random_params(config, seed))
  wide = tiny_config(**LLAMA | {"vocab_size": VOCAB_SIZE, "mlp_dim": 48})
  found["wide"] = save(folder / "wide", wide, random_params(wide))
  larger = tiny_config(**LLAMA | {"vocab_size": 270})
  for name, text in (("dogs", TEXT), ("cats", "one cat and another cat watch a third cat. ")):
    # As many tokens, but not the same.
    bpe = tokenizers.train("bpe:270", [text])
    found[name] = save(folder / name, larger, random_params(larger), tokenizer=bpe)
    chat = bpe.with_chat_template("{{ messages }}")
    found[f"{name}-chat"] = save(folder / f"{name}-chat", larger, random_params(larger), None, chat)
  for labels in (("no", "yes"), ("yes", "no"), ("no", "yes", "perhaps")):
    changes = {"vocab_size": VOCAB_SIZE, "label_head.num_labels": len(labels)}
    labelled = tiny_config(**LLAMA | changes)
    name = "-".join(labels)
    of = Labels("classification", labels)
    found[name] = save(folder / name, labelled, random_params(labelled), of)
  return found


OPTIONS = {
  "mean": {"weights": (3.0, 1.0)},
  "slerp": {"fraction": 0.25},
  "task": {"scale": 0.5},
  "ties": {"density": 0.3},
  "dare": {"drop": 0.5, "seed": 3},
}


@pytest.mark.parametrize(
  "method",
  [
    one if one in ("mean", "ties") else pytest.param(one, marks=pytest.mark.slow) for one in METHODS
  ],
)
def test_every_method_writes_a_model(runs, method, tmp_path):
  options = dict(OPTIONS.get(method, {}))
  if "base" in METHODS[method]:
    options["base"] = runs["base"]
  if method == "greedy":
    options = {"data": runs["text"], "rows": 3, "length": 16}
  names = [runs["a"], runs["b"]]
  found = average(names, tmp_path / "to", method=method, progress=False, **options)
  model, tokenizer = load_model(tmp_path / "to")
  assert found.parameters == sum(x.size for x in params_of(model).values())
  assert set(found.ingredients) <= set(names)
  assert np.isfinite(model(np.array([tokenizer.encode("the")]))).all()


@pytest.mark.slow
def test_what_is_averaged_pruned_and_cut_writes_text(runs, tmp_path):
  """Each result is a checkpoint like any other, which the next step reads."""
  text = {"data": runs["text"], "rows": 3, "length": 16}
  average([runs["a"], runs["b"]], tmp_path / "mean", method="mean", progress=False)
  sizes = Sizes(layers=1, mlp_dim=16, kv_heads=1, embed_dim=12)
  shrink(tmp_path / "mean", tmp_path / "small", sizes, progress=False, **text)
  options = {"method": "sparsegpt", "sparsity": "2:4", "progress": False}
  prune(tmp_path / "small", tmp_path / "sparse", **options, **text)
  model, tokenizer = load_model(tmp_path / "sparse")
  assert generate(model, tokenizer, ["the"], max_tokens=2)[0].tokens


def of(run):
  return {name: np.asarray(x) for name, x in params_of(load_model(run)[0]).items()}


def test_the_mean_of_one_is_that_one_and_no_task_is_the_base(runs, tmp_path):
  average([runs["a"]], tmp_path / "one", method="mean", progress=False)
  options = {"base": runs["base"], "scale": 0.0, "progress": False}
  average([runs["a"], runs["b"]], tmp_path / "none", method="task", **options)
  for found, expected in ((tmp_path / "one", runs["a"]), (tmp_path / "none", runs["base"])):
    expected = of(expected)
    for name, x in of(found).items():
      np.testing.assert_array_equal(x, expected[name])


def test_the_score_of_a_text_is_minus_its_loss(runs):
  model, _ = load_model(runs["a"])
  tokens_RT = np.random.default_rng(0).integers(0, VOCAB_SIZE, (10, 12)).astype(np.int32)
  logits = np.asarray(model(tokens_RT[:, :-1]), np.float64)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = np.take_along_axis(logits, tokens_RT[:, 1:, None], -1).mean()
  score = averages.text_score(model.config, tokens_RT)
  np.testing.assert_allclose(score(params_of(model)), expected, rtol=1e-5)


def test_another_chat_template_is_no_other_tokenizer(runs, tmp_path):
  names = [runs["dogs-chat"], runs["dogs"]]
  average(names, tmp_path / "to", method="mean", progress=False)
  assert load_model(tmp_path / "to")[1].chat_template == "{{ messages }}"


def test_labels_go_along(runs, tmp_path):
  average([runs["no-yes"]] * 2, tmp_path / "to", method="mean", progress=False)
  assert labels_of(tmp_path / "to").names == ("no", "yes")


@pytest.mark.parametrize(
  ("names", "options", "sentence"),
  [
    (["a", "wide"], {}, "a and .*wide are other models: model.mlp_dim=32, not 48"),
    (["dogs", "cats"], {}, "dogs and .*cats have other tokens"),
    (["no-yes", "yes-no"], {}, "no-yes and .*yes-no have other labels"),
    (["no-yes", "no-yes-perhaps"], {}, "label_head.num_labels=2, not 3"),
    ([], {}, "--method=mean takes at least 1 checkpoints, not 0"),
    (["a", "b", "a"], {"method": "slerp"}, "--method=slerp takes exactly 2 checkpoints, not 3"),
    (["a"], {"method": "median"}, "--method: no choice 'median'"),
    (["a"], {"density": 0.5}, "--density is not an option of --method=mean"),
    (["a"], {"method": "ties"}, "--method=ties needs --base"),
    (["a", "b"], {"weights": (1.0,)}, "--weights has 1 numbers for 2 checkpoints"),
    (["a", "b"], {"weights": (1.0, -1.0)}, "--weights is -1.0"),
    (["a", "b"], {"weights": (0.0, 0.0)}, "the sum of --weights is 0.0"),
    (["a", "b"], {"method": "slerp", "fraction": 1.5}, "--fraction is 1.5"),
    (["a"], {"method": "ties", "base": "x", "density": 0.0}, "--density is 0.0"),
    (["a"], {"method": "dare", "base": "x", "drop": 1.0}, "--drop is 1.0"),
    (["a"], {"method": "greedy"}, "--method=greedy needs --data, text to score"),
    (["a"], {"ema": True}, "holds no 'ema' weights"),
  ],
)
def test_what_cannot_be_averaged_is_named(runs, names, options, sentence, tmp_path):
  checkpoints, options = [runs[name] for name in names], {"method": "mean"} | options
  with pytest.raises(UserError, match=sentence):
    average(checkpoints, tmp_path / "to", progress=False, **options)
  assert not (tmp_path / "to").exists()


def test_a_model_of_labels_has_no_next_token(tiny_config):
  config = tiny_config(**{"label_head.num_labels": 2})
  with pytest.raises(UserError, match="scores models by the loss of the next token"):
    averages.text_score(config, np.zeros((1, 2), np.int32))


def test_moving_averages_are_taken_if_asked_for(tiny_config, random_params, tmp_path):
  config = tiny_config(vocab_size=VOCAB_SIZE)
  weights, ema = (merge(config, random_params(config, seed)) for seed in (0, 1))
  run = save(tmp_path / "run", config, params_of(weights))
  state = {"params": nnx.state(weights, nnx.Param), "ema": nnx.state(ema, nnx.Param)}
  with Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, {name: nnx.to_pure_dict(one) for name, one in state.items()})
    checkpoints.wait()
  average([run], tmp_path / "to", method="mean", ema=True, progress=False)
  expected = params_of(ema)
  for name, x in of(tmp_path / "to").items():
    np.testing.assert_array_equal(x, expected[name])
