"""Talks with a chat model in the terminal.

    python -m gptjax.chat --checkpoint=runs/chat --system="You answer in one sentence."

Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists the commands.
"""

from absl import flags

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.inference.chat import Conversation, converse
from gptjax.inference.flags import define_sampling_flags, sampling_from_flags
from gptjax.training.pretrained import load_model


def _define_flags() -> None:
  define_sampling_flags()
  flags.DEFINE_integer("max_tokens", 512, "The most tokens of an answer.", lower_bound=1)
  flags.DEFINE_integer(
    "context", 0, "Tokens of a conversation; 0 is the model's max_positions.", lower_bound=0
  )


def main(overrides) -> None:
  if overrides:
    raise UserError("gptjax.chat takes no --config.KEY flags; a run's config comes with it.")
  args = flags.FLAGS
  sampling = sampling_from_flags()
  model, tokenizer = load_model(args.checkpoint, ema=args.ema)
  conversation = Conversation(
    model,
    tokenizer,
    system=args.system,
    sampling=sampling,
    max_tokens=args.max_tokens,
    context=args.context,
    seed=args.seed,
    weights=args.weights,
    cache=args.cache,
    draft=args.draft,
  )
  print("Ctrl-C stops an answer, Ctrl-D ends, /help lists the commands.")
  converse(conversation)


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
