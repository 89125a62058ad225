"""The engine under load: many requests of mixed lengths that come at random times, in this process.

    python -m experiments.decoding.load
    python -m experiments.decoding.load --soak=5000

The first compares them with the same requests one at a time, and a prompt whose start is cached
with one that is new. The second answers that many requests with a tiny model, some of them
cancelled, and tells the resident memory. Both write load.json and their part of README.md; with
--output that file alone.
"""

import collections
import dataclasses
import gc
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.decoding.compare import describe_machine
from experiments.decoding.models import FORMATS, MODELS, prepare
from experiments.decoding.readme import HERE, NOT_MEASURED, write_part
from gptjax import config as config_lib
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError, check_number
from gptjax.inference.engine import Engine
from gptjax.inference.pages import PAGE
from gptjax.inference.request import Answer, Request
from gptjax.inference.sampling import Sampling, compilations
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS
# Tokens of prompts and of answers, from and to.
PROMPTS, ANSWERS = (16, 512), (16, 128)
SOAK_PROMPTS, SOAK_ANSWERS = (1, 96), (1, 64)
# Every so many of the soak's requests is cancelled while it is written.
CANCEL_EVERY = 10
# After so many requests the memory is taken for the first time.
SOAK_WARM_UP = 500
PREFIX, QUESTION, PREFIX_TRIALS = 512, 16, 5
GREEDY = Sampling(temperature=0)


def _define_flags() -> None:
  flags.DEFINE_enum("model", "smollm2-135m", MODELS, "The model.")
  flags.DEFINE_enum("weights", "float32", FORMATS, "Format of its weights.")
  flags.DEFINE_integer("requests", 200, "How many requests come.")
  flags.DEFINE_integer("rows", 32, "Answers that grow at the same time.")
  flags.DEFINE_float("share", 0.9, "Rate of arrivals, as a share of what can be answered.")
  flags.DEFINE_integer("soak", 0, "Answer so many requests with a tiny model instead.")
  flags.DEFINE_string("output", None, "JSON file to write instead of load.json and README.md.")


def main(overrides: Mapping[str, str]) -> None:
  if overrides:
    raise UserError(f"--config.{next(iter(overrides))}: nothing here is configured; see --help.")
  check_number("--requests", FLAGS.requests, at_least=1)
  check_number("--rows", FLAGS.rows, at_least=1)
  check_number("--share", FLAGS.share, above=0)
  if FLAGS.soak and FLAGS.soak <= SOAK_WARM_UP:
    raise UserError(f"--soak={FLAGS.soak} must be above {SOAK_WARM_UP}, which warm up.")
  output = Path(FLAGS.output or HERE / "load.json")
  results = read(output)
  machine = describe_machine()
  prepare_cpu()
  if FLAGS.soak:
    results["soak"] = machine | soak(FLAGS.soak, FLAGS.rows)
  else:
    folder = prepare(FLAGS.model)
    results["load"] = machine | {"model": FLAGS.model} | measure(folder)
  output.write_text(json.dumps(results, indent=1) + "\n")
  if not FLAGS.output:
    write_part("load", table(results))
  print(table(results))


def read(path: Path) -> dict[str, Any]:
  """What was measured before."""
  return json.loads(path.read_text()) if path.exists() else {}


# --- Load --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Timing:
  """When a request came, and each token of its answer, in seconds."""

  arrival: float
  answer: Answer
  tokens: list[float] = dataclasses.field(default_factory=list)

  @property
  def first(self) -> float:
    return self.tokens[0] - self.arrival

  @property
  def gaps(self) -> np.ndarray:
    return np.diff(self.tokens)


def measure(folder: Path) -> dict[str, Any]:
  model, tokenizer = load_model(f"hf:{folder / 'hf'}", progress=False)
  longest = PROMPTS[1] + max(ANSWERS[1], 2 * PAGE)
  engine = Engine(model, tokenizer, rows=FLAGS.rows, length=longest, weights=FLAGS.weights)
  print("warms up", flush=True)
  warm_up(engine)
  before = compilations.total()
  requests = draw(FLAGS.requests, tokenizer.vocab_size, PROMPTS, ANSWERS)

  print("all at once", flush=True)
  _, seconds = serve(engine, requests, np.zeros(len(requests)))
  rate = FLAGS.share * len(requests) / seconds
  print(f"as they come, {rate:.2f} a second", flush=True)
  arrivals = np.random.default_rng(1).exponential(1 / rate, len(requests)).cumsum()
  engine.reader.clear()
  together, seconds_together = serve(engine, requests, arrivals)
  print("one at a time", flush=True)
  engine.reader.clear()
  alone, seconds_alone = serve_alone(engine, requests)
  same = sum(a.answer.tokens == b.answer.tokens for a, b in zip(together, alone, strict=True))
  return {
    **{"weights": FLAGS.weights, "rows": FLAGS.rows, "requests": len(requests)},
    **{"capacity": len(requests) / seconds, "rate": rate},
    "together": describe(together, seconds_together),
    "alone": describe(alone, seconds_alone),
    "same_answers": same,
    "preemptions": engine.counts.preemptions,
    "prefix": measure_prefix(engine),
    "compilations": compilations.total() - before,
  }


