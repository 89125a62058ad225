"""What is written, in llama.cpp itself: the same tokens, and the same loss to half a percent."""

import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizers
from gptjax.gguf.writer import TYPES, Writer
from gptjax.model.gpt import model_graph
from tests.data.conftest import DOCUMENTS
from tests.data.test_tokenizer_formats import TEXTS
from tests.gguf.test_writer import LLAMA3, YARN
from tests.interop.conftest import LLAMA

pytestmark = pytest.mark.slow

SHAPE = {"vocab_size": 512, "embed_dim": 128, "mlp_dim": 256, "position.max_positions": 64}
QWEN3 = LLAMA | {"attention.qk_norm": True, "head_dim": 64}
MODELS = {
  "gpt2": {},
  "gpt2 with grouped keys": {"num_kv_heads": 2, "head.tied": False},
  "llama": LLAMA | {"head_dim": 64},
  "llama 3.1": LLAMA | LLAMA3 | {"rope.base": 500_000.0},
  "qwen2": LLAMA | {"attention.qkv_bias": True},
  "qwen3, yarn": QWEN3 | YARN | {"rope.original_positions": 16},
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_text_is_the_same(tiny_config, random_params, tmp_path, name, dtype):
  pytest.importorskip("llama_cpp")
  from experiments.compression import gguf_perplexity, llama_nats

  tokenizer = tokenizers.train("bpe:500", DOCUMENTS)
  config = tiny_config(**SHAPE | MODELS[name] | {"vocab_size": 512})
  model = nnx.merge(model_graph(config), random_params(config))
  path = tmp_path / "model.gguf"
  Writer(path, config, dtype).write(model, tokenizer)
  rows = np.reshape(tokenizer.encode(DOCUMENTS[0])[: 8 * 64], (8, 64)).tolist()
  ours = gguf_perplexity.answer(str(path), TEXTS, rows)
  theirs = llama_nats.answer(str(path), TEXTS, rows)
  assert theirs["tokens"] == ours["tokens"]
  # Perplexities to 0.5 %.
  assert abs(np.mean(theirs["nats"]) - np.mean(ours["nats"])) < 0.005
