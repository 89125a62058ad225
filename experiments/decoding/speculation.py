"""Speculative decoding against plain decoding on real texts, one answer at a time, in this process.

    python -m experiments.decoding.speculation
    python -m experiments.decoding.speculation --model=tiny --rounds=1 --texts=1 --tokens=16 \
      --drafts=lookup,layers:1 --output=/tmp/speculation.json

Continues files of Python's standard library, answers questions of `alpaca_en`, and sums up parts of
`prose`; greedily, so each answer has to be the one without guesses. Each text is given to all
engines one after the other, in another order each time. What counts is the time from the first
token of an answer to its last, without steps that compile. Writes speculation.json and its part of
README.md; with --output that file alone.
"""

import dataclasses
import itertools
import json
import math
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import datasets
from experiments.decoding.compare import busy_seconds, describe_machine
from experiments.decoding.models import FORMATS, MODELS, prepare
from experiments.decoding.readme import HERE, NOT_MEASURED, write_part
from gptjax import config as config_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError, check_choice, check_number
from gptjax.inference.engine import Engine
from gptjax.inference.pages import PAGE
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling, compilations
from gptjax.templates.chat import ChatTemplate
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS
KINDS = {"code": "continued code", "chat": "chat", "summary": "summaries"}
# What speculation must not fall below, of plain decoding's tokens a second.
PROMISE = 0.95
# A second engine without guesses: its ratios to the first are what chance does.
PLAIN, AGAIN = "none", "none, again"
# Modules of the standard library that are continued.
MODULES = ("textwrap", "json/decoder", "bisect", "heapq", "configparser", "shlex", "csv", "queue")
# Tokens of a module and of a speech that are read.
CODE_TOKENS, SPEECH_TOKENS = 512, 320
SUMMARY = "Sum up the following part of a speech, in its own words where you can.\n\n"


def _define_flags() -> None:
  flags.DEFINE_enum("model", "smollm2-135m", MODELS, "The model.")
  flags.DEFINE_list("weights", ["float32", "int8"], f"Of {', '.join(FORMATS)}.")
  flags.DEFINE_list("drafts", ["lookup", "layers:24"], "What guesses, an engine each.")
  flags.DEFINE_integer("rounds", 5, "Rounds.")
  flags.DEFINE_integer("texts", 3, f"Texts of each kind, at most {len(MODULES)}.")
  flags.DEFINE_integer("tokens", 64, "The most tokens of an answer.")
  flags.DEFINE_string("output", None, "JSON file to write, and not README.md.")


def main(overrides: Mapping[str, str]) -> int:
  if overrides:
    raise UserError(f"--config.{next(iter(overrides))}: nothing here is configured; see --help.")
  for name in FLAGS.weights:
    check_choice("--weights", name, FORMATS)
  check_number("--rounds", FLAGS.rounds, at_least=1)
  check_number("--texts", FLAGS.texts, at_least=1, at_most=len(MODULES))
  check_number("--tokens", FLAGS.tokens, at_least=2)
  conditions = describe_machine()
  prepare_cpu()
  folder = prepare(FLAGS.model)
  rows = [row for format in FLAGS.weights for row in measure(folder, format)]
  options = {name: FLAGS[name].value for name in ("model", "drafts", "rounds", "texts", "tokens")}
  results = conditions | options | {"rows": rows}
  output = Path(FLAGS.output or HERE / "speculation.json")
  output.write_text(json.dumps(results, indent=1) + "\n")
  if not FLAGS.output:
    write_part("speculation", table(results))
  print(table(results))
  return 0 if all(row["same_answers"] == row["answers"] for row in rows) else 1


# --- Texts -------------------------------------------------------------------------------------


