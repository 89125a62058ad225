"""Answers of a model, which a script gives here, are extracted and judged."""

import dataclasses

import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.evals import answers, sandbox
from gptjax.evals.score import Score
from gptjax.evals.subject import Subject
from gptjax.evals.task import load_task

LABELS = {"pos": " positive", "neg": " not positive"}
SENTIMENT = {"kind": "classification", "prompt": "sentiment.jinja", "target": "label"}
TEST = [
  {"text": text, "label": label} for text, label in [("A", "pos"), ("B", "neg"), ("C", "neg")]
]


@dataclasses.dataclass(frozen=True)
class Scripted(Subject):
  """Answers by the last text of a prompt in `script`, and keeps what it was asked."""

  script: dict = dataclasses.field(default_factory=dict)
  asked: list = dataclasses.field(default_factory=list)

  def _find(self, prompt):
    self.asked.append(prompt)
    texts = [text for text in self.script if f" {text}\n" in f"{prompt}\n" and text]
    return self.script[max(texts, key=prompt.rfind, default="")]

  def likelihoods(self, prompts, *, end_of_text=False):
    return [
      Score(float(np.log(self._find(prompt)[text])), len(text.split()), False)
      for prompt, text in prompts
    ]

  def write(self, prompts, **options):
    return [self._find(prompt) for prompt in prompts]


@pytest.fixture
def run(write_task):
  def run(script, examples, *, train=None, shots=0, isolation=None, **settings):
    subject = Scripted(None, None, script=script)
    task = load_task(write_task(examples, train, **settings))
    questions = answers.prepare(task, shots=shots, isolation=isolation)
    return answers.evaluate(questions, subject, resamples=20), subject

  return run


def row(positive, negative):
  return dict(zip(LABELS.values(), (positive, negative), strict=True))


# --- Classification ----------------------------------------------------------------------------


def test_the_likeliest_label_is_the_answer(run):
  script = {"A": row(0.3, 0.1), "B": row(0.1, 0.4), "C": row(0.2, 0.05)}
  result, _ = run(script, TEST, labels=LABELS, **SENTIMENT)
  assert [one["prediction"]["label"] for one in result.predictions] == ["pos", "neg", "pos"]
  assert [one["target"] for one in result.predictions] == ["pos", "neg", "neg"]
  assert result.confidence == pytest.approx([0.75, 0.8, 0.8])
  assert result.metrics["accuracy"].value == pytest.approx(2 / 3)
  assert result.metrics["ece"].n == 3
  assert result.details["confusion"] == [[1, 0], [1, 1]]
  assert result.predictions[1]["place"].endswith("data.jsonl:2")


@pytest.mark.parametrize(
  ("normalize", "label"), [("none", "pos"), ("tokens", "neg"), ("bytes", "neg")]
)
def test_a_long_label_can_be_compared_with_a_short_one(run, normalize, label):
  # A token of ' not positive' is likelier than the one of ' positive'.
  script = {"A": row(0.3, 0.2), "B": row(0.1, 0.4), "C": row(0.1, 0.4)}
  result, _ = run(script, TEST, labels=LABELS, normalize=normalize, **SENTIMENT)
  assert result.predictions[0]["prediction"]["label"] == label


def test_calibration_divides_by_what_a_text_that_says_nothing_gets(run):
  # Always 'positive', but of B and C less so than of nothing (0.8 : 0.2 in the mean).
  script = {"A": row(0.9, 0.1), "B": row(0.7, 0.3), "C": row(0.6, 0.4)}
  script |= {"N/A": row(0.9, 0.1), "[MASK]": row(0.8, 0.2), "": row(0.07, 0.03)}
  result, subject = run(script, TEST, labels=LABELS, calibrate=True, **SENTIMENT)
  assert [one["prediction"]["label"] for one in result.predictions] == ["pos", "neg", "neg"]
  assert result.details["content_free"] == pytest.approx({"pos": 0.8, "neg": 0.2})
  assert result.confidence[1] == pytest.approx((0.3 / 0.2) / (0.7 / 0.8 + 0.3 / 0.2))
  assert subject.asked[-1] == "Review: \nSentiment:"
  assert len(result.predictions) == 3


def test_a_label_is_read_from_what_was_written(run):
  script = {"A": " Positive.", "B": "not positive, I think", "C": "positively awful"}
  result, _ = run(script, TEST, labels=LABELS, by="generation", **SENTIMENT)
  labels = [one["prediction"]["label"] for one in result.predictions]
  assert labels == ["pos", "neg", answers.UNANSWERED]
  assert result.details["unanswered"] == 1
  assert result.metrics["accuracy"].value == pytest.approx(2 / 3)
  assert "ece" not in result.metrics


