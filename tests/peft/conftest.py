"""Models to adapt. The references are those of the tests of conversion."""

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.model.gpt import model_graph
from gptjax.peft.layers import Adapter
from gptjax.peft.surgery import adapt, put_on
from tests.interop.conftest import make_reference, reference  # noqa: F401

TOKENS = (
  np.random.default_rng(0).integers(2, 32, (2, 6)).astype(np.int32)
)  # 1 is RoBERTa's padding.

COMMON = {"vocab_size": 32, "bos_token_id": None, "eos_token_id": None}
LLAMA = COMMON | {
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 24,
}
# Windows that end within the virtual tokens, and before them.
WINDOWED = LLAMA | {"sliding_window": 4, "head_dim": 4}
KINDS = ["sliding_attention", "full_attention"]
GPT2 = COMMON | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}
BERT = {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
# name: (class, its config's class, fields)
MODELS = {
  "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
  "tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
  "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
  "mistral": ("MistralForCausalLM", "MistralConfig", WINDOWED),
  "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", WINDOWED),
  "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", WINDOWED | {"layer_types": KINDS}),
  "bert": ("BertForMaskedLM", "BertConfig", BERT),
  "bert-encoder": ("BertModel", "BertConfig", BERT),
  "bert-labels": (
    "BertForSequenceClassification",
    "BertConfig",
    BERT | {"num_labels": 3},
  ),
  "roberta-labels": (
    "RobertaForSequenceClassification",
    "RobertaConfig",
    BERT | {"num_labels": 3},
  ),
  "llama-labels": (
    "LlamaForTokenClassification",
    "LlamaConfig",
    LLAMA | {"num_labels": 3, "pad_token_id": 0},
  ),
  "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}


@pytest.fixture(scope="session")
def model_config(tiny_config):
  return tiny_config(
    num_kv_heads=2,
    **{
      "position.kind": "rope",
      "norm.kind": "rmsnorm",
      "mlp.activation": "swiglu",
      "execution.scan_layers": True,
    },
  )


@pytest.fixture(scope="session")
def make_model(model_config, random_params):
  """Returns a function that makes the model, its every parameter of a value that matters."""

  def make(config=None):
    config = config or model_config
    params = jax.tree.map(np.asarray, random_params(config))
    return nnx.merge(model_graph(config), params)

  return make


@pytest.fixture(scope="session")
def make_adapted(make_model):
  """Returns a function that puts adapters on the model and moves them from where they start."""

  def make(peft, config=None, by=0.2):
    model = adapt(make_model(config), peft, nnx.Rngs(1))
    rng = np.random.default_rng(2)
    moved = jax.tree.map(
      lambda x: x + by * rng.normal(size=x.shape).astype(np.float32), nnx.state(model, Adapter)
    )
    nnx.update(model, moved)
    return model

  return make


@pytest.fixture(scope="session")
def logits():
  """Returns a function: model, tokens and what else it is called with -> logits."""

  def run(model, tokens=TOKENS, **kwargs):
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(tokens, **kwargs))(state))

  return run


@pytest.fixture(scope="session")
def bases(make_reference, load_params, tmp_path_factory):  # noqa: F811
  """Returns a function that makes (a new copy of their model, ours as opened, its parameters)."""
  made = {}

  def make(name):
    if name not in made:
      architecture, config, fields = MODELS[name]
      theirs = make_reference(architecture, config, **fields)
      folder = tmp_path_factory.mktemp(name)
      theirs.save_pretrained(folder)
      opened = HuggingFaceModel(str(folder))
      made[name] = (theirs, opened, load_params(opened))
    theirs, opened, params = made[name]
    copy = type(theirs)(theirs.config)
    copy.load_state_dict(theirs.state_dict())
    return copy.eval(), opened, params

  return make


def their_logits(torch, model):
  """The logits that their model gives `TOKENS`, an encoder-decoder of the same tokens twice."""
  tokens = torch.tensor(TOKENS, dtype=torch.long)
  inputs = {"input_ids": tokens}
  if model.config.is_encoder_decoder:
    inputs["decoder_input_ids"] = tokens
  with torch.no_grad():
    output = model(**inputs)
  logits = (output.logits if "logits" in output else output.last_hidden_state).numpy()
  # Without those of a prompt.
  return logits[:, -TOKENS.shape[1] :] if logits.ndim == 3 else logits


def our_logits(opened, params, config, adapters):
  """The same of ours with adapters."""
  scanned = opened.config.replace({"execution.scan_layers": True})  # Half as much to compile.
  model = nnx.merge(model_graph(scanned), jax.tree.map(np.asarray, params))
  graph, state = nnx.split(put_on(model, config, adapters))

  def run(state):
    model = nnx.merge(graph, state)
    options = {} if model.encoder is None else {"encoded": model.encode(TOKENS)}
    hidden, _ = model.hidden(TOKENS, **options)
    if model.label_head is not None:
      scores = model.label_logits(hidden)
      return scores[:, 0] if scanned.label_head.pooling == "pooler" else scores
    is_encoder = scanned.visibility == "bidirectional" and not scanned.head.transform
    return hidden if is_encoder else model.logits(hidden)

  return np.asarray(jax.jit(run)(state))