def prompts(tokenizer: Tokenizer, count: int) -> dict[str, list[list[int]]]:
  """The ids of `count` prompts of each kind, under the model's chat template if it has one."""

  def ask(text: str) -> list[int]:
    if tokenizer.chat_template is None:
      return tokenizer.encode_prompt(text)
    return ChatTemplate(tokenizer).encode([{"role": "user", "content": text}])

  def start(text: str, tokens: int) -> str:
    return tokenizer.decode(tokenizer.encode(text)[:tokens])

  library = Path(sysconfig.get_path("stdlib"))
  sources = [(library / f"{name}.py").read_text() for name in MODULES[:count]]
  # The newest first.
  speeches = sorted(datasets.fetch("prose").glob("sotu-*.txt"), reverse=True)[:count]
  return {
    "code": [tokenizer.encode_prompt(start(source, CODE_TOKENS)) for source in sources],
    "chat": [ask(text) for text in itertools.islice(_questions(), count)],
    "summary": [ask(SUMMARY + start(path.read_text(), SPEECH_TOKENS)) for path in speeches],
  }


def _questions() -> Iterator[str]:
  for line in (datasets.fetch("alpaca_en") / "test.jsonl").read_text().splitlines():
    example = json.loads(line)
    if not example["input"]:
      yield example["instruction"]


# --- Measuring ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Writing:
  """How an answer was written: its tokens, and what was done after the first of them. Steps that
  compiled count neither in `seconds` nor in `timed`, the tokens of the others."""

  tokens: list[int]
  seconds: float
  timed: int
  compiled: int
  written: int
  steps: int
  drafted: int
  accepted: int


