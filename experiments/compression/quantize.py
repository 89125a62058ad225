"""Ways to store a model in few bits: what each costs in quality, and gains in size and speed.

    python -m experiments.compression.quantize --model=smollm2 --output=runs/smollm2
    python -m experiments.compression.quantize --model=quickstart --checkpoint=runs/demo \\
      --output=runs/quickstart

Every way is judged on text that was neither calibrated nor trained on: English (State of the Union
addresses of 1990 to 2000) and code (every eighth module of the standard library); and on choosing
the sentence that follows, of four. Speeds are of the engine, in turn, each time in another order,
in one process; memory is that of a process of its own. Models and their quality are kept in the
output folder, and what is there is not made again, so that an interrupted run goes on. Writes
MODEL.json, of which `table.py` makes tables and pictures.
"""

import dataclasses
import gc
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from flax import nnx

from experiments import datasets, recipes
from experiments.decoding.compare import describe_machine
from gptjax import config as config_lib
from gptjax.compression.calibration import read_rows
from gptjax.compression.quantize import count_bytes, quantized
from gptjax.compression.report import measure_quality
from gptjax.data.tokenizer import Tokenizer
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError
from gptjax.evals.score import score
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
from gptjax.inference.sampling import Sampling
from gptjax.model.gpt import GPT
from gptjax.quantization.formats import Format
from gptjax.quantization.stored import KEY, Stored
from gptjax.scores import scores
from gptjax.small_files import new_folder
from gptjax.training.datasets import open_dataset
from gptjax.training.pretrained import load_model, save_model

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
INT8 = Format("int8")
# Rows that each way is judged on, and calibrated on, and their tokens.
ROWS_OF = {"smollm2": (8, 32, 512), "quickstart": (64, 128, 256)}
# Sentences to choose among, those before them, and how often.
CHOICES, BEFORE, QUESTIONS = 4, 3, 100
ROUNDS, PROMPT, ANSWER, ROWS = 5, 16, 48, (1, 8)


@dataclasses.dataclass(frozen=True)
class Way:
  """A way to store the model: the format of its kernels and table, and how they are rounded."""

  weights: Format | None
  embedding: Format | None = None
  method: str = "nearest"
  activations: str = "none"

  @property
  def name(self) -> str:
    if self.weights is None:
      return "float32"
    form = self.weights
    group = f", groups of {form.group}" if form.group else ""
    zeros = "" if form.symmetric else ", zero points"
    inputs = "" if self.activations == "none" else f", inputs in {self.activations}"
    return f"{form.name}{group}{zeros}{inputs}, {self.method}"


def ways(groups: Sequence[int]) -> list[Way]:
  """All ways that are compared, with int4 in groups of these sizes."""
  found = [Way(None), Way(INT8, INT8), Way(Format("float8"), INT8)]
  found += [Way(INT8, INT8, method, "int8") for method in ("nearest", "smoothquant")]
  found.append(Way(Format("nf4", groups[-1]), INT8))
  for group in groups:
    form = Format("int4", group)
    methods = ("nearest", "awq", "gptq", "awq+gptq")
    found += [Way(form, INT8, method) for method in methods]
  zeros = Format("int4", groups[-1], symmetric=False)
  return [*found, Way(zeros, INT8), Way(zeros, INT8, "gptq")]


def texts(model: str, checkpoint: str, folder: Path) -> Path:
  """Writes a folder of texts: calibration/, code/, and for SmolLM2 english/."""

  def write(folder: Path) -> None:
    for name in ("calibration", "code"):
      (folder / name).mkdir(parents=True)
    if model == "quickstart":
      run = open_dataset(config_lib.open_saved(epath.Path(checkpoint)), checkpoint)
      for name, documents in (
        ("calibration", run.training_text()),
        ("code", run.validation_text()),
      ):
        for number, text in enumerate(documents):
          (folder / name / f"{number:05}.txt").write_text(text)
      return
    (folder / "english").mkdir()
    for file in sorted(datasets.fetch("prose").glob("sotu-*.txt")):
      year = int(re.search(r"sotu-(\d{4})", file.name)[1])
      if not 1980 <= year < 1990:
        target = "english" if year >= 1990 else "calibration"
        (folder / target / file.name).write_text(file.read_text())
    for number, (name, source) in enumerate(sorted(recipes.stdlib_modules())):
      target = "calibration" if number % 8 else "code"
      (folder / target / f"{name}.txt").write_text(source)

  return datasets.make_once(folder, write)


