"""Sweep files: the trials they make, and what is said of one that cannot be run."""

import textwrap
from pathlib import Path

import pytest

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.sweeps import definition
from gptjax.sweeps.definition import changed_keys, cross, load, seeds
from gptjax.sweeps.study import sample_trial

ROOT = Path(__file__).parents[2]
BASE = f"""
from gptjax import config
from gptjax.sweeps.definition import cross, seeds

def base():
  return config.load("{ROOT}/configs/pretrain.py:model=debug,data=stdlib", {{"batch_size": 8}})
"""
ARMS = """
def sweep():
  return cross({"a": {}, "b": {"model": {"num_layers": 1, "mlp_dim": 8}}}, seeds(2))
"""
SEARCH = """
def search(trial):
  return {"optim": {"learning_rate": trial.suggest_float("rate", 1e-4, 1e-2)}}
"""


@pytest.fixture
def read(tmp_path):
  """Returns a function that loads a sweep file of this text, after the base."""

  def make(text, overrides=None, base=BASE):
    path = tmp_path / "question" / "sweep.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'"""Why?"""\n{base}\n{textwrap.dedent(text)}')
    return load(str(path), overrides or {}, sample_trial)

  return make


def test_axes_are_crossed_and_seeds_stay_out_of_the_name():
  pairs = list(cross({"a": {}, "b": {"x": {"y": 1}}}, {"c": {"z": 2}}, seeds((3, 5))))
  assert pairs == [
    ("a,c", {"z": 2, "seed": 3}),
    ("a,c", {"z": 2, "seed": 5}),
    ("b,c", {"x.y": 1, "z": 2, "seed": 3}),
    ("b,c", {"x.y": 1, "z": 2, "seed": 5}),
  ]
  assert list(cross(seeds(1))) == [("base", {"seed": 0})]
  with pytest.raises(UserError, match=r"two axes of arm 'a,b' set 'x\.y'"):
    list(cross({"a": {"x.y": 1}}, {"b": {"x": {"y": 2}}}))


def test_a_sweep_has_a_checked_config_for_every_trial(read):
  sweep = read(ARMS, {"batch_size": "16"})
  assert list(sweep.trials) == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
  trial = sweep.trials["b-seed1"]
  assert (trial.arm, trial.seed) == ("b", 1)
  assert trial.overrides == {"model.num_layers": 1, "model.mlp_dim": 8, "seed": 1}
  assert (trial.config.seed, trial.config.model.num_layers, trial.config.batch_size) == (1, 1, 16)
  assert sweep.trials["a-seed0"].config.model.num_layers == 2
  assert sweep.to_json() == {
    "name": "question",
    "question": "Why?",
    "baseline": "a",
    "metric": "val/bits_per_byte",
    "search": None,
  }


def test_a_search_makes_its_trials_as_they_are_suggested(read):
  sweep = read("SEARCH = {'trials': 3, 'sampler': 'random'}" + SEARCH)
  assert list(sweep.trials) == ["trial-0000", "trial-0001", "trial-0002"]
  trial = sweep.trial("trial-0001", sample_trial())
  assert trial.folder == "trial-0001-seed0"
  assert trial.config.optim.learning_rate == trial.overrides["optim.learning_rate"]


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("", r"has base\(\), and one of sweep\(\) and search"),
    (ARMS + SEARCH, r"one of sweep\(\) and search"),
    ("def sweep(): return []", r"sweep\(\) yields no trials"),
    (
      "def sweep(): yield 'a', {}; yield 'b', {'model.num_layer': 3}",
      r"arm 'b': no config key 'model\.num_layer'\. Did you mean 'model\.num_layers'",
    ),
    ("def sweep(): yield 'a', {'model.num_heads': 5}", r"arm 'a': model\.embed_dim=32 is not div"),
    ("def sweep(): yield 'a', {'batch_size': 7}", r"arm 'a': batch_size=7 does not divide"),
    ("def sweep(): yield 'a', {'optim.name': 'adamx'}", r"arm 'a': .*no algorithm 'adamx'"),
    ("def sweep(): yield 'a', {'task.fim_rate': 2.0}", r"arm 'a': task\.fim_rate is 2\.0; it must"),
    ("def sweep(): yield 'a', {}; yield 'a', {}", r"arm 'a' has seed 0 twice"),
    ("def sweep(): yield 'a b', {}; yield 'a/b', {}", r"'a b' and 'a/b' both make the folder"),
    (
      "def sweep(): yield 'a', {}; yield 'a', {'seed': 1, 'task.z_loss': 0.1}",
      r"arm 'a' has different overrides by seed",
    ),
    ("BASELINE = 'c'" + ARMS, r"BASELINE: no arm 'c'"),
    (
      "METRIC = 'val/los'" + ARMS,
      r"METRIC: no metric 'val/los' of task='next_token'\. Did you mean 'val/loss'",
    ),
    (
      "METRIC = 'val/accuracy'" + SEARCH,
      r"arm 'search': METRIC: no metric 'val/accuracy' of task='next_token'",
    ),
    (
      "METRIC = 'val/spearman'" + ARMS,
      r"arm 'a': METRIC: no metric 'val/spearman' of task='next_token'",
    ),
    ("def sweep(): yield 'a', {'eval.patience': -1}", r"arm 'a': eval\.patience=-1 is negative"),
    ("SEARCH = {'sampler': 'tpee'}" + SEARCH, r"SEARCH\['sampler'\]: no sampler 'tpee'. Did you"),
    ("SEARCH = {'prunner': 'none'}" + SEARCH, r"SEARCH: no key 'prunner'\. Did you mean 'pruner'"),
    ("SEARCH = {'trials': 0}" + SEARCH, r"SEARCH\['trials'\]=0 is not a whole number"),
    ("def search(trial): return {'optim.rate': 1.0}", r"no config key 'optim\.rate'"),
    ("def base(): pass" + ARMS, r"base\(\) made NoneType, not a config"),
    ("def base(): return 1 / 0" + ARMS, "ZeroDivisionError: division by zero\n  def base"),
  ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(read, text, sentence):
  with pytest.raises(UserError, match=rf"sweep\.py:.*{sentence}"):
    read(text)


@pytest.fixture
def labelled(tmp_path):
  """The base of a fine-tuning of which the training file has two labels."""
  path = tmp_path / "train.jsonl"
  path.write_text('{"text": "a", "label": "yes"}\n{"text": "b", "label": "no"}\n')
  small = {"tokenizer": "bytes", "data.path": str(path), "data.validation_path": str(path)}
  argument = "task=classification,model=debug"
  return f"""