def test_shots_come_before_the_question_with_their_answers(run):
  train = [{"text": "T1", "label": "pos"}, {"text": "T2", "label": "neg"}]
  script = dict.fromkeys(("A", "B", "C"), row(0.9, 0.1))
  result, subject = run(
    script, TEST, train=train, shots=2, labels=LABELS, instruction="Judge.", **SENTIMENT
  )
  shown = subject.asked[0]
  assert shown.startswith("Judge.\n\nReview: T")
  assert "Review: T1\nSentiment: positive\n\nReview: " in shown
  assert "Review: T2\nSentiment: not positive\n\nReview: " in shown
  assert shown.endswith("\n\nReview: A\nSentiment:")
  assert sorted(place.rpartition(":")[2] for place in result.details["shots"]) == ["1", "2"]


def test_labels_that_are_numbers_are_ranked(run):
  labels = {"1": " one", "2": " two", "3": " three"}
  examples = [{"text": text, "label": number} for text, number in (("A", 1), ("B", 2), ("C", 3))]
  script = {
    "A": {" one": 0.8, " two": 0.1, " three": 0.1},
    "B": {" one": 0.5, " two": 0.3, " three": 0.2},
    "C": {" one": 0.4, " two": 0.3, " three": 0.3},
  }
  result, _ = run(script, examples, labels=labels, **SENTIMENT)
  assert result.metrics["spearman"].value == pytest.approx(1)
  assert result.metrics["accuracy"].value == pytest.approx(1 / 3)


def test_only_the_metrics_asked_for(run):
  script = dict.fromkeys(("A", "B", "C"), row(0.9, 0.1))
  result, _ = run(script, TEST, labels=LABELS, metrics=["mcc"], **SENTIMENT)
  assert list(result.metrics) == ["mcc"]


# --- Ranking -----------------------------------------------------------------------------------

MOVIES = {"kind": "ranking", "prompt": "recommendation.jinja", "candidates": "of", "target": "next"}
OFFERED = [
  {"titles": ["X", "A"], "of": ["Ronin", "Big Fish", "Up"], "next": "Big Fish"},
  {"titles": ["B"], "of": ["Up", "Ronin"], "next": ["Ronin"]},
  {"titles": ["C"], "of": ["Up", "Big Fish"], "next": 1},
]
OPINIONS = {
  "A": {" Ronin": 0.5, " Big Fish": 0.3, " Up": 0.1},
  "B": {" Ronin": 0.5, " Up": 0.1},
  "C": {" Up": 0.2, " Big Fish": 0.2},
}