def draw(
  count: int, vocab: int, prompts: tuple[int, int], answers: tuple[int, int], seed: int = 0
) -> list[Request]:
  """Requests of random tokens, with lengths drawn evenly."""
  rng = np.random.default_rng(seed)
  return [
    Request(
      rng.integers(0, vocab, rng.integers(*prompts, endpoint=True)).tolist(),
      int(rng.integers(*answers, endpoint=True)),
      GREEDY,
      ignore_end=True,
    )
    for _ in range(count)
  ]


def serve(
  engine: Engine, requests: Sequence[Request], arrivals: Sequence[float]
) -> tuple[list[Timing], float]:
  """Answers requests that come at given times; returns their timings and the seconds of it all."""
  coming = collections.deque(zip(arrivals, requests, strict=True))
  timings: list[Timing] = []
  growing: list[Timing] = []
  start = time.perf_counter()
  while coming or growing:
    now = time.perf_counter() - start
    while coming and coming[0][0] <= now:
      arrival, request = coming.popleft()
      growing.append(Timing(float(arrival), engine.submit(request)))
      timings.append(growing[-1])
    if not growing:
      time.sleep(coming[0][0] - now)
      continue
    engine.step()
    now = time.perf_counter() - start
    for timing in growing:
      written = len(timing.answer.tokens) - timing.answer.prompt_length
      timing.tokens += [now] * (written - len(timing.tokens))
    growing = [timing for timing in growing if not timing.answer.finish_reason]
  return timings, time.perf_counter() - start


def serve_alone(engine: Engine, requests: Sequence[Request]) -> tuple[list[Timing], float]:
  """Answers each request after the one before has ended."""
  served = [serve(engine, [request], [0.0]) for request in requests]
  return [timing for (timing,), _ in served], sum(seconds for _, seconds in served)


def describe(timings: Sequence[Timing], seconds: float) -> dict[str, float]:
  first = [timing.first for timing in timings]
  gaps = np.concatenate([timing.gaps for timing in timings])
  return {
    "seconds": seconds,
    "requests_per_second": len(timings) / seconds,
    "tokens_per_second": sum(len(timing.tokens) for timing in timings) / seconds,
    **{f"first_p{p}": float(np.percentile(first, p)) for p in (50, 99)},
    **{f"between_p{p}": float(np.percentile(gaps, p)) for p in (50, 99)},
  }


def measure_prefix(engine: Engine) -> dict[str, float]:
  """Seconds to the first token of prompts that begin with the same text: of the first of them, and
  of the others."""
  rng, vocab = np.random.default_rng(2), engine.tokenizer.vocab_size
  prefix = rng.integers(0, vocab, PREFIX).tolist()
  cold, cached = [], []
  for _ in range(PREFIX_TRIALS):
    engine.reader.clear()
    for found in (cold, cached):
      question = rng.integers(0, vocab, QUESTION).tolist()
      ((timing,), _) = serve(engine, [Request(prefix + question, 1, GREEDY, ignore_end=True)], [0])
      found.append(timing.first)
  return {"cold": float(np.median(cold)), "cached": float(np.median(cached))}


def warm_up(engine: Engine) -> None:
  """Compiles the step for all numbers of rows, of new tokens and of pages.

  The texts of a length share their start, so that little of them is read.
  """
  rng, vocab = np.random.default_rng(3), engine.tokenizer.vocab_size

  def answer(texts: Sequence[Sequence[int]], tokens: int) -> None:
    engine.run([Request(text, tokens, GREEDY, ignore_end=True) for text in texts])

  def random(count: int) -> list[int]:
    return rng.integers(0, vocab, count).tolist()

  base = random(engine.length)
  lengths = sorted({min(engine.length, 8 * PAGE << i) for i in range(engine.length.bit_length())})
  for length in lengths:
    answer([base[: length - 1]], 1)
    new = min(16, engine.chunk)
    while new <= min(engine.chunk, length - PAGE):
      start = (length - new - 1) // PAGE * PAGE
      answer([base[:start] + random(new)], 1)
      new *= 2
    start, rows = (length - 5) // PAGE * PAGE, 1
    while rows <= engine.rows:
      answer([base[:start] + random(2) for _ in range(rows)], 2)
      rows *= 2
  engine.reader.clear()


