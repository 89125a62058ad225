"""Command-line flags of `gptjax.compress`, and which of its words each belongs to."""

from absl import flags

from gptjax.compression import average, prune, quantize
from gptjax.errors import UserError
from gptjax.quantization.formats import ACTIVATIONS, BITS

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # They are those of the command, whose --help shows its own alone.
TEXT = ("data", "rows", "length", "seed")
SIZES = ("layers", "mlp_dim", "kv_heads", "heads", "embed_dim")
OF_AVERAGES = ("weights", "base", "scale", "fraction", "density", "drop")
# The flags of each word, beside --checkpoint, --data and those of its rows.
WORDS = {
  "quantize": (
    *("to", "ema", "method", "format", "group", "symmetric", "embedding", "head", "activations"),
  ),
  "prune": ("to", "ema", "method", "sparsity"),
  "shrink": ("to", "ema", *SIZES),
  "average": ("to", "ema", "method", *OF_AVERAGES),
  "ensemble": ("to", "ema"),
  "report": ("original", "price"),
}


def check_flags(word: str) -> None:
  """Raises UserError for a flag that the word does nothing with."""
  known = {name for names in WORDS.values() for name in names}
  for name in sorted(known - set(WORDS[word])):
    if FLAGS[name].present:
      raise UserError(f"--{name} is not a flag of {word}; leave it out.")
  for name in TEXT[1:]:
    if FLAGS[name].present and not FLAGS.data and (word, name) != ("average", "seed"):
      raise UserError(f"--{name} is of the text in --data, which is missing.")


def define_flags() -> None:
  string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
  string(
    "checkpoint", None, "A run, a folder of Hugging Face's or FILE.gguf; or several by commas."
  )
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
  told = "quantize: what inputs of the kernels are rounded to."
  flags.DEFINE_enum("activations", "none", ACTIVATIONS, told)
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
