"""The server as a process of its own: signals, clients that leave, and slow ones."""

import concurrent.futures
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx, traverse_util

from gptjax.peft.config import PeftConfig
from gptjax.peft.surgery import describe_adapters
from gptjax.training.checkpoints import Checkpoints, checksum

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(start_process):
  """One server for the tests that leave it running."""
  return start_process("--name=tiny", "--rows=2")


@pytest.fixture
def many_files():
  """Room for a thousand connections at both of their ends."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = 2048
  if hard != resource.RLIM_INFINITY and hard < wanted:
    pytest.skip(f"this machine lets a process have {hard} files at most")
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
  yield
  resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


LONG = {"model": "tiny", "prompt": "a", "max_tokens": 900, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(server, stream):
  body = json.dumps(LONG | {"stream": stream})
  with socket.create_connection(("127.0.0.1", server.port)) as connection:
    connection.sendall(
      f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    for _ in range(200):
      if server.measure("running_rows") == 1:
        break
      time.sleep(0.01)
    else:
      raise AssertionError("it did not start")
    written = server.measure("written_tokens_total")
  for _ in range(100):
    if server.measure("running_rows") == server.measure("cache_pages_used") == 0:
      break
    time.sleep(0.01)
  else:
    raise AssertionError("its row is not free")
  assert server.measure("written_tokens_total") - written < 600


def test_a_thousand_idle_connections_hold_nobody_up(many_files, start_process):
  server = start_process("--name=tiny", "--rows=2")
  idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
  half = socket.create_connection(("127.0.0.1", server.port))
  half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
  start = time.monotonic()
  assert server.post(LONG | {"max_tokens": 2}).status == 200
  assert time.monotonic() - start < 5
  # Those who do not ask in time are sent away, as is who asks byte by byte.
  for connection in (idle[0], half):
    connection.settimeout(40)
    assert connection.recv(1) == b""
  for connection in [*idle, half]:
    connection.close()


def test_many_clients_at_once_get_what_they_get_alone(server):
  def ask(seed):
    response = server.post(LONG | {"max_tokens": 30, "seed": seed})
    return json.loads(response.read())["choices"][0]["text"]

  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    together = list(pool.map(ask, range(12)))
  assert together == [ask(seed) for seed in range(12)]
  assert len(set(together)) == 12


def test_at_sigterm_running_answers_end_and_new_ones_are_refused(start_process):
  process = start_process("--name=tiny", "--rows=1")
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    running = pool.submit(lambda: process.post(LONG | {"stream": True}).read().decode())
    while process.measure("running_rows") < 1:
      time.sleep(0.01)
    process.program.send_signal(signal.SIGTERM)
    process.until("SIGTERM: 1 answers are still running")
    response = process.post(LONG)
    assert (response.status, response.getheader("Retry-After")) == (503, "5")
    assert running.result(timeout=60).strip().endswith("[DONE]")
  assert process.program.wait(timeout=20) in (0, -signal.SIGTERM)


def test_after_a_kill_it_starts_again(start_process):
  first = start_process("--name=tiny", "--rows=1")
  first.program.send_signal(signal.SIGKILL)
  first.program.wait()
  process = start_process("--name=tiny", "--rows=1")
  assert process.post(LONG | {"max_tokens": 1}).status == 200


def test_adapters_are_models_beside_their_base(start_process, random_model, tmp_path):
  rng, flags, names = np.random.default_rng(0), [], ["tiny", "a", "b"]
  base = np.uint32(checksum(nnx.to_pure_dict(nnx.state(random_model))))
  for name, rank in (("a", 2), ("b", 5)):
    lora = {"method": "lora", "targets": ["attention", "mlp"], "rank": rank}
    shapes = describe_adapters(random_model.config, PeftConfig(**lora))
    values = {leaf: rng.normal(size=info.shape) for leaf, info in shapes.items()}
    (tmp_path / name).mkdir()
    config = {"model": dataclasses.asdict(random_model.config), "peft": lora}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    with Checkpoints(tmp_path / name / "checkpoints", keep=1) as checkpoints:
      params = traverse_util.unflatten_dict(values, sep="/")
      checkpoints.save(1, {"params": params, "base_checksum": base})
      checkpoints.wait()
    flags.append(f"--adapter={name}={tmp_path / name}")
  process = start_process("--name=tiny", "--rows=4", *flags)
  assert [one["id"] for one in json.loads(process.get("/v1/models")[1])["data"]] == names

  def ask(server, name):
    response = server.post({"model": name, "prompt": "a", "max_tokens": 20, "temperature": 0})
    return json.loads(response.read())["choices"][0]["text"]

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    together = list(pool.map(lambda name: ask(process, name), names))
  assert len(set(together)) == 3
  assert together[0] == ask(start_process("--name=tiny", "--rows=1"), "tiny")
  assert together == [ask(process, name) for name in names]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--rate_limit=often"], "--rate_limit='often' is no rate"),
    (["--max_memory=lots"], "--max_memory='lots' is no size; write one like 500MB or 2GB."),
    (["--adapter=x"], "--adapter='x': write NAME=PATH."),
    (["--adapter=x=y", "--adapter=x=z"], "another model has the name 'x'; choose one."),
    (["--adapter=tiny=y", "--name=tiny"], "another model has the name 'tiny'; choose one."),
    (["--adapter=x=y"], "adapter x=y: no adapters; name a run"),
    (["--timeout=0"], "--timeout is 0.0; it must be above 0"),
    (["--max_memory=1KB"], "--max_memory=1KB: a page of 16 tokens has"),
  ],
)  # fmt: skip
def test_flags_that_mean_nothing_are_refused(run, flags, message):
  program = subprocess.run(
    [sys.executable, "-m", "gptjax.serve", f"--checkpoint={run}", *flags],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert program.returncode == 1
  assert message in program.stderr