def measure(folder: Path, format: str) -> Iterator[dict[str, Any]]:
  """Yields the results of each round, kind of text and engine."""
  model, tokenizer = load_model(f"hf:{folder / 'hf'}", progress=False)
  texts = prompts(tokenizer, FLAGS.texts)
  length = max(len(prompt) for kind in texts.values() for prompt in kind) + FLAGS.tokens
  # All of them stay in the cache, to be read once.
  pages = len(KINDS) * FLAGS.texts * -(-length // PAGE)

  def make(draft: str | None) -> Engine:
    options = {"rows": 1, "length": length, "pages": pages, "weights": format}
    return Engine(model, tokenizer, draft=draft, **options)

  engines = {PLAIN: make(None), AGAIN: make(None)}
  engines |= {draft: make(draft) for draft in FLAGS.drafts}
  for name, engine in engines.items():
    print(f"{format}, {name}: warms up", flush=True)
    for prompt in itertools.chain(*texts.values()):
      write(engine, prompt, FLAGS.tokens)
  shuffled = random.Random(0)
  for number in range(FLAGS.rounds):
    for kind in shuffled.sample(list(KINDS), len(KINDS)):
      found: dict[str, list[Writing]] = {name: [] for name in engines}
      busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
      for prompt in texts[kind]:
        for name in shuffled.sample(list(engines), len(engines)):
          found[name].append(write(engines[name], prompt, FLAGS.tokens))
      others = busy_seconds() - busy - (time.process_time() - own)
      others = round(max(others, 0) / (time.perf_counter() - start), 2)
      for name, writings in found.items():
        same = sum(a.tokens == b.tokens for a, b in zip(writings, found[PLAIN], strict=True))
        row = {"weights": format, "round": number, "kind": kind, "draft": name} | summary(writings)
        row |= {"answers": len(writings), "same_answers": same, "others": others}
        print(f"{format}, round {number}, {kind}, {name}: {rate(row):.1f} tokens/s", flush=True)
        yield row


def write(engine: Engine, prompt: Sequence[int], tokens: int) -> Writing:
  """Answers a prompt; what is timed begins after the first token."""
  answer = engine.submit(Request(prompt, tokens, Sampling(temperature=0)))
  while len(answer.tokens) == len(prompt):  # The first token counts to the prompt.
    engine.step()
  before, seconds, timed, compiled = dataclasses.replace(engine.counts), 0.0, 0, 0
  while not answer.finish_reason:
    known, length, start = compilations.total(), len(answer.tokens), time.perf_counter()
    engine.step()
    if compilations.total() == known:
      seconds += time.perf_counter() - start
      timed += len(answer.tokens) - length
    compiled += compilations.total() - known
  after = engine.counts
  return Writing(
    answer.tokens,
    seconds,
    timed,
    compiled,
    after.written_tokens - before.written_tokens,
    after.steps - before.steps,
    after.drafted_tokens - before.drafted_tokens,
    after.accepted_tokens - before.accepted_tokens,
  )


def summary(writings: Sequence[Writing]) -> dict[str, Any]:
  """Sums over the answers."""
  names = ("seconds", "timed", "compiled", "written", "steps", "drafted", "accepted")
  return {name: sum(getattr(writing, name) for writing in writings) for name in names}


def rate(row: Mapping[str, Any]) -> float:
  """Tokens a second; not a number if each step compiled."""
  return row["timed"] / row["seconds"] if row["seconds"] else math.nan


# --- Table -------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
  """The results in Markdown."""
  columns = ("weights", "text", "guesses", "tokens/s", "right guesses", "tokens a step")
  lines = [f"| {' | '.join((*columns, 'ratio', 'least ratio'))} |", "|" + "---|" * 8]
  if not results:
    return f"Date and processor: {NOT_MEASURED}.\n\n" + "\n".join(lines) + "\n"
  groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
  for row in results["rows"]:
    groups.setdefault((row["weights"], row["kind"], row["draft"]), []).append(row)
  # The least ratio of a round.
  least = {}
  for (weights, kind, draft), rows in sorted(groups.items(), key=_order(results)):
    drafted, accepted, written, steps = (
      sum(row[name] for row in rows) for name in ("drafted", "accepted", "written", "steps")
    )
    plain = {row["round"]: rate(row) for row in groups[weights, kind, PLAIN]}
    ratios = [rate(row) / plain[row["round"]] for row in rows]
    least[weights, kind, draft] = min(ratios)
    cells = [weights, KINDS[kind], draft, f"{statistics.median(map(rate, rows)):.1f}"]
    cells.append(f"{accepted / drafted:.0%} of {drafted}" if drafted else "-")
    cells += [f"{written / max(steps, 1):.2f}", f"{statistics.median(ratios):.2f}"]
    lines.append(f"| {' | '.join([*cells, f'{min(ratios):.2f}'])} |")
  return "\n".join([_heading(results), "", *lines, "", *_notes(results, least)]) + "\n"


def _order(results: Mapping[str, Any]) -> Callable[[tuple], tuple]:
  drafts = [PLAIN, AGAIN, *results["drafts"]]
  return lambda item: (item[0][0], list(KINDS).index(item[0][1]), drafts.index(item[0][2]))


def _heading(results: Mapping[str, Any]) -> str:
  others = [row["others"] for row in results["rows"]]
  return (
    f"{results['date']}, {results['threads']} threads on {results['cpu']}; {results['model']}, "
    f"{results['texts']} texts of each kind, answers of at most {results['tokens']} tokens, "
    f"{results['rounds']} rounds. Load average before: {results['load_before']}. Meanwhile others "
    f"used {statistics.median(others):.2f} processors in the median and {max(others):.2f} at most."
  )


def _notes(
  results: Mapping[str, Any], least: Mapping[tuple[str, str, str], float]
) -> Iterator[str]:
  rows = [row for row in results["rows"] if row["draft"] != PLAIN]
  same, count = (sum(row[name] for row in rows) for name in ("same_answers", "answers"))
  yield f"- Answers that are those of plain decoding: {same} of {count}."
  chance = min(ratio for (*_, draft), ratio in least.items() if draft == AGAIN)
  guessed = [(ratio, *key) for key, ratio in least.items() if key[-1] not in (PLAIN, AGAIN)]
  if guessed:
    ratio, weights, kind, draft = min(guessed)
    kept = "holds" if ratio >= PROMISE else "does not hold"
    yield (
      f"- Least ratio of a round with guesses: {ratio:.2f} ({draft}, {KINDS[kind]}, {weights}); "
      f"without, of an engine to its like: {chance:.2f}. Never below {PROMISE}: {kept}."
    )


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
