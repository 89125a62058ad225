"""Models of `transformers` with random weights, and small folders and files to import."""

import copy
import os

import numpy as np
import pytest

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import huggingface
from gptjax.interop.labels import config_fields, transformers_task

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB_SIZE = 280
LLAMA = {
  "vocab_size": VOCAB_SIZE,
  "norm.kind": "rmsnorm",
  "bias": False,
  "mlp.activation": "swiglu",
  "position.kind": "rope",
  "num_kv_heads": 2,
  "head.tied": False,
}


def save_folder(folder, config, params, family=None, dtype="float32", labels=None):
  """Writes a model's folder, with a tokenizer of `VOCAB_SIZE` tokens or fewer."""
  folder.mkdir(exist_ok=True)
  task, fields = (transformers_task(labels), config_fields(labels)) if labels else ("", {})
  chosen = huggingface.find_family(config, family, task)
  huggingface.save(folder, config, params, chosen, dtype, fields)
  text = "the quick brown fox jumps over the lazy dog, again and again. " * 9
  tokenizer_lib.train(f"bpe:{VOCAB_SIZE}", [text]).save(folder)
  return folder


@pytest.fixture(scope="session")
def reference():
  """(torch, transformers), which take seconds to import."""
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  transformers.logging.set_verbosity_error()
  torch.set_num_threads(1)
  return torch, transformers


@pytest.fixture(scope="session")
def make_reference(reference):
  """Returns a function that makes a model of `transformers` whose every parameter matters: biases
  are not 0, norm scales not 1 and projections not small."""
  torch, transformers = reference

  def make(architecture, config, **fields):
    torch.manual_seed(0)
    config = getattr(transformers, config)(**copy.deepcopy(fields))  # It changes what it is given.
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
          parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        elif "norm" in name.lower() or "ln_" in name:
          parameter.copy_(parameter + 0.2 * noise)
        else:
          parameter.copy_(0.5 * noise)
    model.tie_weights()
    return model.eval()

  return make


@pytest.fixture(scope="session")
def two_documents():
  """Tokens of two documents, as two rows of which the second is padded, and packed into one."""
  rng = np.random.default_rng(0)
  first, second = rng.integers(3, 32, 6), rng.integers(3, 32, 4)
  padded = np.zeros((2, 6), np.int32)
  padded[0], padded[1, :4] = first, second
  mask = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
  packed = np.concatenate([first, second])[None].astype(np.int32)
  return {
    "padded": padded,
    "mask": mask,
    "packed": packed,
    "segments": np.array([[1] * 6 + [2] * 4], np.int32),
    "positions": np.concatenate([np.arange(6), np.arange(4)])[None].astype(np.int32),
  }