from gptjax import config
from gptjax.sweeps.definition import cross, seeds

def base():
  return config.load("{ROOT}/configs/finetune.py:{argument}", {small})
"""


@pytest.mark.parametrize(
  ("metric", "overrides", "found"),
  [
    ("", {}, "val/accuracy"),  # That of the checkpoint, since the best one is what a run makes.
    ("", {"checkpoint.best_metric": "val/mcc"}, "val/mcc"),
    ("", {"checkpoint.final": "newest"}, "val/accuracy"),
    ("", {"checkpoint.final": "newest", "checkpoint.best_metric": ""}, "val/loss"),
    ("METRIC = 'val/f1_macro'", {}, "val/f1_macro"),
  ],
)
def test_a_metric_of_labels_is_one_that_the_validation_tells(
  metric, overrides, found, read, labelled
):
  arms = "\ndef sweep(): return seeds(2)"
  assert read(metric + arms, overrides, base=labelled).metric == found


def test_the_example_of_the_docstring_can_be_started(read, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  for name in ("train", "validation"):
    (tmp_path / f"{name}.jsonl").write_text(
      '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
    )
  example = textwrap.dedent(definition.__doc__[definition.__doc__.index("    from gptjax") :])
  model = {"num_layers": 1, "embed_dim": 8, "num_heads": 1, "mlp_dim": 8}
  changes = {"init_from": "", "tokenizer": "bytes"}
  changes |= {f"model.{key}": value for key, value in model.items()}
  sweep = read("", changes, base=example.replace("PATH", str(tmp_path)))
  assert (len(sweep.trials), sweep.metric) == (10, "val/accuracy")


def test_a_metric_of_another_task_is_refused(read, labelled):
  sentence = r"METRIC: no metric 'val/spearman' of task='classification'"
  with pytest.raises(UserError, match=sentence):
    read("METRIC = 'val/spearman'\ndef sweep(): return seeds(2)", base=labelled)


def test_text_is_compared_by_bits_per_byte_unless_the_best_checkpoint_is_made(read):
  assert read(ARMS).metric == "val/bits_per_byte"
  assert read(ARMS, {"checkpoint.final": "best"}).metric == "val/loss"


def test_a_file_that_is_not_there_is_named():
  with pytest.raises(UserError, match=r"--sweep: no file 'nowhere\.py'"):
    load("nowhere.py", {}, sample_trial)


def test_changed_keys_are_named(read):
  config = read(ARMS).trials["a-seed0"].config
  before = config.to_dict()
  assert changed_keys(config_lib.json.loads(config_lib.to_json(config)), config) == []
  before["optim"]["b1"] = 0.5
  assert "optim.b1 was 0.5 and is 0.9" in changed_keys(before, config)
