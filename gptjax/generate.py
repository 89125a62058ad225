"""Writes text with a trained model.

    python -m gptjax.generate --checkpoint=runs/demo --prompt="def main(" --max_tokens=100
    python -m gptjax.generate --checkpoint=runs/chat --chat --prompt="Who wrote Moby-Dick?"

`generate` is the function behind it, for notebooks and for the samples of a training run.
"""

import dataclasses
import json
import sys

from absl import flags

from gptjax import config as config_lib
from gptjax.errors import UserError, check_number
from gptjax.inference.flags import define_sampling_flags, sampling_from_flags
from gptjax.inference.generate import chat_prompts, generate
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS


def _define_flags() -> None:
  define_sampling_flags()
  flags.DEFINE_multi_string("prompt", [], "Text to continue; repeat the flag for a batch.")
  flags.DEFINE_bool("chat", False, "Put each prompt to the model as a user's message.")
  flags.DEFINE_integer("max_tokens", 128, "The most tokens to add to a prompt.")
  flags.DEFINE_multi_string("stop", [], "A string that ends a completion; may be repeated.")
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
  sampling = sampling_from_flags()
  model, tokenizer = load_model(FLAGS.checkpoint, ema=FLAGS.ema)
  prompts = FLAGS.prompt or [""]
  stream = not FLAGS.json and len(prompts) == 1
  if stream and not FLAGS.chat:
    sys.stdout.write(prompts[0])
  completions = generate(
    model,
    tokenizer,
    chat_prompts(tokenizer, prompts, FLAGS.system) if FLAGS.chat else prompts,
    max_tokens=FLAGS.max_tokens,
    sampling=sampling,
    stop=FLAGS.stop,
    seed=FLAGS.seed,
    weights=FLAGS.weights,
    draft=FLAGS.draft,
    on_text=(lambda _, text: print(text, end="", flush=True)) if stream else None,
  )
  if stream:
    print()
    return
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
