"""Servers in this process: of a model that recites a script, and of a random one."""

import dataclasses
import http.client
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from starlette.testclient import TestClient

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.inference.engine import Engine
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import model_graph
from gptjax.serving.app import make_app
from gptjax.serving.service import Service
from gptjax.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]

# 3 tokens and the content for a message, and 2 for the beginning of an answer.
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)
# With tools, in the form of Hermes.
TOOLS_TEMPLATE = (
  "{% if tools %}<|im_start|>s{{ tools | tojson }} Call as <tool_call>{}</tool_call>.<|im_end|>"
  "{% endif %}{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}"
  "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
  "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
  """Returns a function: a tokenizer with a chat template, whose tokens are bytes and specials."""

  def make(template=TEMPLATE, specials=("<|im_start|>", "<|im_end|>")):
    made = json.loads(tokenizer_lib.train("bpe:260", ["x"])._files["tokenizer.json"])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    made["added_tokens"] += [
      {"id": 260 + number, "content": text, "special": True, **plain}
      for number, text in enumerate(specials)
    ]
    folder = tmp_path_factory.mktemp("tokenizer")
    config = {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_lib.load(str(folder))

  return make


@pytest.fixture(scope="session")
def reciting(random_params):
  """Returns a function: a model that says a script from position `start` on, whatever the prompt.

  Its token at each position comes from the learned position alone; so a prompt of n tokens is
  continued from position n.
  """

  def make(tokenizer, script, start=0, room=256):
    shape = {"vocab_size": 264, "num_layers": 1, "embed_dim": room, "num_heads": 1, "mlp_dim": 1}
    config = ModelConfig.from_config(shape | {"position.max_positions": room, "head.tied": False})
    end = tokenizer.specials.get("<|im_end|>", tokenizer.end_of_text)
    tokens = [*(tokenizer.encode(script) if isinstance(script, str) else script), end]
    params = _zeros(random_params(config))
    params["position"]["embedding"] = np.eye(room, dtype=np.float32)
    params["final_norm"]["scale"] += 1
    places = start - 1 + np.arange(len(tokens))
    params["head"]["kernel"][places, tokens] = 1
    return nnx.merge(model_graph(config), params)

  return make


def _zeros(tree):
  return {k: _zeros(v) if isinstance(v, dict) else np.zeros_like(v) for k, v in tree.items()}


@pytest.fixture(scope="session")
def random_model(tiny_config, random_params):
  """A tiny model of long texts, whose every token is about as likely."""
  kind = {"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False, "head.tied": False}
  config = tiny_config(vocab_size=264, **kind, **{"position.max_positions": 1024})
  return nnx.merge(model_graph(config), random_params(config, seed=3))


@pytest.fixture(scope="session")
def random_engine(random_model, chat_tokenizer):
  """An engine that the servers of a session share, one after the other."""
  # As many tokens as the model has: scores of a model with more are over all of its own.
  specials = ("<|im_start|>", "<|im_end|>", "<|one|>", "<|more|>")
  return Engine(random_model, chat_tokenizer(TOOLS_TEMPLATE, specials), rows=4, chunk=64)


@pytest.fixture
def serve():
  """Returns a function: a client of a server in this process."""
  clients = []

  def serve(engine, *, app=None, **options):
    service = Service(engine, "tiny", **{"warm_up": False} | options)
    client = TestClient(make_app(service, **app or {}), raise_server_exceptions=False)
    client.__enter__()
    client.service = service
    service.thread.ready.wait(10)
    clients.append(client)
    return client

  yield serve
  for client in clients:
    client.__exit__(None, None, None)


def events(response):
  """The events of a stream, without the '[DONE]' that has to end it."""
  lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
  assert lines.pop() == "[DONE]"
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def stream_events():
  return events


# --- A process of its own ------------------------------------------------------------------------


class Process:
  """A running `python -m gptjax.serve`."""

  def __init__(self, checkpoint, log, *flags):
    self.log = log
    with self.log.open("w") as file:
      self.program = subprocess.Popen(
        [sys.executable, "-m", "gptjax.serve", f"--checkpoint={checkpoint}", "--port=0", *flags],
        stdout=file, stderr=file, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
      )  # fmt: skip
    self.port = int(self.until(r"http://127\.0\.0\.1:(\d+)"))
    for _ in range(600):
      if self.get("/readyz")[0] == 200:
        return
      time.sleep(0.1)
    raise AssertionError(self.log.read_text())

  def until(self, pattern):
    for _ in range(1200):
      if found := re.search(pattern, self.log.read_text()):
        return found[1] if found.groups() else found[0]
      assert self.program.poll() is None, self.log.read_text()
      time.sleep(0.1)
    raise AssertionError(self.log.read_text())

  def get(self, path):
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()

  def post(self, fields, path="/v1/completions"):
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
    return connection.getresponse()

  def measure(self, name):
    return float(re.search(rf"^gptjax_{name} (\S+)", self.get("/metrics")[1], re.MULTILINE)[1])

  def end(self):
    self.program.kill()
    self.program.wait()


@pytest.fixture(scope="session")
def run(tmp_path_factory, random_model, random_engine):
  """The work directory of a run."""
  workdir = tmp_path_factory.mktemp("served")
  config = dataclasses.asdict(random_model.config)
  (workdir / "config.json").write_text(json.dumps({"model": config}))
  random_engine.tokenizer.save(workdir / "tokenizer")
  with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, {"params": nnx.to_pure_dict(nnx.state(random_model))})
    checkpoints.wait()
  return workdir


@pytest.fixture(scope="module")
def start_process(run, tmp_path_factory):
  """Returns a function: a server with some flags, which ends with the module's tests."""
  started = []

  def start(*flags):
    log = tmp_path_factory.mktemp("log") / "log.txt"
    started.append(Process(run, log, *flags))
    return started[-1]

  yield start
  for process in started:
    process.end()
