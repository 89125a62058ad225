import dataclasses
import json
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from gptjax import generate as command
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.inference import flags as sampling_flags
from gptjax.inference.chat import Conversation
from gptjax.inference.generate import chat_prompts
from gptjax.inference.sampling import Sampling
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import model_graph
from gptjax.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
ROOM = 256
# 3 tokens and the content for a message, and 2 for the beginning of an answer.
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)
# What the model says at each position, so that an answer tells how long its prompt was.
SCRIPT = "".join(f"{position:03d}." for position in range(0, ROOM, 4))
PERIOD = 64  # The last position of each period ends the turn.


def said(prompt_length, at_most=ROOM):
  end = -(-(prompt_length + 1) // PERIOD) * PERIOD - 1
  return SCRIPT[prompt_length : min(end, prompt_length + at_most)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """Every byte is a token, beside the special ones."""
  made = json.loads(tokenizer_lib.train("bpe:260", ["x"])._files["tokenizer.json"])
  plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  made["added_tokens"] += [
    {"id": 260 + number, "content": text, "special": True, **plain}
    for number, text in enumerate(("<|im_start|>", "<|im_end|>"))
  ]
  folder = tmp_path_factory.mktemp("tokenizer")
  (folder / "tokenizer.json").write_text(json.dumps(made))
  (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
  return tokenizer_lib.load(str(folder))


@pytest.fixture(scope="module")
def reciting(tokenizer, random_params):
  """A config, and parameters with which the position alone decides what comes next."""
  shape = {"vocab_size": 262, "num_layers": 1, "embed_dim": ROOM, "num_heads": 1, "mlp_dim": 1}
  config = ModelConfig.from_config(shape | {"position.max_positions": ROOM, "head.tied": False})
  tokens = np.array(tokenizer.encode(SCRIPT))
  tokens[PERIOD - 1 :: PERIOD] = tokenizer.specials["<|im_end|>"]
  params = nnx.to_pure_dict(nnx.state(nnx.merge(model_graph(config), random_params(config))))

  def zeros(tree):
    return {k: zeros(v) if isinstance(v, dict) else np.zeros_like(v) for k, v in tree.items()}

  params = zeros(params)
  params["position"]["embedding"] = np.eye(ROOM, dtype=np.float32)
  params["final_norm"]["scale"] += 1
  params["head"]["kernel"][np.arange(ROOM - 1), tokens[1:]] = 1
  return config, params


@pytest.fixture
def make(tokenizer, reciting):
  config, params = reciting
  model = nnx.merge(model_graph(config), params)

  def make(**options):
    return Conversation(model, tokenizer, sampling=Sampling(temperature=0), **options)

  return make


def ask(conversation, text):
  pieces = []
  answer = conversation.ask(text, pieces.append)
  assert "".join(pieces) == answer.text
  return answer, pieces


def test_an_answer_knows_what_was_said_before(make):
  conversation = make()
  first, pieces = ask(conversation, "hello")
  assert first.text == said(10)
  assert len(pieces) == len(first.text)  # as it was written
  second, _ = ask(conversation, "again")
  assert second.text == said((3 + 5) + (3 + len(first.text)) + (3 + 5) + 2)
  conversation.command("/reset")
  assert ask(conversation, "hello")[0] == first


def test_a_systems_message_comes_first(make):
  assert ask(make(system="Be kind."), "hello")[0].text == said((3 + 8) + (3 + 5) + 2)
  conversation = make()
  assert conversation.command("/system Be kind.") == "the system's message is 'Be kind.'"
  assert ask(conversation, "hello")[0].text == said((3 + 8) + (3 + 5) + 2)
  assert conversation.command("/system") == "no system's message"
  conversation.command("/reset")
  assert ask(conversation, "hello")[0].text == said(10)


def test_the_oldest_turns_make_room(make):
  conversation = make(system="Be kind.", context=160, max_tokens=40)
  room, system = 120, 3 + 8
  turns, drops = [], []
  for text in ("first", "second", "the third of them", "4"):
    turns.append(3 + len(text))
    dropped = 0
    while (length := system + sum(turns) + 2) > room:
      turns, dropped = turns[2:], dropped + 1
    answer, _ = ask(conversation, text)
    assert (answer.text, answer.dropped) == (said(length, at_most=40), dropped)
    turns.append(3 + len(answer.text))
    drops.append(dropped)
  assert drops == [0, 0, 1, 1]
  before = conversation.turns
  with pytest.raises(UserError, match=r"makes 121 tokens .* context of 160, of which 40 are for"):
    ask(conversation, "x" * (room - system - 3 - 2 + 1))
  assert conversation.turns == before


def test_what_was_said_before_ctrl_c_is_remembered(make):
  conversation = make()

  def interrupt(text):
    raise KeyboardInterrupt

  answer = conversation.ask("hello", interrupt)
  assert answer.stopped
  assert answer.text == said(10)[:1]
  assert ask(conversation, "go on")[0].text == said((3 + 5) + (3 + 1) + (3 + 5) + 2)


@pytest.mark.parametrize(
  ("line", "reply"),
  [
    ("/temperature 0.5", "the temperature is 0.5"),
    ("/temperature", "'' is no number"),
    ("/temperature warm", "'warm' is no number"),
    ("/temperature -1", "temperature is -1.0; it must be at least 0."),
    ("/rest", "no command '/rest'. Did you mean '/reset'?"),
  ],
)
def test_commands(make, line, reply):
  conversation = make()
  assert conversation.command(line) == reply
  assert conversation.sampling.temperature == (0.5 if reply.endswith("0.5") else 0)


def test_prompts_of_generation_go_through_the_template(tokenizer):
  (ids,) = chat_prompts(tokenizer, ["hello"], None)
  assert len(ids) == 10
  assert tokenizer.decode(ids) == "uhelloa"
  assert tokenizer.decode(chat_prompts(tokenizer, ["hello"], "kind")[0]) == "skinduhelloa"
  with pytest.raises(UserError, match="'bytes' has no chat template"):
    chat_prompts(tokenizer_lib.load("bytes"), ["hello"], None)


# --- The programs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, reciting):
  """The work directory of a run whose model recites."""
  config, params = reciting
  workdir = tmp_path_factory.mktemp("run")
  (workdir / "config.json").write_text(json.dumps({"model": dataclasses.asdict(config)}))
  tokenizer.save(workdir / "tokenizer")
  with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(
      1, {"params": nnx.to_pure_dict(nnx.state(nnx.merge(model_graph(config), params)))}
    )
    checkpoints.wait()
  return workdir


# Its terminal is the one whose Ctrl-C it gets, and there is time for that between two pieces.
PROGRAM = textwrap.dedent("""
  import fcntl, signal, termios, time
  fcntl.ioctl(0, termios.TIOCSCTTY, 0)
  # What starts tests in the background ignores it, and so would all that they start.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  from gptjax import chat as command
  from gptjax.inference import chat
  from gptjax import config

  step = chat.Engine.step

  def slowly(engine):
    updates = step(engine)
    time.sleep(0.02)
    return updates

  chat.Engine.step = slowly
  command._define_flags()
  config.run_app(command.main, "")
""")


class Terminal:
  """A pseudo-terminal, and the conversation that runs in it."""

  def __init__(self, run):
    self.file, other = pty.openpty()
    self.program = subprocess.Popen(
      [sys.executable, "-c", PROGRAM, f"--checkpoint={run}", "--temperature=0"],
      stdin=other, stdout=other, stderr=other, cwd=ROOT, start_new_session=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "dumb"},
    )  # fmt: skip
    os.close(other)
    self.seen = ""

  def until(self, text, pressing=""):
    """Reads until `text` comes, and returns what came before it. Again and again presses a key: an
    editor of lines may miss a Ctrl-C that comes before it waits."""
    self.send(pressing)
    tries = 0
    while text not in self.seen:
      if not select.select([self.file], [], [], 2)[0]:
        tries += 1
        assert tries < 30, self.seen
        self.send(pressing)
        continue
      self.seen += re.sub(r"\x1b\[\?2004[hl]\r?", "", os.read(self.file, 4096).decode())
    before, self.seen = self.seen.split(text, 1)
    return before

  def send(self, text):
    os.write(self.file, text.encode())


@pytest.fixture
def terminal(run):
  terminal = Terminal(run)
  yield terminal
  terminal.program.kill()
  terminal.program.wait()
  os.close(terminal.file)


@pytest.mark.slow
def test_a_conversation_in_a_terminal(terminal):
  until, send = terminal.until, terminal.send
  until("> ")
  send("hello\n")
  assert said(10) in until("> ")
  send("/temperature 0\n")
  assert "[the temperature is 0]" in until("> ")
  send("again\n")
  second = said((3 + 5) + (3 + len(said(10))) + (3 + 5) + 2)
  until(second[:8])
  send("\x03")
  stopped = until("> ")
  assert "\r\n[stopped]" in stopped
  assert second[-8:] not in stopped
  send("/reset\n")
  until("> ")
  send("half a line")
  until("half a line")
  until("> ", pressing="\x03")
  send("hello\n")
  until(said(10))
  until("> ")
  send("\x04")
  assert terminal.program.wait(timeout=30) == 0


@pytest.fixture
def generate_main(run, monkeypatch, capsys):
  """Returns a function that runs gptjax.generate with flags, and returns what it printed."""
  defaults = {
    "checkpoint": str(run), "ema": False, "prompt": [], "chat": False, "system": None, "stop": [],
    "max_tokens": 100, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "repetition_penalty": 1.0, "seed": 0, "json": False, "weights": None, "draft": None,
    "cache": None,
    "beams": None, "length_penalty": 1.0,
  }  # fmt: skip

  class Flags(types.SimpleNamespace):
    def __getitem__(self, name):
      return types.SimpleNamespace(present=name in self.given)

  def main(**changes):
    values = Flags(given={*changes}, **defaults | changes)
    monkeypatch.setattr(command, "FLAGS", values)
    monkeypatch.setattr(sampling_flags, "FLAGS", values)
    command.main({})
    return capsys.readouterr().out

  return main


def test_generation_answers_prompts(generate_main):
  answer = said(3 + 4 + 10)
  assert generate_main(chat=True, prompt=["hello"], system="kind") == answer + "\n"
  printed = generate_main(chat=True, prompt=["hello", "again"], system="kind")
  assert printed.startswith(f"hello\n\n{answer}\n---")
  shown = json.loads(generate_main(chat=True, prompt=["hello"], system="kind", json=True))
  assert (shown["prompt"], shown["completion"]) == ("hello", answer)
  assert shown["finish_reason"] == "stop"


def test_flags_of_chats_that_mean_nothing_are_refused(generate_main):
  with pytest.raises(UserError, match="--chat needs a --prompt"):
    generate_main(chat=True)
  with pytest.raises(UserError, match="--system is for --chat"):
    generate_main(prompt=["hello"], system="kind")


@pytest.mark.slow
def test_beams_search_for_the_likeliest_completion(generate_main):
  answer = said(3 + 4 + 10)
  found = generate_main(chat=True, prompt=["hello"], system="kind", beams=3)
  assert found.startswith(f"hello\n\n{answer}\n---")
  options = {"chat": True, "prompt": ["hello"], "system": "kind", "json": True, "beams": 3}
  shown = json.loads(generate_main(length_penalty=0.0, **options))
  assert (shown["completion"], shown["finish_reason"]) == (answer, "stop")
  assert shown["score"] == shown["log_likelihood"] < 0
  favoured = json.loads(generate_main(length_penalty=1.0, **options))
  assert favoured["score"] == pytest.approx(shown["score"] / (len(answer) + 1))


@pytest.mark.parametrize(
  "flag", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "draft"]
)
def test_flags_that_do_nothing_with_beams_are_refused(generate_main, flag):
  with pytest.raises(UserError, match=f"--{flag} does nothing with --beams"):
    generate_main(prompt=["hello"], beams=2, **{flag: 0.5})


def test_beams_and_their_penalty_are_checked(generate_main):
  with pytest.raises(UserError, match="--length_penalty is for --beams"):
    generate_main(prompt=["hello"], length_penalty=1.0)
  with pytest.raises(UserError, match="--beams"):
    generate_main(prompt=["hello"], beams=0)