def questions(folder: Path) -> list[tuple[str, list[str]]]:
  """(beginning, candidates) with the true continuation first, of held-out documents: lines of code
  or sentences, the others being from elsewhere in the same document."""
  rng = random.Random(0)
  found = []
  files = sorted(
    (folder / "english" if (folder / "english").exists() else folder / "code").iterdir()
  )
  while len(found) < QUESTIONS:
    text = rng.choice(files).read_text()
    parts = re.findall(r"[^\n]{40,160}(?:\n|[.!?] )", text)
    if len(parts) > 40:
      at = rng.randrange(BEFORE, len(parts) - 1)
      others = rng.sample([part for part in parts if part != parts[at]], CHOICES - 1)
      found.append(("".join(parts[at - BEFORE : at]), [parts[at], *others]))
  return found


def accuracy(model: GPT, tokenizer: Tokenizer, asked: list[tuple[str, list[str]]]) -> scores.Metric:
  """The share of questions whose true continuation is the likeliest, by its characters."""
  pairs = [
    ([tokenizer.end_of_text, *tokenizer.encode(start)], tokenizer.encode(one))
    for start, candidates in asked
    for one in candidates
  ]
  found = [one.log_likelihood for one in score(model, pairs)]
  sizes = [len(one) for _, candidates in asked for one in candidates]
  each = np.array(found).reshape(-1, CHOICES) / np.array(sizes).reshape(-1, CHOICES)
  right = each.argmax(1) == 0
  return scores.bootstrap(scores.mean_of(right), len(right))


def make(way: Way, original: GPT, calibration_RT: np.ndarray) -> tuple[GPT, Stored | None, float]:
  """The model in a format, how it is stored, and the seconds that it took."""
  start = time.perf_counter()
  copy = nnx.merge(*nnx.split(original))
  if way.weights is None:
    return copy, None, 0.0
  rows = None if way.method == "nearest" else calibration_RT
  plan = Stored(way.weights, way.embedding, activations=way.activations)
  small, plan = quantized(copy, plan, method=way.method, tokens_RT=rows)
  jax.block_until_ready(nnx.state(small))
  return small, plan, time.perf_counter() - start


def measure_speeds(folders: dict[str, Path], prompts_RT: np.ndarray) -> dict[str, Any]:
  """{name: {rows: (tokens a second, ratio to float32, least ratio)}} of `ROUNDS` rounds."""
  rates: dict[str, dict[int, list[float]]] = {}
  for rows in ROWS:
    engines = {}
    for name, folder in folders.items():
      model, tokenizer = load_model(folder, progress=False)
      engines[name] = Engine(model, tokenizer, rows=rows, length=PROMPT + ANSWER + 16)
      del model
      write(engines[name], prompts_RT, rows)
    for number in range(ROUNDS):
      order = [*engines]
      random.Random(number).shuffle(order)
      for name in order:
        rates.setdefault(name, {}).setdefault(rows, []).append(
          write(engines[name], prompts_RT, rows)
        )
    del engines
    gc.collect()
  told = {}
  for name, of_rows in rates.items():
    told[name] = {}
    for rows, found in of_rows.items():
      ratios = [own / base for own, base in zip(found, rates["float32"][rows], strict=True)]
      told[name][rows] = statistics.median(found), statistics.median(ratios), min(ratios)
  return told


def write(engine: Engine, prompts_RT: np.ndarray, rows: int) -> float:
  """Tokens a second of answers to the first rows, their prompts not counted."""
  for prompt in prompts_RT[:rows]:
    request = Request(
      prompt[:PROMPT].tolist(), max_tokens=ANSWER, sampling=Sampling(0), ignore_end=True
    )
    engine.submit(request)
  engine.step()
  written, start = 0, time.perf_counter()
  while not engine.idle:
    written += len(engine.running)
    engine.step()
  return written / (time.perf_counter() - start)


def cache_quality(
  model: GPT, tokenizer: Tokenizer, rows_RT: np.ndarray, cache: str | None
) -> float:
  """Nats a token of rows but for their first, read by the engine from a cache in a format."""
  engine = Engine(model, tokenizer, rows=8, length=rows_RT.shape[1] + 16, cache=cache)
  options = {"max_tokens": 0, "log_probs": 0, "scores_prompt": True}
  answers = engine.run([Request(row.tolist(), **options) for row in rows_RT])
  return -float(
    np.mean([score.log_prob for answer in answers for score in answer.prompt_scores[1:]])
  )


# Prints what a process that loads a checkpoint and writes a few tokens holds in memory, in bytes.
_RESIDENT = """
import sys
from gptjax.devices.hosts import prepare_cpu
prepare_cpu()
from gptjax.training.pretrained import load_model
model, tokenizer = load_model(sys.argv[1], progress=False)
from gptjax.inference.engine import Engine
from gptjax.inference.request import Request
engine = Engine(model, tokenizer, rows=1, length=64)
del model
import gc; gc.collect()
engine.run([Request([5, 6, 7], max_tokens=8)])
status = open("/proc/self/status").read().split()
print(int(status[status.index("VmRSS:") + 1]) * 1024)
"""


