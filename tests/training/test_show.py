import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import tokenizer as tokenizers
from gptjax.data.batch import Batch
from gptjax.training.show import describe_row, text_of

ROOT = Path(__file__).parents[2]
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


def test_the_program_shows_a_row(tmp_path):
  path = tmp_path / "chats.jsonl"
  records = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(2)]
  path.write_text("\n".join(map(json.dumps, records)))

  def show(*arguments):
    command = [sys.executable, "-m", "gptjax.show", "--config=configs/finetune.py:model=tiny"]
    command += [f"--config.data.path={path}", "--config.data.validation_fraction=0.5"]
    command += [f"--config.data.cache_dir={tmp_path}", "--config.tokenizer=bytes"]
    command += ["--config.task.chat_template=alpaca", "--config.batch_size=1", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

  # There is one row, so that the fourth is that of a later epoch.
  shown = show("--row=3").stdout.splitlines()
  assert shown[0].startswith("row 3, of step 4: 1 segments in ")
  assert shown[1].endswith(" 3 learnt")
  number = shown[5].removesuffix("?")
  assert shown[6:] == ["", f"### Response:⟦{number}!<|endoftext|>⟧"]
  refused = show(f"--workdir={tmp_path}").stderr
  assert f"error: --workdir={tmp_path}: no run has kept its tokenizer there." in refused
