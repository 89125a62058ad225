"""Small models in folders, and what all of them share."""

import jax.numpy as jnp
from flax import nnx, traverse_util

from gptjax import tree
from gptjax.data import tokenizer as tokenizers
from gptjax.model.gpt import model_graph
from gptjax.training.pretrained import save_model

TEXT = "the quick brown fox jumps over the lazy dog, again and again. " * 40
# Of the tokenizer 'bytes'.
VOCAB_SIZE = 260
LLAMA = {
  "norm.kind": "rmsnorm",
  "bias": False,
  "mlp.activation": "swiglu",
  "position.kind": "rope",
  "num_kv_heads": 2,
  "head.tied": False,
}


def merge(config, params):
  """The model of parameters, nested or by name."""
  arrays = {name: jnp.asarray(x) for name, x in tree.named_leaves(params).items()}
  return nnx.merge(model_graph(config), traverse_util.unflatten_dict(arrays, sep="/"))


def save(folder, config, params, labels=None, tokenizer=None):
  """Writes a model as a run with a tokenizer, 'bytes' by default; returns the checkpoint's name."""
  folder.mkdir()
  save_model(folder, merge(config, params), tokenizer or tokenizers.load("bytes"), labels)
  return str(folder)