def resident_bytes(folder: Path) -> int:
  done = subprocess.run(
    [sys.executable, "-c", _RESIDENT, str(folder)], capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise UserError(f"{folder}: its memory cannot be measured: {done.stderr[-500:]}")
  return int(done.stdout)


def main(overrides: dict[str, str]) -> None:
  if overrides:
    raise UserError("this takes no --config.KEY flags.")
  machine = describe_machine()
  prepare_cpu()
  checkpoint = FLAGS.checkpoint
  if FLAGS.model == "smollm2":
    (path,) = datasets.fetch("smollm2").glob("*.gguf")
    checkpoint = f"gguf:{path}"
  elif not checkpoint:
    raise UserError("--model=quickstart needs --checkpoint, the run of configs/quickstart.py.")
  model, tokenizer = load_model(checkpoint)
  graph, state = nnx.split(model)
  folder = texts(FLAGS.model, checkpoint, Path(FLAGS.output) / "texts")
  length = min(512, model.config.position.room or 512) if FLAGS.model == "quickstart" else 512
  judged, calibrated, length = ROWS_OF[FLAGS.model]
  options = {"length": length, "seed": 1}
  held_out = {
    name: read_rows(str(folder / name), tokenizer, rows=judged, **options)
    for name in ("english", "code")
    if (folder / name).exists()
  }
  calibration_RT = read_rows(str(folder / "calibration"), tokenizer, rows=calibrated, **options)
  asked = questions(folder)
  groups = [int(group) for group in FLAGS.groups]
  chosen = [way for way in ways(groups) if way.weights is None or re.search(FLAGS.ways, way.name)]
  output = Path(FLAGS.output)
  results, folders = [], {}
  for way in chosen:
    folders[way.name] = output / re.sub(r"\W+", "-", way.name)
    measured = folders[way.name].with_suffix(".json")
    if not measured.exists():
      print(f"{way.name} ...", flush=True)
      original = nnx.merge(graph, state)
      small, plan, seconds = make(way, original, calibration_RT)
      if not folders[way.name].exists():
        with new_folder(folders[way.name]) as partial:
          more = None if plan is None else {KEY: plan.to_config()}
          save_model(partial, small, tokenizer, None, more)
      quality = {
        name: dataclasses.asdict(measure_quality(small, original, rows_RT))
        for name, rows_RT in held_out.items()
      }
      found = {
        "name": way.name,
        "bytes": count_bytes(small),
        "seconds": seconds,
        "quality": quality,
        "accuracy": dataclasses.asdict(accuracy(small, tokenizer, asked)),
      }
      measured.write_text(json.dumps(found, indent=2))
      del small, original
      jax.clear_caches()
      gc.collect()
    results.append(json.loads(measured.read_text()))
    ratios = {name: told["ratio"]["value"] for name, told in results[-1]["quality"].items()}
    print(way.name, {name: round(ratio, 4) for name, ratio in ratios.items()}, flush=True)
  measured = output / "caches.json"
  if not measured.exists():
    caches = {
      str(cache): {
        name: cache_quality(nnx.merge(graph, state), tokenizer, rows_RT[:16], cache)
        for name, rows_RT in held_out.items()
      }
      for cache in (None, "int8", "int4")
    }
    measured.write_text(json.dumps(caches, indent=2))
  if not FLAGS.speeds:
    return
  told = {"machine": machine, "caches": json.loads(measured.read_text())}
  prompts_RT = next(iter(held_out.values()))
  del model, state
  for result in results:
    result["resident"] = resident_bytes(folders[result["name"]])
  speeds = measure_speeds(folders, prompts_RT)
  for result in results:
    result["speed"] = speeds[result["name"]]
  told["results"] = results
  (HERE / f"{FLAGS.model}.json").write_text(json.dumps(told, indent=2) + "\n")


def _define_flags() -> None:
  flags.DEFINE_enum("model", "smollm2", ("smollm2", "quickstart"), "The model.")
  flags.DEFINE_string("checkpoint", None, "With --model=quickstart: the run.")
  flags.DEFINE_list("groups", ["64", "32"], "Sizes of groups of int4.")
  flags.DEFINE_string("ways", "", "Regular expression for the names of the ways to compare.")
  flags.DEFINE_string(
    "output", None, "Folder of the models and of what is measured.", required=True
  )
  flags.DEFINE_bool("speeds", True, "Whether memory and speeds are measured; else quality alone.")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
