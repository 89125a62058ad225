"""A conversation with a chat model: turns, context, and commands in a terminal."""

import contextlib
import dataclasses
from collections.abc import Callable

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, did_you_mean
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.model.gpt import GPT
from gptjax.templates.chat import ChatTemplate, Message

with contextlib.suppress(ImportError):
  import readline  # noqa: F401 (gives `input` a line editor, if the system has one)

COMMANDS = {
  "/reset": "forget the conversation",
  "/temperature": "X: choose more freely (1), or always the most likely token (0)",
  "/system": "TEXT: the message that the conversation starts with; without TEXT, none",
  "/help": "this list",
  "/quit": "end, as Ctrl-D does",
}


@dataclasses.dataclass(frozen=True)
class Answer:
  """A model's answer, how many of the oldest turns were dropped to make room for it, and whether
  Ctrl-C interrupted it."""

  text: str
  dropped: int
  stopped: bool


class Conversation:
  """A model and the messages of a conversation with it."""

  def __init__(
    self,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    system: str | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    max_tokens: int = 512,
    context: int = 0,
    seed: int = 0,
    weights: str | None = None,
    cache: str | None = None,
    draft: str | None = None,
  ):
    """Starts an empty conversation.

    Args:
      model: any GPT.
      tokenizer: the model's, with a chat template.
      system: the system message.
      sampling: how tokens are chosen.
      max_tokens: the most tokens of an answer, which never exceeds half of the context.
      context: tokens of a conversation that the model sees; 0 is its `max_positions`.
      seed: seed of the random choices.
      weights, cache, draft: as for `Engine`.

    Raises:
      UserError: the tokenizer has no chat template.
    """
    self.template = ChatTemplate(tokenizer)
    self.system, self.sampling, self.seed = system, sampling, seed
    options = {"weights": weights, "cache": cache, "draft": draft}
    self.engine = Engine(model, tokenizer, rows=1, length=context or None, **options)
    self.context = self.engine.room
    self.max_tokens = min(max_tokens, self.context // 2)
    self.turns: list[list[Message]] = []

  def prompt(self, turns: list[list[Message]]) -> list[int]:
    """Returns the ids of the system's message and `turns`, up to where an answer begins."""
    before = [] if self.system is None else [{"role": "system", "content": self.system}]
    return self.template.encode([*before, *(message for turn in turns for message in turn)])

  def ask(self, text: str, on_text: Callable[[str], None]) -> Answer:
    """Answers a message and remembers both; Ctrl-C stops an answer, whose start is remembered.

    Args:
      text: the user's message.
      on_text: called with each new piece of the answer.

    Raises:
      UserError: `text` alone leaves no room for an answer, or the template refuses it; the
        conversation is as before.
    """
    turns = [*self.turns, [{"role": "user", "content": text}]]
    room, dropped = self.context - self.max_tokens, 0
    while len(prompt := self.prompt(turns[dropped:])) > room:
      dropped += 1
      if dropped == len(turns):
        raise UserError(
          f"a message that makes {len(prompt)} tokens with the system's has no room in the model's "
          f"context of {self.context}, of which {self.max_tokens} are for the answer."
        )
    request = Request(prompt, self.max_tokens, self.sampling, self.seed)
    answer = self.engine.submit(request)
    try:
      while not answer.finish_reason:
        for update in self.engine.step():
          if update.text:
            on_text(update.text)
    except KeyboardInterrupt:
      self.engine.cancel(answer)
    turns[-1].append({"role": "assistant", "content": answer.text})
    self.turns, self.seed = turns[dropped:], (self.seed + 1) % 2**32
    return Answer(answer.text, dropped, answer.finish_reason == "cancelled")

  def command(self, line: str) -> str:
    """Carries out a line that starts with '/', except /quit, and returns a message about it."""
    name, _, rest = line.partition(" ")
    match name:
      case "/reset":
        self.turns = []
        return "the conversation is forgotten"
      case "/temperature":
        try:
          self.sampling = dataclasses.replace(self.sampling, temperature=float(rest))
        except ValueError as error:
          return str(error) if isinstance(error, UserError) else f"{rest!r} is no number"
        return f"the temperature is {self.sampling.temperature:g}"
      case "/system":
        self.system = rest.strip() or None
        return f"the system's message is {self.system!r}" if self.system else "no system's message"
      case "/help":
        return "\n".join(f"{name} {text}" for name, text in COMMANDS.items())
      case _:
        return f"no command {name!r}. {did_you_mean(name, COMMANDS)}"


def converse(conversation: Conversation) -> None:
  """Reads messages from the terminal and answers, until the end of the input or /quit."""
  while True:
    try:
      line = input("> ").strip()
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print()
      continue
    if line == "/quit":
      return
    if line.startswith("/"):
      print(f"[{conversation.command(line)}]")
    elif line:
      try:
        answer = conversation.ask(line, lambda text: print(text, end="", flush=True))
        print("\n[stopped]" if answer.stopped else "")
        if answer.dropped:
          print(f"[turns that do not fit into the context any more: {answer.dropped}, the oldest]")
      except UserError as error:
        print(f"[{error}]")
