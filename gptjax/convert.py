"""Converts models from one format to another, exactly.

    python -m gptjax.convert --from=MODEL --to=DIR [--format=gptjax|hf|peft] [--verify]
    python -m gptjax.convert --from=MODEL --to=FILE.gguf --format=gguf [--dtype=q8_0] [--verify]
    python -m gptjax.convert --from=MODEL --to=DIR --adapter=FOLDER [--format=gptjax|hf]

MODEL is a folder of Hugging Face's files, an id of its Hub, a .gguf file, or the work directory of
a run. `--format=gptjax` writes what --checkpoint and init_from take; `hf` writes config.json,
safetensors and the tokenizer, which `transformers` loads; `gguf` writes one file, which llama.cpp
runs. `--verify` runs `transformers` beside the result and compares.

A label head, as trained by configs/finetune.py, is written for the classes
...ForSequenceClassification, ...ForTokenClassification or ...ForQuestionAnswering, with the names
of the labels, and read from them. Their decoders score a text without a bias: a trained bias goes
into the bias of the last norm if there is one (GPT-2), otherwise fine-tune with
--config.model.label_head.bias=false (Llama). BERT and RoBERTa score their pooler's output: use
--config.model.label_head.pooling=pooler. The scored token is the last that is not padding, here
always end_of_text, which `transformers` does not append to a text by itself.

Adapters go both ways too: `--format=peft` writes the adapters of a run as a folder of the `peft`
library, with its label head if it has one, and `--adapter` merges such a folder into its base,
MODEL, before that is written.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import safetensors.numpy
from absl import flags
from flax import nnx

from gptjax import config as config_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.interop.convert import FORMATS, convert
from gptjax.interop.safetensors_files import DTYPES
from gptjax.interop.verify import verify
from gptjax.model.gpt import GPT
from gptjax.training.pretrained import is_run, load_model, name_checkpoint, open_foreign

FLAGS = flags.FLAGS
# Relative to the largest logit: float32 sums of a few thousand terms in another order.
_TOLERANCE = 1e-3
# llama.cpp's types with a scale for 32 weights.
_BLOCKS = ("q8_0", "q4_0")


def _define_flags() -> None:
  flags.DEFINE_string("from", None, "Folder, Hub id, .gguf file or work directory.", required=True)
  flags.DEFINE_string("to", None, "Folder or file to write, which must not exist.", required=True)
  flags.DEFINE_enum("format", "gptjax", FORMATS, "What to write.")
  flags.DEFINE_string("family", None, "Of Hugging Face's files: the architecture, as 'llama'.")
  flags.DEFINE_string("adapter", None, "Folder of the peft library, to merge into the model.")
  about = "That of the weights of --format=hf or gguf; q8_0 and q4_0 are of gguf alone."
  flags.DEFINE_enum("dtype", "float32", (*DTYPES, *_BLOCKS), about)
  flags.DEFINE_bool("verify", False, "Hold the result against transformers.")


def name_source(source: str) -> str:
  """The checkpoint of that name, or where there is nothing of the name, the model of the Hub."""
  named = name_checkpoint(source)
  exists = not is_run(named) or Path(source).expanduser().exists()
  return named if exists else f"hf:{source}"


def check(model: GPT, tokenizer: Tokenizer, reference: str) -> int:
  """Prints how near a model is to the one that `transformers` loads from hf:PATH or gguf:FILE;
  returns 0 if they are the same model, else 1."""
  same = True
  for name, found in verify(model, open_foreign(reference), tokenizer.encode).items():
    print(f"{name}: {found}")
    same &= found.largest_difference <= _TOLERANCE * found.scale
  print("the same model" if same else "NOT the same model")
  return 0 if same else 1


def main(overrides: Mapping[str, str]) -> int:
  if overrides:
    raise UserError("gptjax.convert takes no --config.KEY flags.")
  if FLAGS.format not in ("hf", "gguf") and FLAGS.dtype != "float32":
    raise UserError("--dtype is of --format=hf and gguf; a run's parameters are float32.")
  if FLAGS.format == "hf" and FLAGS.dtype in _BLOCKS:
    raise UserError(f"--dtype={FLAGS.dtype} is of --format=gguf.")
  if FLAGS.format in ("gptjax", "gguf") and FLAGS.family and not FLAGS.adapter:
    raise UserError("--family is of --format=hf, --format=peft and --adapter.")
  if FLAGS.format == "peft" and FLAGS.adapter:
    raise UserError("--adapter is merged into a model, of which --format=peft writes none.")
  source, target = name_source(FLAGS["from"].value), Path(FLAGS.to).expanduser()
  is_foreign = source.startswith(("hf:", "gguf:"))
  unchanged = is_foreign and FLAGS.dtype == "float32" and not FLAGS.adapter
  if FLAGS.verify and FLAGS.format not in ("hf", "gguf") and not unchanged:
    raise UserError("--verify: neither side is one that transformers could load.")
  adapter = Path(FLAGS.adapter).expanduser() if FLAGS.adapter else None
  options = {"family": FLAGS.family, "dtype": FLAGS.dtype, "adapter": adapter}
  convert(source, target, to=FLAGS.format, **options)
  if FLAGS.format == "peft":
    (weights,) = target.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(weights)
    print(f"{target}: {sum(x.size for x in tensors.values()):,} parameters of adapters")
    return 0
  written = f"{FLAGS.format}:{target}" if FLAGS.format in ("hf", "gguf") else str(target)
  model, tokenizer = load_model(written)
  count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  print(f"{target}: {count:,} parameters, {tokenizer.vocab_size:,} tokens")
  if not FLAGS.verify:
    return 0
  # Rounded or merged weights differ from the source's.
  return check(model, tokenizer, source if unchanged else written)


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
