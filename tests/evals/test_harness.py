"""The real lm-eval on tasks of ours, without a network."""

import json

import pytest

from gptjax.errors import UserError
from gptjax.evals.evaluate import harness_rows
from gptjax.evals.score import encode_pair, rolling_windows
from gptjax.evals.subject import Subject

DOCUMENTS = [
  {"text": f"Review number {i} says {word}.", "label": i % 2}
  for i, word in enumerate(["good", "bad", "fine", "poor", "a" * 80])
]
CHOICES = [" positive", " negative"]
COMMON = """\
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
"""
TASKS = {
  "tiny_choice": """\
output_type: multiple_choice
doc_to_text: "{{text}} It is"
doc_to_target: label
doc_to_choice: [positive, negative]
metric_list: [{metric: acc}]
""",
  "tiny_rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
  "tiny_generation": """\
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{label}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
  """The module, imported without a network and with its caches in a folder that goes away."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
      patch.setenv(name, "1")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
    import datasets

    from gptjax.evals import harness

    datasets.disable_progress_bars()
    # It imports PyTorch to tell its version.
    patch.setattr(harness.evaluator, "add_env_info", lambda _: None)
    yield harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  data = folder / "data.jsonl"
  data.write_text("".join(f"{json.dumps(document)}\n" for document in DOCUMENTS))
  for name, text in TASKS.items():
    (folder / f"{name}.yaml").write_text(f"task: {name}\n" + COMMON % data + text)
  return folder


@pytest.fixture(scope="module")
def results(harness, folder, subject):
  return harness.run(subject, list(TASKS), include=str(folder))


def test_choices_are_those_of_the_likeliest_continuation(results, subject):
  tokenizer = subject.tokenizer
  right = 0
  for document in DOCUMENTS:
    pairs = [encode_pair(tokenizer, f"{document['text']} It is", choice) for choice in CHOICES]
    found = [one.log_likelihood for one in subject.score(pairs)]
    right += found[document["label"]] == max(found)
  assert results["results"]["tiny_choice"]["acc,none"] == right / len(DOCUMENTS)


def test_rolling_likelihood_is_that_of_whole_documents(results, subject):
  texts = [document["text"] for document in DOCUMENTS]
  assert len(texts[-1]) > subject.model.config.position.max_positions  # of more windows than one
  nats = -sum(one.log_likelihood for one in subject.score_documents(texts))
  bits = nats / 0.6931471805599453 / sum(map(len, texts))
  assert results["results"]["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits)


def test_a_row_is_made_of_every_metric(results):
  rows = harness_rows(results)
  found = {(task, name): metric for task, name, metric in rows}
  accuracy = found["tiny_choice", "acc"]
  error = results["results"]["tiny_choice"]["acc_stderr,none"]
  assert accuracy.high - accuracy.value == pytest.approx(1.96 * error)
  assert accuracy.n == len(DOCUMENTS)
  assert set(found) >= {("tiny_rolling", "bits_per_byte"), ("tiny_generation", "exact_match")}


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20])
def test_windows_are_those_of_lm_eval(harness, length):
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

  tokens = list(range(length))
  theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, -1, 8, 1))
  assert list(rolling_windows([-1], tokens, 8)) == list(theirs)


class Echo(Subject):
  """Answers with its prompt and the options that came with it."""

  def write(self, prompts, *, max_tokens, stop, sampling, seeds):
    texts = [self.tokenizer.decode(prompt) for prompt in prompts]
    return [f"{text} {max_tokens} {stop} {sampling.temperature}" for text in texts]


def test_requests_with_other_options_are_answered_in_their_order(harness, subject):
  from lm_eval.api.instance import Instance

  model = harness.HarnessModel(Echo(None, subject.tokenizer))
  sampled = {"until": "\n", "max_gen_toks": 5, "do_sample": True, "temperature": 0.5}
  greedy = {"until": ["a", "b"], "do_sample": False, "temperature": 0.7}
  asked = [("one", sampled), ("two", greedy), ("three", sampled), ("four", {})]
  requests = [Instance("generate_until", {}, one, i) for i, one in enumerate(asked)]
  assert model.generate_until(requests) == [
    "one 5 ['\\n'] 0.5",
    "two 256 ['a', 'b'] 0.0",
    "three 5 ['\\n'] 0.5",
    "four 256 [] 0.0",
  ]
  wrong = Instance("generate_until", {}, ("x", {"temprature": 1}), 0)
  with pytest.raises(UserError, match=r"generation_kwargs: no 'temprature'. Did you mean 'temper"):
    model.generate_until([wrong])


def test_an_unknown_task_is_refused(harness, subject, folder, monkeypatch):
  monkeypatch.setattr(harness, "TaskManager", lambda **_: type("", (), {"all_tasks": [*TASKS]}))
  with pytest.raises(UserError, match=r"no task 'tiny_chioce'. Did you mean 'tiny_choice'"):
    harness.run(subject, ["tiny_chioce"], include=str(folder))
  with pytest.raises(UserError, match="--lm_eval_include=nowhere is no folder"):
    harness.run(subject, ["x"], include="nowhere")


def test_it_is_a_model_of_lm_eval(harness):
  from lm_eval.api.model import LM

  assert issubclass(harness.HarnessModel, LM)
  assert harness.HarnessModel(Subject(None, None)).world_size == 1