def test_each_example_ranks_its_own_candidates(run):
  result, subject = run(OPINIONS, OFFERED, k=[1, 2], **MOVIES)
  assert subject.asked[0] == "Bought: X; A\nNext:"
  predicted = [one["prediction"] for one in result.predictions]
  assert [one["ranking"] for one in predicted] == [
    ["Ronin", "Big Fish", "Up"],
    ["Ronin", "Up"],
    ["Up", "Big Fish"],  # tied
  ]
  assert predicted[0]["scores"] == pytest.approx(np.log([0.5, 0.3, 0.1]))
  values = {name: metric.value for name, metric in result.metrics.items()}
  assert list(values) == ["accuracy", "hit@2", "mrr", "ndcg", "accuracy_of_chance"]
  assert values["accuracy"] == pytest.approx(1 / 3)
  assert values["mrr"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
  assert values["accuracy_of_chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
  assert result.metrics["mrr"].low < result.metrics["mrr"].high


def test_a_long_candidate_can_be_compared_with_a_short_one(run):
  result, _ = run(OPINIONS, OFFERED, normalize="tokens", metrics=["accuracy"], **MOVIES)
  assert result.predictions[0]["prediction"]["ranking"] == ["Big Fish", "Ronin", "Up"]
  assert {name: one.value for name, one in result.metrics.items()} == {"accuracy": 1}


def test_what_is_likely_in_the_domain_counts_for_less(run):
  prior = {"": {" Ronin": 0.8, " Big Fish": 0.4, " Up": 0.1}}
  result, subject = run(OPINIONS | prior, OFFERED, domain_premise="Next:", **MOVIES)
  predicted = [one["prediction"] for one in result.predictions]
  assert predicted[0]["ranking"] == ["Up", "Big Fish", "Ronin"]
  assert predicted[0]["scores"] == pytest.approx(np.log([0.1 / 0.1, 0.3 / 0.4, 0.5 / 0.8]))
  assert subject.asked.count("Next:") == 3  # once a text


def test_a_worked_example_shows_what_is_right(run):
  train = [{"titles": ["T"], "of": ["Up", "Ronin"], "next": 1}]
  _, subject = run(OPINIONS, OFFERED, train=train, shots=1, **MOVIES)
  assert subject.asked[-1] == "Bought: T\nNext: Ronin\n\nBought: C\nNext:"


# --- Texts -------------------------------------------------------------------------------------


def test_questions_are_answered_by_writing(run):
  examples = [
    {"context": "c", "question": "A", "answer": ["Paris", "paris, France"]},
    {"context": "c", "question": "B", "answer": "London"},
  ]
  settings = {"kind": "question_answering", "prompt": "question_answering.jinja"}
  result, _ = run({"A": " Paris, France \n", "B": "Rome"}, examples, target="answer", **settings)
  assert result.metrics["exact_match"].value == 0.5


@pytest.mark.parametrize(("kind", "metric"), [("summarization", "rougeL"), ("translation", "bleu")])
def test_texts_that_are_there_already_are_scored_without_a_model(run, kind, metric):
  text = "今天天气很好，我们去公园。"
  examples = [{"gold": text, "mine": text}]
  result, subject = run({}, examples, kind=kind, target="gold", prediction="mine", language="zh")
  assert result.metrics[metric].value == pytest.approx(100 if metric == "bleu" else 1)
  assert subject.asked == []


def test_tags_are_scored_and_compared_in_length(run):
  settings = {"kind": "tagging", "target": "tags", "prediction": "found"}
  examples = [
    {"tags": ["B-PER", "O"], "found": ["B-PER", "O"]},
    {"tags": ["O"], "found": ["B-LOC"]},
  ]
  result, _ = run({}, examples, **settings)
  assert result.metrics["precision"].value == 0.5
  assert result.metrics["recall"].value == 1
  with pytest.raises(
    UserError, match=r"data.jsonl:1: 'found' is no list of as many tags as 'tags'"
  ):
    run({}, [{"tags": ["O", "O"], "found": ["O"]}], **settings)
  with pytest.raises(UserError, match=r"data.jsonl:1: 'tags' is not a list of tags"):
    run({}, [{"tags": "O", "found": ["O"]}], **settings)


# --- Code --------------------------------------------------------------------------------------


def test_programs_are_run_and_their_failures_counted(run):
  examples = [
    {"prompt": "# A\ndef add(a, b):\n", "name": "add", "test": "assert add(1, 2) == 3"},
    {"prompt": "# B\ndef mul(a, b):\n", "name": "mul", "test": "assert mul(2, 3) == 6"},
  ]
  result, _ = run(
    {"A": "  return a + b", "B": "  return a - b"},
    examples,
    kind="code",
    prompt="code.jinja",
    program="{{ prompt }}\n{{ completion }}",
    check="from program import {{ name }}\n{{ test }}",
    samples=2,
    k=[1, 2],
    isolation=sandbox.find_isolation(),
  )
  assert result.metrics["pass@1"].value == result.metrics["pass@2"].value == 0.5
  assert result.details["failures"] == {"It failed: AssertionError": 2}
  assert result.details["isolation"] == dataclasses.asdict(sandbox.find_isolation())
  assert [sample["passed"] for sample in result.predictions[0]["prediction"]] == [True, True]


def test_a_program_that_cannot_be_rendered_is_refused_before_the_model_writes(write_task):
  templates = {"program": "{{ completion }}", "check": "{{ test }}"}
  for key in templates:
    wrong = templates | {key: "{{ tests }}"}
    settings = {"kind": "code", "prompt": "code.jinja"} | wrong
    task = load_task(write_task([{"prompt": "a", "test": "b"}], **settings))
    with pytest.raises(UserError, match=f"task.json: {key}: .*jsonl:1: 'tests' is undefined"):
      answers.prepare(task, isolation=sandbox.Isolation("none"))
  with pytest.raises(UserError, match=r"runs what the model writes.*asked for: --run_code"):
    answers.prepare(task)


# --- Perplexity --------------------------------------------------------------------------------


def test_documents_are_files_or_lines(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
  documents = answers.prepare_perplexity(str(tmp_path / "a.jsonl")).documents
  assert [text for _, text in documents] == ["one", "two"]
  assert documents[1][0].endswith("a.jsonl:3")
  (tmp_path / "b.txt").write_text("whole\nfile")
  assert answers.prepare_perplexity(str(tmp_path / "b.txt")).documents[0][1] == "whole\nfile"
  (tmp_path / "c.txt").write_text("")
  with pytest.raises(UserError, match=r"c.txt: no text to evaluate on"):
    answers.prepare_perplexity(str(tmp_path / "c.txt"))


def test_perplexity_of_a_model(tmp_path, subject):
  (tmp_path / "a.jsonl").write_text('{"text": "A text of some length."}\n{"text": "Another"}\n')
  documents = answers.prepare_perplexity(str(tmp_path / "a.jsonl"))
  result = answers.perplexity(documents, subject, resamples=20)
  nats = sum(one["nats"] for one in result.predictions)
  assert result.details["tokens"] == 29
  assert result.metrics["perplexity"].value == pytest.approx(np.exp(nats / 29))
  assert result.metrics["bits_per_byte"].value == pytest.approx(nats / 29 / np.log(2))
