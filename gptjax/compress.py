"""Makes a trained model smaller and cheaper, and tells what that costs.

    python -m gptjax.compress quantize --checkpoint=runs/first --to=runs/first-int4 \\
      --format=int4 --group=32 --embedding=int8 --method=gptq --data=corpus/
    python -m gptjax.compress prune --checkpoint=runs/first --to=runs/first-sparse \\
      --sparsity=2:4 --method=wanda --data=corpus/
    python -m gptjax.compress shrink --checkpoint=runs/first --to=runs/first-small --layers=3 \\
      --data=corpus/
    python -m gptjax.compress average --checkpoint=runs/a,runs/b --to=runs/soup --method=mean
    python -m gptjax.compress ensemble --checkpoint=runs/a,runs/b --to=runs/together
    python -m gptjax.compress report --checkpoint=runs/first-int4 --original=runs/first \\
      --data=heldout/

quantize: stores the kernels of all layers in few bits. prune: zeroes weights, the shapes stay.
shrink: leaves out layers, channels, heads or width. average: one model of several. ensemble:
several that answer together, by the mean of their logits. report: how far predictions on text are
from the original's, bytes, and tokens a second. What is written is a checkpoint as any other, for
gptjax.generate, serve, evaluate, and but for an ensemble convert and init_from.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from gptjax import config as config_lib
from gptjax.compression import average, ensemble, prune, quantize, report, structured
from gptjax.compression.flags import OF_AVERAGES, SIZES, TEXT, WORDS, check_flags, define_flags
from gptjax.compression.models import calibration_rows
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError, did_you_mean
from gptjax.quantization.formats import Format
from gptjax.quantization.stored import Stored
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS


def need(name: str, what: str) -> str:
  """The value of a flag that has to be given."""
  if not (value := FLAGS[name].value):
    raise UserError(f"--{name} is missing: {what}.")
  return value


def text() -> dict[str, object]:
  """The text that is measured on, as the functions take it."""
  return {name: FLAGS[name].value for name in TEXT}


def write(word: str) -> str:
  """Does what writes a checkpoint; returns what is to be said of it."""
  checkpoint, target = need("checkpoint", "the model"), need("to", "the folder to write")
  to, options = Path(target).expanduser(), {"ema": FLAGS.ema}
  match word:
    case "quantize":
      formats = [FLAGS.embedding, FLAGS.head]
      embedding, head = (None if name == "float32" else Format(name) for name in formats)
      weights = Format(FLAGS.format, FLAGS.group, FLAGS.symmetric)
      stored = Stored(weights, embedding, head, activations=FLAGS.activations)
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
    case "ensemble":
      whole = ensemble.put_together(checkpoint.split(","), to, **options)
      return f"{len(whole.members)} models that answer together"
    case _:
      named = {name: FLAGS[name].value for name in OF_AVERAGES}
      named |= text() if FLAGS.data else {"seed": FLAGS.seed if FLAGS["seed"].present else None}
      options |= {name: value for name, value in named.items() if value is not None}
      method = FLAGS.method or "mean"
      averaged = average.average(checkpoint.split(","), to, method=method, **options)
      return f"{averaged.parameters:,} parameters, of {len(averaged.ingredients)} models"


def print_report() -> None:
  names = [need("checkpoint", "the small model"), need("original", "what it was made from")]
  need("data", "text that neither was trained or calibrated on")
  (model, tokenizer), (original, other) = (load_model(name) for name in names)
  if not tokenizer.means_the_same(other):
    raise UserError(f"--checkpoint={names[0]} and --original={names[1]} have other tokens.")
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
    case [word] if word in WORDS:
      check_flags(word)
      print_report() if word == "report" else print(f"{FLAGS.to}: {write(word)}")
    case [word, *_] if word not in WORDS:
      raise UserError(f"no way to compress {word!r}. {did_you_mean(word, WORDS)}")
    case _:
      raise UserError(f"give one word of {', '.join(WORDS)}, and flags after it.")


if __name__ == "__main__":
  define_flags()
  config_lib.run_app(main, __doc__, words=True)
