"""Makes a trained model smaller and cheaper, and tells what that costs.

    python -m gptjax.compress quantize --checkpoint=runs/first --to=runs/first-int4 \\
      --format=int4 --group=32 --embedding=int8 --method=gptq --data=corpus/
    python -m gptjax.compress report --checkpoint=runs/first-int4 --original=runs/first \\
      --data=heldout/

quantize: stores the kernels of all layers in few bits, embedding and head in formats of their own.
report: perplexity and distance to the original on text, bytes, and tokens a second. What is written
is a checkpoint as any other, for gptjax.generate, serve, evaluate, convert and init_from.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from gptjax import config as config_lib
from gptjax.compression import report
from gptjax.compression.calibration import read_rows
from gptjax.compression.quantize import METHODS, count_bytes, quantize
from gptjax.data.tokenizer import Tokenizer
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError, check_number, did_you_mean
from gptjax.quantization.formats import BITS, Format
from gptjax.quantization.stored import Stored
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS
WORDS = ("quantize", "report")


def need(name: str, what: str) -> str:
  """The value of a flag that has to be given."""
  if not (value := FLAGS[name].value):
    raise UserError(f"--{name} is missing: {what}.")
  return value


def rows_of_text(tokenizer: Tokenizer) -> np.ndarray:
  """Rows of the text in --data, int32 [R, T]."""
  path = need("data", "text files or records, to calibrate or to measure on")
  for name in ("rows", "length"):
    check_number(f"--{name}", FLAGS[name].value, at_least=1)
  return read_rows(path, tokenizer, rows=FLAGS.rows, length=FLAGS.length, seed=FLAGS.seed)


def write_quantized() -> None:
  checkpoint, target = need("checkpoint", "the model"), need("to", "the folder to write")
  if FLAGS.method == "nearest" and FLAGS.data:
    raise UserError("--data is not used by --method=nearest: leave it out, or take gptq or awq.")
  formats = [FLAGS.embedding, FLAGS.head]
  embedding, head = (None if name == "float32" else Format(name) for name in formats)
  stored = Stored(Format(FLAGS.format, FLAGS.group, FLAGS.symmetric), embedding, head)
  options = {"method": FLAGS.method, "read_tokens": rows_of_text}
  found = quantize(checkpoint, Path(target).expanduser(), stored, **options)
  share = found["after"] / found["before"]
  print(f"{target}: {found['after']:,} bytes of parameters, {share:.3f} of {found['before']:,}")


def print_report() -> None:
  names = [need("checkpoint", "the compressed model"), need("original", "what it was made from")]
  (model, tokenizer), (original, other) = (load_model(name) for name in names)
  if tokenizer.spec != other.spec and tokenizer.vocab_size != other.vocab_size:
    raise UserError(f"--checkpoint={names[0]} and --original={names[1]} have other tokenizers.")
  tokens_RT = rows_of_text(tokenizer)
  quality = report.measure_quality(model, original, tokens_RT, progress=True)
  options = {"price": FLAGS.price}
  speeds = [report.measure_speed(model, tokenizer, tokens_RT, rows=n, **options) for n in (1, 8)]
  print(report.describe(quality, speeds, [count_bytes(one) for one in (model, original)]))
  own, theirs = (report.disk(name) for name in names)
  print(f"on disk: {own:,} bytes, {own / theirs:.3f} of {theirs:,}")


def main(overrides: Mapping[str, str], words: Sequence[str]) -> None:
  if overrides:
    raise UserError("gptjax.compress takes no --config.KEY flags.")
  prepare_cpu()
  match [*words]:
    case ["quantize"]:
      write_quantized()
    case ["report"]:
      print_report()
    case [word, *_] if word not in WORDS:
      raise UserError(f"no way to compress {word!r}. {did_you_mean(word, WORDS)}")
    case _:
      raise UserError(f"give one word of {', '.join(WORDS)}, and flags after it.")


def _define_flags() -> None:
  flags.DEFINE_string("checkpoint", None, "A run, a folder of Hugging Face's files or FILE.gguf.")
  flags.DEFINE_string("to", None, "Folder to write, which must not exist.")
  flags.DEFINE_enum("format", "int8", tuple(BITS), "quantize: of the kernels of all layers.")
  flags.DEFINE_integer("group", 0, "quantize: inputs that share a scale; 0 is all of an output.")
  flags.DEFINE_bool("symmetric", True, "quantize: without zero points.")
  formats = ("float32", *BITS)
  flags.DEFINE_enum("embedding", "float32", formats, "quantize: of the table of tokens.")
  flags.DEFINE_enum("head", "float32", formats, "quantize: of a head that is not the embedding.")
  flags.DEFINE_enum("method", "nearest", METHODS, "quantize: how weights are rounded.")
  flags.DEFINE_string("original", None, "report: the model to compare with.")
  flags.DEFINE_string("data", None, "Text files or records, to calibrate or to measure on.")
  flags.DEFINE_integer("rows", 128, "Rows of text.")
  flags.DEFINE_integer("length", 512, "Tokens of a row.")
  flags.DEFINE_integer("seed", 0, "Decides which places of the text the rows are.")
  flags.DEFINE_float("price", None, "report: of an hour of this machine.")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__, words=True)
