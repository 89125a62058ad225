"""Joining the other hosts: what is refused, and what JAX is asked for.

That processes do join is in test_train.py, which starts several.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from gptjax.devices.hosts import from_all_hosts, join_hosts
from gptjax.errors import UserError

ROOT = Path(__file__).parents[2]
HERE = "10.0.0.1:1234"


@pytest.fixture
def initialized(monkeypatch):
  """The calls of jax.distributed.initialize, which itself does nothing."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs))
  )
  return calls


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ((HERE, None, None), "--num_processes and --process_id are missing"),
    ((None, None, 0), "--coordinator and --num_processes are missing"),
    ((HERE, 2, None), "--process_id is missing"),
    (("10.0.0.1", 2, 0), "--coordinator=10.0.0.1: expected HOST:PORT"),
    ((":1234", 2, 0), "expected HOST:PORT"),
    (("host:0", 2, 0), "expected HOST:PORT"),
    (("host:65536", 2, 0), "expected HOST:PORT"),
    ((HERE, 0, 0), "--num_processes=0: a job has at least one"),
    ((HERE, 2, 2), "--process_id=2: expected 0 to 1"),
    ((HERE, 2, -1), "--process_id=-1: expected 0 to 1"),
  ],
)
def test_wrong_flags_are_named_before_anything_starts(arguments, sentence, initialized):
  with pytest.raises(UserError, match=sentence):
    join_hosts(*arguments)
  assert initialized == []


def test_with_explicit_flags_nothing_is_looked_for(initialized):
  patience = {"heartbeat_timeout_seconds": 30}
  join_hosts("[::1]:65535", 2, 1)
  join_hosts()
  assert initialized == [
    (("[::1]:65535", 2, 1), {"cluster_detection_method": "deactivate"} | patience),
    ((None, None, None), {"cluster_detection_method": None} | patience),
  ]


def test_no_cluster_and_a_taken_port_are_one_sentence():
  # In a process of its own: here the devices are in use already, which JAX refuses too.
  script = """
import socket
from gptjax.errors import UserError
from gptjax.devices.hosts import join_hosts

with socket.create_server(("", 0)) as taken:
  for explicit in ((), (f"localhost:{taken.getsockname()[1]}", 2, 0)):
    try:
      join_hosts(*explicit)
    except UserError as error:
      print(error)
"""
  cluster = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JAX_COORDINATOR")
  environment = {key: value for key, value in os.environ.items() if not key.startswith(cluster)}
  done = subprocess.run(
    [sys.executable, "-c", script],
    env=environment | {"JAX_PLATFORMS": "cpu"},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  )
  lines = done.stdout.splitlines()
  assert len(lines) == 2, done.stderr
  assert lines[0].startswith("--distributed: JAX does not find the other hosts (coordinator_addr")
  assert "Pass --coordinator=HOST:PORT --num_processes=N --process_id=I on each" in lines[0]
  assert "cannot join the other hosts there" in lines[1]
  assert "Address already in use" in lines[1]


def test_one_process_hears_itself():
  assert from_all_hosts(True) == [1]
  assert from_all_hosts(2**32 - 1) == [2**32 - 1]


def test_a_second_process_compiles_nothing_that_the_first_one_did(tmp_path):
  program = textwrap.dedent("""
    import jax
    from gptjax.devices import hosts

    hosts.keep_compiled_programs()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    found = []
    jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
    print(found.count("/jax/compilation_cache/cache_hits"))
  """)
  environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
  first, second = (
    int(subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, text=True,
                       capture_output=True, check=True).stdout)
    for _ in range(2)
  )  # fmt: skip
  assert first == 0 < second
  assert any((tmp_path / "gptjax" / "compiled").iterdir())
