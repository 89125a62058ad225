import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.show import describe_row, text_of

ROOT = Path(__file__).parents[1]
BYTES = tokenizers.load("bytes")
END = BYTES.end_of_text


@pytest.fixture(scope="module")
def row():
  """Two segments and a place of padding."""
  return Batch(
    inputs=np.array([*b"Q:", *"é".encode(), *b"Q", 0], np.int32),
    targets=np.array([*b":", *"é".encode(), END, *b"A", 0], np.int32),
    weights=np.array([0, 1, 1, 1, 0, 0], np.float32),
    segment_ids=np.array([1, 1, 1, 1, 2, 0], np.int32),
    positions=np.array([0, 1, 2, 3, 0, 0], np.int32),
  )


def test_what_is_learnt_is_between_marks(row):
  assert list(describe_row(row, BYTES, colours=False)) == [
    "2 segments in 5 of 6 places, 3 targets learnt",
    "--- segment 1: 4 targets, 3 learnt",
    "Q:⟦é<|endoftext|>⟧",
    "--- segment 2: 1 targets, 0 learnt",
    "QA",
  ]


def test_a_terminal_gets_colours(row):
  lines = list(describe_row(row, BYTES, colours=True))
  assert lines[2] == "\033[2mQ:\033[0m\033[1;32mé<|endoftext|>\033[0m"


def test_special_tokens_are_shown_by_name():
  assert text_of(BYTES, [*b"a", END, *"谁".encode()]) == "a<|endoftext|>谁"


def run(*arguments):
  command = [sys.executable, "-m", "gptjax.show", *arguments, "--config.tokenizer=bytes"]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_program_shows_a_row(tmp_path):
  path = tmp_path / "chats.jsonl"
  records = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(2)]
  path.write_text("\n".join(map(json.dumps, records)))

  def show(*arguments):
    return run(
      *("--config=configs/finetune.py:model=tiny", f"--config.data.path={path}"),
      *("--config.data.validation_fraction=0.5", f"--config.data.cache_dir={tmp_path}"),
      *("--config.task.chat_template=alpaca", "--config.batch_size=1", *arguments),
    )

  # There is one row, so that the fourth is that of a later epoch.
  shown = show("--row=3").stdout.splitlines()
  assert shown[0].startswith("row 3, of step 4: 1 segments in ")
  assert shown[1].endswith(" 3 learnt")
  number = shown[5].removesuffix("?")
  assert shown[6:] == ["", f"### Response:⟦{number}!<|endoftext|>⟧"]
  refused = show(f"--workdir={tmp_path}").stderr
  assert f"error: --workdir={tmp_path}: no run has kept its tokenizer there." in refused


TAGGED = {"tokens": ["Ada", "left"], "tags": ["B-PER", "O"]}


@pytest.mark.parametrize(
  ("argument", "record", "text", "label"),
  [
    ("task=classification", {"text": "so so", "label": "bad"}, "so so⟦<|endoftext|>⟧", '= "bad"'),
    ("task=tagging", TAGGED, "Ad⟦a⟧ lef⟦t⟧", '= ["B-PER", "O"]'),
    ("task=prompt", {"q": "1+1", "a": "2"}, "1+1⟦2<|endoftext|>⟧", ""),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ("task=multi_label", {"text": "so", "label": ["a", "b"]}, "so⟦<|end", '= ["a", "b"]'),
        ("task=regression", {"text": "so", "label": 2.5}, "so⟦<|end", "= 2.5"),
        ("task=text", {"text": "some text"}, "⟦some text<|endoftext|>⟧", ""),
      )
    ),
  ],
)
def test_rows_of_each_task_are_shown(argument, record, text, label, tmp_path):
  path = tmp_path / "records.jsonl"
  others = [{**record, "label": "good"} if label == '= "bad"' else record] * 2
  path.write_text("".join(f"{json.dumps(one)}\n" for one in [record, *others]))
  (tmp_path / "q.jinja").write_text("{{ q }}")
  prompt = (f"--config.task.prompt={tmp_path}/q.jinja", "--config.task.answer={{ a }}")
  shown = run(
    *(f"--config=configs/finetune.py:model=tiny,{argument}", f"--config.data.path={path}"),
    *(f"--config.data.validation_path={path}", f"--config.data.cache_dir={tmp_path}"),
    *(
      "--config.sequence_length=20",
      "--config.batch_size=3",
      *(prompt if "prompt" in argument else ()),
    ),
  )
  assert shown.returncode == 0, shown.stderr
  assert text in shown.stdout
  assert label in shown.stdout


def test_a_row_of_a_model_to_start_from_is_shown(tmp_path):
  """The tokenizer, the model and the task that `init_from` settles."""
  model = {"num_layers": 1, "embed_dim": 8, "num_heads": 1, "mlp_dim": 8, "vocab_size": 264}
  (tmp_path / "run").mkdir()
  config = {"model": model, "tokenizer": "bytes", "task": {"name": "next_token"}}
  (tmp_path / "run/config.json").write_text(json.dumps(config))
  (tmp_path / "corpus.jsonl").write_text('{"text": "one text"}\n{"text": "one text"}\n')
  shown = run(
    *("--config=configs/finetune.py:task=text", f"--config.init_from={tmp_path}/run"),
    *("--config.sequence_length=8", f"--config.data.path={tmp_path}/corpus.jsonl"),
    f"--config.data.cache_dir={tmp_path}",
  )
  assert "⟦one text⟧" in shown.stdout, shown.stderr
