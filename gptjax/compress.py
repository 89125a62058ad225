"""Makes a trained model smaller and cheaper, and tells what that costs.

    python -m gptjax.compress quantize --checkpoint=runs/first --to=runs/first-int4 \\
      --format=int4 --group=32 --embedding=int8 --method=gptq --data=corpus/
    python -m gptjax.compress prune --checkpoint=runs/first --to=runs/first-sparse \\
      --sparsity=2:4 --method=wanda --data=corpus/
    python -m gptjax.compress shrink --checkpoint=runs/first --to=runs/first-small --layers=3 \\
      --data=corpus/
    python -m gptjax.compress average --checkpoint=runs/a,runs/b --to=runs/soup --method=mean
    python -m gptjax.compress report --checkpoint=runs/first-int4 --original=runs/first \\
      --data=heldout/

quantize: stores the kernels of all layers in few bits. prune: zeroes weights, the shapes stay.
shrink: leaves out layers, channels, heads or width. average: one model of several. report: how far
predictions on text are from the original's, bytes, and tokens a second. What is written is a
checkpoint as any other, for gptjax.generate, serve, evaluate, convert and init_from.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from gptjax import config as config_lib
from gptjax.compression import average, prune, quantize, report, structured
from gptjax.compression.models import calibration_rows
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError, did_you_mean
from gptjax.quantization.formats import BITS, Format
from gptjax.quantization.stored import Stored
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS
WORDS = ("quantize", "prune", "shrink", "average", "report")
SIZES = ("layers", "mlp_dim", "kv_heads", "heads", "embed_dim")
OF_AVERAGES = ("weights", "base", "scale", "fraction", "density", "drop")


def need(name: str, what: str) -> str:
  """The value of a flag that has to be given."""
  if not (value := FLAGS[name].value):
    raise UserError(f"--{name} is missing: {what}.")
  return value


def text() -> dict[str, object]:
  """The text that is measured on, as the functions take it."""
  return {name: FLAGS[name].value for name in ("data", "rows", "length", "seed")}


def write(word: str) -> str:
  """Does what writes a checkpoint; returns what is to be said of it."""
  checkpoint, target = need("checkpoint", "the model"), need("to", "the folder to write")
  to, options = Path(target).expanduser(), {"ema": FLAGS.ema}
  match word:
    case "quantize":
      formats = [FLAGS.embedding, FLAGS.head]
      embedding, head = (None if name == "float32" else Format(name) for name in formats)
      stored = Stored(Format(FLAGS.format, FLAGS.group, FLAGS.symmetric), embedding, head)
      method = FLAGS.method or "nearest"
      found = quantize.quantize(checkpoint, to, stored, method=method, **text(), **options)
      share = found["after"] / found["before"]
      return f"{found['after']:,} bytes of parameters, {share:.3f} of {found['before']:,}"
    case "prune":
      options |= {
        "method": FLAGS.method or "magnitude",
        "sparsity": need("sparsity", "as 0.5, 2:4"),
      }
      pruned = prune.prune(checkpoint, to, **text(), **options)
      return f"{pruned.zeros:,} of {pruned.weights:,} weights of the layers' kernels are 0"
    case "shrink":
      need("data", "text to measure importance on")
      sizes = structured.Sizes(**{name: FLAGS[name].value for name in SIZES})
      small = structured.shrink(checkpoint, to, sizes, **text(), **options)
      return f"{small.parameters:,} parameters of {small.parameters_before:,}"
    case _:
      named = {name: FLAGS[name].value for name in OF_AVERAGES}
      if FLAGS.data:
        named |= text()
      options |= {name: value for name, value in named.items() if value is not None}
      method = FLAGS.method or "mean"
      averaged = average.average(checkpoint.split(","), to, method=method, **options)
      return f"{averaged.parameters:,} parameters, of {len(averaged.ingredients)} models"


def print_report() -> None:
  names = [need("checkpoint", "the small model"), need("original", "what it was made from")]
  need("data", "text that neither was trained or calibrated on")
  (model, tokenizer), (original, other) = (load_model(name) for name in names)
  if tokenizer.spec != other.spec and tokenizer.vocab_size != other.vocab_size:
    raise UserError(f"--checkpoint={names[0]} and --original={names[1]} have other tokenizers.")
  options = text()
  tokens_RT = calibration_rows(options.pop("data"), tokenizer, **options)
  quality = report.measure_quality(model, original, tokens_RT, progress=True)
  timed = (model, tokenizer, tokens_RT)
  speeds = [report.measure_speed(*timed, rows=rows, price=FLAGS.price) for rows in (1, 8)]
  memory = [quantize.count_bytes(one) for one in (model, original)]
  print(report.describe(quality, speeds, memory))
  own, theirs = (report.disk(name) for name in names)
  print(f"on disk: {own:,} bytes, {own / theirs:.3f} of {theirs:,}")


def main(overrides: Mapping[str, str], words: Sequence[str]) -> None:
  if overrides:
    raise UserError("gptjax.compress takes no --config.KEY flags.")
  prepare_cpu()
  match [*words]:
    case ["report"]:
      print_report()
    case [word] if word in WORDS:
      print(f"{FLAGS.to}: {write(word)}")
    case [word, *_] if word not in WORDS:
      raise UserError(f"no way to compress {word!r}. {did_you_mean(word, WORDS)}")
    case _:
      raise UserError(f"give one word of {', '.join(WORDS)}, and flags after it.")


def _define_flags() -> None:
  string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
  string("checkpoint", None, "A run, a folder of Hugging Face's or FILE.gguf; average: by commas.")
  string("to", None, "Folder to write, which must not exist.")
  flags.DEFINE_bool("ema", False, "Take the moving average of a run's weights.")
  methods = (*quantize.METHODS, *prune.METHODS, *average.METHODS)
  flags.DEFINE_enum("method", None, methods, "How weights are rounded, pruned or averaged.")
  flags.DEFINE_enum("format", "int8", tuple(BITS), "quantize: of the kernels of all layers.")
  integer("group", 0, "quantize: inputs that share a scale; 0 is all of an output.")
  flags.DEFINE_bool("symmetric", True, "quantize: without zero points.")
  formats = ("float32", *BITS)
  flags.DEFINE_enum("embedding", "float32", formats, "quantize: of the table of tokens.")
  flags.DEFINE_enum("head", "float32", formats, "quantize: of a head that is not the embedding.")
  string("sparsity", None, "prune: share of zeros, or N:M, of every M inputs in order N stay.")
  for name in SIZES:
    integer(name, None, "shrink: what is left of them.")
  flags.DEFINE_list("weights", None, "average, mean: of each model.")
  string("base", None, "average, task, ties and dare: what the models were made from.")
  number("scale", None, "average, task, ties and dare: factor of the change.")
  number("fraction", None, "average, slerp: how far from the first to the second.")
  number("density", None, "average, ties: share of each change that is kept.")
  number("drop", None, "average, dare: share of each change that is dropped.")
  string("original", None, "report: the model to compare with.")
  string("data", None, "Text files or records, to calibrate or to measure on.")
  integer("rows", 128, "Rows of text.")
  integer("length", 512, "Tokens of a row.")
  integer("seed", 0, "Decides which places of the text the rows are.")
  number("price", None, "report: of an hour of this machine.")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__, words=True)
