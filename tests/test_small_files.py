import os
import stat
import subprocess
import sys
import textwrap

import pytest
from etils import epath

from gptjax.errors import UserError
from gptjax.small_files import parse_json, plain_name, read_json, write_atomically


def test_a_file_is_replaced_whole_whatever_interrupts_the_write(tmp_path):
  path = tmp_path / "config.json"
  path.write_text("before")
  # The process dies where the content has been written and the name has not: after the sync.
  program = textwrap.dedent("""
    import os, signal, sys
    from gptjax.small_files import write_atomically

    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
    write_atomically(sys.argv[1], "after" * 1000)
  """)
  assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode < 0
  assert path.read_text() == "before"
  write_atomically(path, "after")
  assert path.read_text() == "after"


def test_nothing_is_left_beside_a_file_that_cannot_be_written(tmp_path, monkeypatch):
  def full(handle):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space"):
    write_atomically(tmp_path / "config.json", "{}")
  assert not any(tmp_path.iterdir())


def test_permissions_are_those_of_any_other_file(tmp_path):
  plain, ours = tmp_path / "plain", tmp_path / "ours"
  plain.write_text("")
  write_atomically(ours, b"")
  assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
  ours.chmod(0o640)
  write_atomically(ours, b"again")
  assert stat.S_IMODE(ours.stat().st_mode) == 0o640


def test_an_object_store_is_written_by_one_write(monkeypatch):
  written = {}
  monkeypatch.setattr(
    type(epath.Path("gs://bucket/run")),
    "write_bytes",
    lambda p, data: written.update({str(p): data}),
  )
  write_atomically(epath.Path("gs://bucket/run/config.json"), "{}")
  assert written == {"gs://bucket/run/config.json": b"{}"}


@pytest.mark.parametrize(
  "name", ["../victim.py", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", 3, None]
)
def test_a_name_that_leaves_its_folder_is_refused(name):
  with pytest.raises(UserError, match=r"index\.json: .* is not the name of a file in the same"):
    plain_name(name, "index.json")


def test_a_plain_name_passes():
  assert plain_name("model-00001-of-00002.safetensors", "index.json").startswith("model-")


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    ('{"a": 1,\n}', r"not JSON \(.*, line 2, column 1\)"),
    ("", "not JSON"),
    (b"\xff\xff", "not JSON"),
    ("[" * 100_000, "JSON that is nested too deep"),
    ("[" * 100_000 + "]" * 100_000, "JSON that is nested too deep"),
    ("1" * 5_000, "an integer of 5000 digits"),
    ("-" + "1" * 301, "an integer of 302 digits"),
  ],
)
def test_json_that_cannot_be_used_gets_one_sentence(tmp_path, content, reason):
  with pytest.raises(UserError, match=f"^x.json: {reason}"):
    parse_json(content, "x.json")
  path = tmp_path / "x.json"
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  with pytest.raises(UserError, match=reason):
    read_json(path)


def test_a_pipe_is_refused_instead_of_waiting_for_what_may_never_come(tmp_path):
  os.mkfifo(tmp_path / "pipe.json")
  with pytest.raises(UserError, match=r"pipe\.json: cannot be read \(a pipe, not a file\)"):
    read_json(tmp_path / "pipe.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
  with pytest.raises(UserError, match=r"missing.json: cannot be read \(No such file"):
    read_json(tmp_path / "missing.json")
