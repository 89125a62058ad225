"""Models from one format to another, exactly.

    python -m gptjax.convert --from=MODEL --to=DIR [--format=gptjax|hf] [--verify]

MODEL is a folder of Hugging Face's files, an id of its Hub, a .gguf file, or the work directory of
a run. `--format=gptjax` writes what --checkpoint and init_from take; `hf` writes config.json,
safetensors and the tokenizer, which `transformers` loads. `--verify` runs both and compares.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tokenizers
from absl import flags
from etils import epath
from flax import nnx
from safetensors import SafetensorError
from tokenizers import decoders, models, pre_tokenizers

from gptjax import config as config_lib
from gptjax.checkpoint import Checkpoints
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.interop import huggingface
from gptjax.interop.safetensors_files import DTYPES
from gptjax.interop.verify import verify
from gptjax.model.gpt import GPT, describe, describe_parameters
from gptjax.pretrained import CHECKPOINTS, TOKENIZER, load_model, open_foreign, read_model_config

FORMATS = ("gptjax", "hf")
# Of the largest logit: float32 sums of a few thousand terms in another order.
_TOLERANCE = 1e-3


def convert(
  source: str, target: Path, *, to: str, family: str | None = None, dtype: str = "float32"
) -> None:
  """Writes the model and the tokenizer of a checkpoint into a new folder.

  Args:
    source: as `pretrained.load_model` takes it.
    target: does not exist, or is empty. It appears whole or not at all.
    to: 'gptjax' or 'hf'.
    family: of 'hf', its `model_type`; None is the source's, or the first that fits.
    dtype: of 'hf', that of the weights.

  Raises:
    UserError: the source cannot be read, the target is there or cannot be written, the family
      cannot be the model, or the dtype cannot hold a weight.
  """
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"--to={target} is there already and not empty; nothing is overwritten.")
  if to == "hf":
    foreign = open_foreign(source)
    if family is None and isinstance(foreign, huggingface.HuggingFaceModel):
      family = foreign.family.model_type
    chosen = huggingface.find_family(read_model_config(source), family)
  model, tokenizer = load_model(source)
  if set(describe(model)) != set(describe_parameters(model.config)):
    raise UserError(f"{source}: its adapters cannot be merged, so that no format here can hold it.")
  partial = target.with_name(f"{target.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
    if to == "hf":
      params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
      huggingface.save(partial, model.config, params, chosen, dtype)
      _save_tokenizer(partial, tokenizer)
    else:
      _save_run(partial, model, tokenizer)
    if target.exists():
      target.rmdir()
    partial.rename(target)
  except (OSError, SafetensorError) as error:
    raise UserError(f"--to={target}: cannot be written ({error}).") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _save_run(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
  """Writes what `pretrained.load_model` reads: a work directory whose run is at step 0."""
  values: dict[str, Any] = {"model": vars(model.config), "tokenizer": tokenizer.spec}
  (folder / config_lib.CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
  tokenizer.save(folder / TOKENIZER)
  with Checkpoints(folder / CHECKPOINTS, keep=1) as checkpoints:
    checkpoints.save(0, {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))})
    checkpoints.wait()


def _save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
  """Writes the tokenizer's files, and what `transformers` needs beside them where they lack it.

  Raises:
    UserError: its files are in no format of Hugging Face's.
  """
  tokenizer.save(folder)
  if tokenizer.spec.split("+")[0] == "bytes":
    (folder / "tokenizer.json").write_text(_bytes_as_bpe(tokenizer).to_str())
  if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
    end = tokenizer.end_of_text
    text = next((text for text, token in tokenizer.specials.items() if token == end), None)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": text}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ends = {"eos_token_id": sorted(tokenizer.stops)}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
  try:
    tokenizer_lib.load(str(folder))
  except UserError as error:
    raise UserError(
      f"tokenizer {tokenizer.spec!r} is in no format of Hugging Face's; use --format=gptjax."
    ) from error


def _bytes_as_bpe(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  """The tokenizer 'bytes' as a byte-level BPE without merges: the same ids."""
  # Bytes that print are themselves, the others are from U+0100 on (Radford et al. 2019).
  printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printing]
  vocab = {chr(byte): byte for byte in printing}
  vocab |= {chr(0x100 + number): byte for number, byte in enumerate(others)}
  bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  bpe.decoder = decoders.ByteLevel()
  bpe.add_special_tokens(sorted(tokenizer.specials, key=tokenizer.specials.get))
  return bpe


def name_checkpoint(source: str) -> str:
  """Puts 'hf:' or 'gguf:' before what is one; a run's work directory stays as it is."""
  if source.startswith(("hf:", "gguf:")):
    return source
  if (epath.Path(source).expanduser() / CHECKPOINTS).is_dir():
    return str(epath.Path(source).expanduser())
  return f"gguf:{source}" if source.endswith(".gguf") else f"hf:{source}"


FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string("from", None, "Folder, Hub id, .gguf file or work directory.", required=True)
  flags.DEFINE_string("to", None, "Folder to write, which must not exist.", required=True)
  flags.DEFINE_enum("format", "gptjax", FORMATS, "What to write.")
  flags.DEFINE_string("family", None, "Of --format=hf: the architecture, such as 'llama'.")
  flags.DEFINE_enum("dtype", "float32", tuple(DTYPES), "Of --format=hf: that of the weights.")
  flags.DEFINE_bool("verify", False, "Hold the result against transformers.")


def main(overrides: Mapping[str, str]) -> int:
  if overrides:
    raise UserError("gptjax.convert takes no --config.KEY flags.")
  if FLAGS.format != "hf" and (FLAGS.dtype != "float32" or FLAGS.family):
    raise UserError("--dtype and --family are of --format=hf; a run's parameters are float32.")
  source, target = name_checkpoint(FLAGS["from"].value), Path(FLAGS.to).expanduser()
  is_foreign = source.startswith(("hf:", "gguf:"))
  if FLAGS.verify and FLAGS.format != "hf" and not is_foreign:
    raise UserError("--verify: neither side is one that transformers could load.")
  convert(source, target, to=FLAGS.format, family=FLAGS.family, dtype=FLAGS.dtype)
  written = f"hf:{target}" if FLAGS.format == "hf" else str(target)
  model, tokenizer = load_model(written)
  count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  print(f"{target}: {count:,} parameters, {tokenizer.vocab_size:,} tokens")
  if not FLAGS.verify:
    return 0
  # Weights that were rounded are those of the source no longer.
  return check(model, tokenizer, source if is_foreign and FLAGS.dtype == "float32" else written)


def check(model: GPT, tokenizer: Tokenizer, reference: str) -> int:
  """Prints how near a model is to what `transformers` loads of hf:PATH or gguf:FILE; 1 if they are
  not the same model, else 0."""
  same = True
  for name, found in verify(model, open_foreign(reference), tokenizer.encode).items():
    print(f"{name}: {found}")
    same &= found.largest_difference <= _TOLERANCE * found.scale
  print("the same model" if same else "NOT the same model")
  return 0 if same else 1


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