# --- Soak --------------------------------------------------------------------------------------


def soak(count: int, rows: int) -> dict[str, Any]:
  """Answers requests, some of them cancelled, with a tiny model and watches the memory."""
  model, tokenizer = load_model(f"hf:{prepare('tiny') / 'hf'}", progress=False)
  length = SOAK_PROMPTS[1] + SOAK_ANSWERS[1]
  engine = Engine(model, tokenizer, rows=rows, length=length)
  requests = collections.deque(draw(count, tokenizer.vocab_size, SOAK_PROMPTS, SOAK_ANSWERS))
  growing: list[Answer] = []
  ended, cancelled, memory = 0, 0, {}
  start = time.perf_counter()
  while requests or growing:
    while requests and len(growing) < 2 * rows:
      growing.append(engine.submit(requests.popleft()))
      if len(requests) % CANCEL_EVERY == 0 and growing[0].completion:
        engine.cancel(growing[0])
        cancelled += 1
    engine.step()
    still = [answer for answer in growing if not answer.finish_reason]
    ended += len(growing) - len(still)
    growing = still
    if ended >= SOAK_WARM_UP and "start" not in memory:
      memory["start"] = resident()
  memory["end"] = resident()
  return {
    **{"requests": count, "cancelled": cancelled, "rows": rows},
    "seconds": time.perf_counter() - start,
    "memory": memory,
    "pages_in_use": engine.reader.pages.used,
  }


def resident() -> int:
  """Bytes of memory that this process has."""
  gc.collect()
  return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- Table -------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
  """The results in Markdown."""
  return f"{_load_table(results.get('load'))}\n{_soak_line(results.get('soak'))}\n"


_ROWS = {
  "tokens written a second": "{tokens_per_second:,.0f}",
  "requests a second": "{requests_per_second:.2f}",
  "first token after, seconds, median and p99": "{first_p50:.3g}, {first_p99:.3g}",
  "between tokens, milliseconds, median and p99": "{between_p50:.0f}, {between_p99:.0f}",
}


def _load_table(found: Mapping[str, Any] | None) -> str:
  lines = ["| | as they come | one at a time |", "|---|---|---|"]
  if not found:
    lines += [f"| {name} | {NOT_MEASURED} | {NOT_MEASURED} |" for name in _ROWS]
    return "\n".join(lines) + "\n"
  for name, shown in _ROWS.items():
    cells = []
    for part in (found["together"], found["alone"]):
      thousand = {key: 1000 * value for key, value in part.items() if key.startswith("between")}
      cells.append(shown.format(**part | thousand))
    lines.append(f"| {name} | {' | '.join(cells)} |")
  prefix = found["prefix"]
  heading = (
    f"{found['date']}, {found['threads']} threads on {found['cpu']}; {found['model']} in "
    f"{found['weights']}, {found['requests']} requests, {found['rows']} rows. All at once they "
    f"are answered at {found['capacity']:.2f} a second; they came at {found['rate']:.2f}. Load "
    f"average before: {found['load_before']}."
  )
  notes = [
    f"- Answers that are the same both ways: {found['same_answers']} of {found['requests']}; "
    f"answers that lost their pages and were read again: {found['preemptions']}.",
    f"- Compilations after the warm-up: {found['compilations']}.",
    f"- A prompt of {PREFIX} tokens and {QUESTION} more: first token after {prefix['cold']:.3g} s; "
    f"after {prefix['cached']:.3g} s if the {PREFIX} are cached.",
  ]
  return "\n".join([heading, "", *lines, "", *notes]) + "\n"


def _soak_line(found: Mapping[str, Any] | None) -> str:
  if not found:
    return f"Memory after many requests: {NOT_MEASURED}."
  start, end = (found["memory"][name] / 2**20 for name in ("start", "end"))
  return (
    f"{found['requests']:,} requests to a tiny model, {found['cancelled']} of them cancelled, in "
    f"{found['seconds']:.0f} s ({found['date']}): {start:,.1f} MiB of memory after {SOAK_WARM_UP}, "
    f"{end:,.1f} MiB after all, and {found['pages_in_use']} pages in use."
  )


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
