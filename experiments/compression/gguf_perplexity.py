"""The perplexity of GGUF files that are written here, in gptjax and in llama.cpp.

    pip install ".[convert]"
    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python==0.3.36
    python -m experiments.compression.gguf_perplexity --llama_python=LLAMA/bin/python

Two models are written in every dtype: SmolLM2-135M-Instruct, and a small GPT-2 that is trained here
for some steps on the same English. Both programs read the same file and the same rows of tokens;
gptjax takes the weights that the file stands for to float32. Prints a table and writes it into
README.md, or with --output=FILE there. Fails if a perplexity differs by more than 0.5 %, or a text
has other tokens.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from experiments import datasets
from experiments.decoding.readme import write_part
from gptjax import config as config_lib
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError, check_choice
from gptjax.gguf.writer import TYPES
from gptjax.interop.convert import convert
from gptjax.interop.verify import TEXT
from gptjax.training.loop import train
from gptjax.training.pretrained import load_model, tokenizer_of

FLAGS = flags.FLAGS
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
LARGEST_DIFFERENCE = 0.005
# Rows of the text, and texts whose tokens are compared too.
ROWS = 4
OTHERS = (
  TEXT,
  "Emoji 👩‍👩‍👧 and é, 12345 <= 2024!\n\n\tif x:  # 从明天起，做一个幸福的人\n",
  Path(json.decoder.__file__).read_text(),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One file in both programs: perplexities, and how many of the texts have the same tokens."""

  model: str
  dtype: str
  mebibytes: float
  gptjax: float
  llama_cpp: float
  alike: int
  texts: int
  version: str

  @property
  def difference(self) -> float:
    return self.llama_cpp / self.gptjax - 1

  @property
  def is_good(self) -> bool:
    return abs(self.difference) <= LARGEST_DIFFERENCE and self.alike == self.texts


def _define_flags() -> None:
  flags.DEFINE_list("models", list(MODELS), f"Of {', '.join(MODELS)}.")
  flags.DEFINE_list("dtypes", list(TYPES), f"Of {', '.join(TYPES)}.")
  flags.DEFINE_integer("steps", 50, "Steps for which the small GPT-2 is trained.")
  flags.DEFINE_string("llama_python", sys.executable, "Interpreter that has llama-cpp-python.")
  flags.DEFINE_string("output", None, "File to write the table to, instead of README.md.")


def main(overrides: Mapping[str, str]) -> int:
  if overrides:
    raise UserError(f"--config.{next(iter(overrides))}: nothing here is configured; see --help.")
  for name in FLAGS.models:
    check_choice("--models", name, MODELS)
  for name in FLAGS.dtypes:
    check_choice("--dtypes", name, TYPES)
  found = []
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for model in FLAGS.models:
      source, length = MODELS[model](folder)
      for dtype in FLAGS.dtypes:
        found.append(compare(model, source, length, dtype, folder))
        print(found[-1], flush=True)
  text = table(found)
  print(text)
  Path(FLAGS.output).write_text(text) if FLAGS.output else write_part("gguf", text, HERE)
  return 0 if all(one.is_good for one in found) else 1


# --- The models --------------------------------------------------------------------------------


def prose() -> str:
  """The text whose perplexity is measured."""
  return (datasets.fetch("prose") / "sotu-2000_william_j_clinton_d.txt").read_text()


def _smollm2(folder: Path) -> tuple[str, int]:
  """SmolLM2, and the length of the rows that it reads."""
  del folder
  (path,) = datasets.fetch("smollm2").glob("*.gguf")
  return f"gguf:{path}", 512


def _gpt2(folder: Path) -> tuple[str, int]:
  """A GPT-2 of 4 layers, trained here."""
  overrides = {
    **{"data.path": str(datasets.fetch("prose")), "total_steps": FLAGS.steps},
    **{"sample.every_steps": 0, "log.tensorboard": False},
  }
  config = config_lib.load("pretrain.py:model=tiny-gpt2,data=text", overrides)
  train(config, folder / "run")
  return str(folder / "run"), 256


MODELS = {"smollm2-135m": _smollm2, "tiny-gpt2": _gpt2}


# --- Both programs -----------------------------------------------------------------------------


def compare(model: str, source: str, length: int, dtype: str, folder: Path) -> Comparison:
  """Writes a model in a dtype and asks both programs about the file, which is removed again."""
  path = folder / f"{model}-{dtype}.gguf"
  texts = (prose(), *OTHERS)
  tokens = tokenizers.load(tokenizer_of(source)).encode(texts[0])
  rows = np.reshape(tokens[: ROWS * length], (ROWS, length)).tolist()
  convert(source, path, to="gguf", dtype=dtype)
  question = {"texts": texts, "rows": rows}
  ours, theirs = answer(str(path), **question), ask_llama_cpp(path, question)
  alike = sum(a == b for a, b in zip(ours["tokens"], theirs["tokens"], strict=True))
  perplexities = [float(np.exp(np.mean(one["nats"]))) for one in (ours, theirs)]
  mebibytes = path.stat().st_size / 2**20
  path.unlink()
  return Comparison(model, dtype, mebibytes, *perplexities, alike, len(texts), theirs["version"])


def answer(path: str, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
  """What `llama_nats.answer` tells, by gptjax: the tokens of texts, and each row's mean loss."""
  model, tokenizer = load_model(path, progress=False)
  graphdef, params = nnx.split(model)

  @jax.jit
  def loss(params, tokens_BT):
    logits_BTV = nnx.merge(graphdef, params)(tokens_BT)[:, :-1]
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jax.numpy.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1).mean()

  return {
    "tokens": [tokenizer.encode(text) for text in texts],
    "nats": [float(loss(params, np.array([row], np.int32))) for row in rows],
  }


def ask_llama_cpp(path: Path, question: Mapping[str, Any]) -> dict[str, Any]:
  """Asks llama.cpp, in a process of the interpreter that has it."""
  command = [FLAGS.llama_python, "-m", "experiments.compression.llama_nats", str(path)]
  process = subprocess.run(
    command, input=json.dumps(question), capture_output=True, text=True, cwd=ROOT, check=False
  )
  if process.returncode:
    last = process.stderr.strip().rpartition("\n")[2]
    raise UserError(f"--llama_python={FLAGS.llama_python}: llama.cpp does not answer ({last}).")
  return json.loads(process.stdout)


def table(found: Sequence[Comparison]) -> str:
  """The comparisons in Markdown."""
  lines = [
    f"llama-cpp-python {found[0].version}, jax {jax.__version__}.",
    "",
    "| model | dtype | MiB | perplexity in gptjax | in llama.cpp | difference | same tokens |",
    "|---|---|---|---|---|---|---|",
  ]
  for one in found:
    lines.append(
      f"| {one.model} | {one.dtype} | {one.mebibytes:.1f} | {one.gptjax:.4f} | "
      f"{one.llama_cpp:.4f} | {one.difference:+.3%} | {one.alike} of {one.texts} texts |"
    )
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
