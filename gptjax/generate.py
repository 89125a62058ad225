"""Writes text with a trained model.

    python -m gptjax.generate --checkpoint=runs/demo --prompt="def main(" --max_tokens=100
    python -m gptjax.generate --checkpoint=runs/chat --chat --prompt="Who wrote Moby-Dick?"
    python -m gptjax.generate --checkpoint=runs/demo --prompt="def main(" --beams=4

`generate` is the function behind it, for notebooks and for the samples of a training run.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

from absl import flags

from gptjax import config as config_lib
from gptjax.errors import UserError, check_number
from gptjax.inference.beam import beam_search
from gptjax.inference.flags import SAMPLING_FLAGS, define_sampling_flags, sampling_from_flags
from gptjax.inference.generate import Completion, chat_prompts, generate
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS


def _define_flags() -> None:
  define_sampling_flags()
  flags.DEFINE_multi_string("prompt", [], "Text to continue; repeat the flag for a batch.")
  flags.DEFINE_bool("chat", False, "Put each prompt to the model as a user's message.")
  flags.DEFINE_integer("max_tokens", 128, "The most tokens to add to a prompt.")
  flags.DEFINE_multi_string("stop", [], "A string that ends a completion; may be repeated.")
  flags.DEFINE_integer("beams", None, "Search for the likeliest completion with so many beams.")
  flags.DEFINE_float("length_penalty", 1.0, "With --beams: above 0 favours long completions.")
  flags.DEFINE_bool("json", False, "Print one JSON object a prompt instead of streaming text.")


def main(overrides) -> None:
  if overrides:
    raise UserError("gptjax.generate takes no --config.KEY flags; a run's config comes with it.")
  if FLAGS.chat and not FLAGS.prompt:
    raise UserError("--chat needs a --prompt; gptjax.chat asks for one after the other.")
  if FLAGS.system is not None and not FLAGS.chat:
    raise UserError("--system is for --chat.")
  if "" in FLAGS.stop:
    raise UserError("--stop is empty; give a text that ends a completion.")
  check_number("--max_tokens", FLAGS.max_tokens, at_least=1)
  _check_beams()
  sampling = sampling_from_flags()
  model, tokenizer = load_model(FLAGS.checkpoint, ema=FLAGS.ema)
  prompts = FLAGS.prompt or [""]
  asked = chat_prompts(tokenizer, prompts, FLAGS.system) if FLAGS.chat else prompts
  options = {"max_tokens": FLAGS.max_tokens, "stop": FLAGS.stop}
  options |= {"weights": FLAGS.weights, "cache": FLAGS.cache}
  if FLAGS.beams is not None:
    options |= {"beams": FLAGS.beams, "length_penalty": FLAGS.length_penalty}
    _print(prompts, [found[0] for found in beam_search(model, tokenizer, asked, **options)])
    return
  stream = not FLAGS.json and len(prompts) == 1
  if stream and not FLAGS.chat:
    sys.stdout.write(prompts[0])
  completions = generate(
    model,
    tokenizer,
    asked,
    sampling=sampling,
    seed=FLAGS.seed,
    draft=FLAGS.draft,
    on_text=(lambda _, text: print(text, end="", flush=True)) if stream else None,
    **options,
  )
  if stream:
    print()
  else:
    _print(prompts, completions)


def _check_beams() -> None:
  """Raises UserError for a flag that does nothing with --beams, or without."""
  if FLAGS.beams is None:
    if FLAGS["length_penalty"].present:
      raise UserError("--length_penalty is for --beams.")
    return
  check_number("--beams", FLAGS.beams, at_least=1)
  check_number("--length_penalty", FLAGS.length_penalty)
  for name in [*SAMPLING_FLAGS, "draft"]:
    if FLAGS[name].present:
      raise UserError(f"--{name} does nothing with --beams, which draws no token; leave it out.")


def _print(prompts: Sequence[str], completions: Sequence[Completion]) -> None:
  for prompt, completion in zip(prompts, completions, strict=True):
    if FLAGS.json:
      shown = dataclasses.asdict(completion) | {"prompt": prompt}
      print(json.dumps(shown, ensure_ascii=False))
    else:
      between = "\n\n" if FLAGS.chat else ""
      print(f"{prompt}{between}{completion.completion}\n{'-' * 40}")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
