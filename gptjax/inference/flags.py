"""Command-line flags of a checkpoint and of sampling, shared by the commands that write text."""

from absl import flags

from gptjax.inference.form import WEIGHTS
from gptjax.inference.pages import CACHES
from gptjax.inference.sampling import Sampling

FLAGS = flags.FLAGS
# How a token is drawn.
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
flags.disclaim_key_flags()  # They are those of the command, whose --help shows its own alone.


def define_model_flags() -> None:
  """Defines the flags of a checkpoint and of how it is run."""
  flags.DEFINE_string(
    "checkpoint",
    None,
    "A run, a folder of Hugging Face's, hf:ORG/NAME or FILE.gguf.",
    required=True,
  )
  flags.DEFINE_bool("ema", False, "Use the exponential moving average of the weights.")
  flags.DEFINE_enum(
    "weights", None, WEIGHTS, "In what the weights are kept; by default the model's dtype."
  )
  flags.DEFINE_enum(
    "cache", None, CACHES, "In what keys and values are kept; by default the model's dtype."
  )
  flags.DEFINE_string(
    "draft",
    None,
    "What guesses the next tokens, to write faster the same: 'lookup', 'layers:N' or a checkpoint.",
  )


def define_sampling_flags() -> None:
  """Defines the flags that `sampling_from_flags` reads, and the model's flags."""
  define_model_flags()
  flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
  flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 is off.")
  flags.DEFINE_float("top_p", 0.95, "Keep the likeliest tokens that reach p together; 1 is off.")
  flags.DEFINE_float("min_p", 0.0, "Keep tokens this likely relative to the best; 0 is off.")
  flags.DEFINE_float("repetition_penalty", 1.0, "Above 1, tokens of the text become less likely.")
  flags.DEFINE_integer("seed", 0, "Of the random choices.")
  flags.DEFINE_string("system", None, "What the conversation starts with, as the system's message.")


def sampling_from_flags() -> Sampling:
  return Sampling(
    temperature=FLAGS.temperature,
    top_k=FLAGS.top_k,
    top_p=FLAGS.top_p,
    min_p=FLAGS.min_p,
    repetition_penalty=FLAGS.repetition_penalty,
  )
