import pytest

from gptjax.data import sources
from gptjax.data.options import read_options
from gptjax.errors import UserError
from gptjax.objectives.task import make_task
from gptjax.presets.parts import data as presets


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"source": "txt"}, "data.source: no source 'txt'. Did you mean 'text'"),
    ({"undecodable": "skp"}, "data.undecodable: no policy 'skp'. Did you mean 'skip'"),
    (
      {"validation_fraction": 0.0},
      "data.validation_fraction is 0.0; it must be above 0 and below 1",
    ),
    ({"seed": -1}, "seed is -1; it must be at least 0"),
    ({"seed": 2**64}, "must be at least 0 and below 9223372036854775808"),
    ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ({"sequence_length": 0}, "sequence_length is 0; it must be at least 1"),
  ],
)
def test_a_bad_value_is_named_with_the_right_ones(make_config, changes, problem):
  with pytest.raises(UserError) as error:
    read_options(make_config(**changes))
  assert problem in str(error.value)


def test_a_corpus_needs_a_path_when_it_is_opened(make_config):
  options = read_options(make_config(path=""))
  with pytest.raises(UserError, match=r"data\.path: a 'text' source needs one\."):
    sources.open_pair(options.parts["text"])


@pytest.mark.parametrize(
  ("task", "key", "value", "problem"),
  [
    ("next_token", "fim_rate", 1.5, "task.fim_rate is 1.5; it must be at least 0 and at most 1"),
    ("next_token", "spm_rate", -1, "task.spm_rate is -1; it must be at least 0 and at most 1"),
    ("masked", "mask_rate", 0.0, "task.mask_rate is 0.0; it must be above 0 and below 1"),
    ("span_corruption", "mean_span", 0.5, "task.mean_span is 0.5; it must be at least 1"),
    ("chat", "train_on", "al", "task.train_on: no choice 'al'. Did you mean 'all'"),
    ("prompt", "overlong", "cut", "task.overlong: no choice 'cut'. Choose one of: drop, truncate"),
    ("classification", "class_weights", "x", "task.class_weights: no choice 'x'"),
    (
      "classification",
      "label_smoothing",
      1.0,
      "task.label_smoothing is 1.0; it must be at least 0 and below 1",
    ),
    ("regression", "r_drop", -1.0, "task.r_drop is -1.0; it must be at least 0"),
    ("prefix", "fim_rate", 0.5, "task.fim_rate is no option of task='prefix'. Choose one of: z_l"),
    ("chat", "mask_rate", 0.5, "task.mask_rate is no option of task='chat'"),
    ("maskd", "z_loss", 0.0, "task: no task 'maskd'. Did you mean 'masked'"),
  ],
)
def test_a_task_refuses_an_option_that_it_cannot_use(task, key, value, problem):
  with pytest.raises(UserError) as error:
    make_task({"name": task, key: value})
  assert problem in str(error.value)


def test_a_task_of_records_refuses_plain_text(make_config):
  config = make_config(task="chat")
  options = read_options(config)
  with pytest.raises(UserError, match=r"data part 'text': a 'text' source has no rec"):
    make_task(config.task).open_pair(options.parts["text"], options)


@pytest.mark.parametrize("weight", [0, -1.0])
def test_a_part_needs_a_weight_above_zero(make_config, weight):
  config = make_config(preset="stdlib+tiny_shakespeare")
  config.data.mixture.stdlib.weight = weight
  with pytest.raises(UserError, match=r"data\.mixture\.stdlib\.weight is .* above 0"):
    read_options(config)


def test_a_part_needs_every_key(make_config):
  config = make_config(mixture={"mine": {"source": "stdlib", "weight": 1.0}})
  with pytest.raises(UserError, match=r"data\.mixture\.mine: no key 'path'"):
    read_options(config)


@pytest.mark.parametrize("name", presets.DATA)
def test_presets_are_whole(make_config, name):
  config = make_config(preset=name)
  config.data.path = config.data.path or "somewhere"
  (part,) = read_options(config).parts.values()
  assert part.source == config.data.source


def test_presets_compose():
  mixture = presets.get("stdlib+fineweb")["mixture"]
  assert {name: part["weight"] for name, part in mixture.items()} == {"stdlib": 1, "fineweb": 1}
  with pytest.raises(UserError, match=r"no data preset 'finewb'\. Did you mean 'fineweb'"):
    presets.get("stdlib+finewb")
  with pytest.raises(UserError, match="names a part twice"):
    presets.get("stdlib+stdlib")
