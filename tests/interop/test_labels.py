"""Heads of labels against `transformers`, both ways, and those that it does not have."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.errors import UserError
from gptjax.interop import huggingface
from gptjax.interop.huggingface import HuggingFaceModel
from gptjax.interop.labels import config_fields, read_labels, transformers_task
from gptjax.model.gpt import model_graph
from gptjax.training.pretrained import Labels
from tests.interop.conftest import save_folder

V, K, LENGTH = 32, 3, 6
GPT = {"vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 8}
BERT = {
  "vocab_size": V,
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 8,
}
LLAMA = BERT | {"num_key_value_heads": 2}
ROBERTA = BERT | {"type_vocab_size": 1}
DISTIL = {
  "vocab_size": V,
  "dim": 16,
  "n_layers": 1,
  "n_heads": 4,
  "hidden_dim": 32,
  "max_position_embeddings": 8,
}
MODELS = {
  "GPT2ForSequenceClassification": ("GPT2Config", GPT),
  "GPT2ForTokenClassification": ("GPT2Config", GPT),
  "LlamaForSequenceClassification": ("LlamaConfig", LLAMA),
  "LlamaForTokenClassification": ("LlamaConfig", LLAMA),
  "LlamaForQuestionAnswering": ("LlamaConfig", LLAMA),
  "BertForSequenceClassification": ("BertConfig", BERT),
  "BertForTokenClassification": ("BertConfig", BERT),
  "BertForQuestionAnswering": ("BertConfig", BERT),
  "BertForNextSentencePrediction": ("BertConfig", BERT),
  "RobertaForSequenceClassification": ("RobertaConfig", ROBERTA),
  "DistilBertForSequenceClassification": ("DistilBertConfig", DISTIL),
}
SLOW = {
  "OpenAIGPTForSequenceClassification": ("OpenAIGPTConfig", GPT),
  "GPT2ForQuestionAnswering": ("GPT2Config", GPT),
  "GPTNeoForSequenceClassification": (
    "GPTNeoConfig",
    {
      "vocab_size": V,
      "hidden_size": 16,
      "num_layers": 1,
      "num_heads": 4,
      "attention_types": [[["global"], 1]],
      "max_position_embeddings": 8,
    },
  ),
  "GPTNeoXForTokenClassification": ("GPTNeoXConfig", BERT | {"rotary_pct": 0.5}),
  "GPTJForQuestionAnswering": ("GPTJConfig", GPT | {"rotary_dim": 4}),
  "MistralForQuestionAnswering": ("MistralConfig", LLAMA),
  "Qwen2ForQuestionAnswering": ("Qwen2Config", LLAMA),
  "Qwen3ForQuestionAnswering": ("Qwen3Config", LLAMA | {"head_dim": 4}),
  "Qwen3ForTokenClassification": ("Qwen3Config", LLAMA | {"head_dim": 4}),
  "Gemma2ForTokenClassification": ("Gemma2Config", LLAMA | {"head_dim": 4}),
  "Gemma3TextForSequenceClassification": ("Gemma3TextConfig", LLAMA | {"head_dim": 4}),
  "MixtralForQuestionAnswering": (
    "MixtralConfig",
    LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1},
  ),
  "GptOssForSequenceClassification": (
    "GptOssConfig",
    LLAMA | {"head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
  ),
  "GemmaForSequenceClassification": ("GemmaConfig", LLAMA | {"head_dim": 4}),
  "Phi3ForTokenClassification": ("Phi3Config", LLAMA | {"pad_token_id": 0}),
  "Qwen3MoeForQuestionAnswering": (
    "Qwen3MoeConfig",
    LLAMA | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
  ),
  "SmolLM3ForQuestionAnswering": ("SmolLM3Config", LLAMA | {"pad_token_id": 0}),
  "Olmo2ForSequenceClassification": ("Olmo2Config", LLAMA | {"pad_token_id": 0}),
  "DistilBertForTokenClassification": ("DistilBertConfig", DISTIL),
  "DistilBertForQuestionAnswering": ("DistilBertConfig", DISTIL),
  "XLMRobertaForSequenceClassification": ("XLMRobertaConfig", ROBERTA),
  "CamembertForTokenClassification": ("CamembertConfig", ROBERTA),
  "RobertaForTokenClassification": ("RobertaConfig", ROBERTA),
  "RobertaForQuestionAnswering": ("RobertaConfig", ROBERTA),
}
BIDIRECTIONAL = {
  "visibility": "bidirectional",
  "norm.placement": "post",
  "embed.norm": True,
  "embed.token_types": 2,
}
LLAMA_SHAPE = {
  "norm.kind": "rmsnorm",
  "bias": False,
  "mlp.activation": "swiglu",
  "position.kind": "rope",
  "head.tied": False,
}
CLASSES = Labels("classification", ("no", "perhaps", "yes"))
TAGS = Labels("tagging", ("O", "B", "I"))


def tokens():
  return np.random.default_rng(0).integers(3, V, (1, LENGTH)).astype(np.int32)


def our_logits(config, params):
  """The logits of each token, [T, K]."""
  graph = model_graph(config)

  @jax.jit
  def score(params, tokens):
    model = nnx.merge(graph, params)
    return model.label_logits(model.hidden(tokens)[0])

  return np.asarray(score(params, tokens())[0])


def their_logits(torch, model):
  """The logits of each token, [T, K], or of the text, [K]."""
  with torch.no_grad():
    out = model(input_ids=torch.tensor(tokens()).long())
  if "start_logits" in out:
    return np.stack([out.start_logits[0].numpy(), out.end_logits[0].numpy()], axis=-1)
  return out.logits[0].numpy()


def assert_same(ours, theirs, config):
  """`theirs` of a text is of the token that our examples have their label at."""
  if theirs.ndim == 1:
    ours = ours[0 if config.visibility == "bidirectional" else -1]
  assert theirs.std() > 0.05
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def open_there(transformers, folder):
  """Opens the class of `transformers` that config.json names, without a weight too many or too
  few."""
  (name,) = json.loads((folder / "config.json").read_text())["architectures"]
  task = name.rpartition("For")[2]
  auto = getattr(transformers, f"AutoModelFor{task}")
  model, told = auto.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
  assert not any(told.values()), told
  assert type(model).__name__ == name
  return model.eval()


@pytest.mark.parametrize(
  "name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_head_of_theirs_comes_in_and_goes_out(
  name, make_reference, reference, load_params, tmp_path
):
  torch, transformers = reference
  config_class, fields = (MODELS | SLOW)[name]
  names = ("O", "B-PER", "I-PER") if "Token" in name else ("LABEL_0", "LABEL_1")
  theirs = make_reference(name, config_class, id2label=dict(enumerate(names)), **fields)
  expected = their_logits(torch, theirs)
  theirs.save_pretrained(tmp_path / "theirs")
  opened = HuggingFaceModel(str(tmp_path / "theirs"))
  assert opened.config.label_head.num_labels == len(names)
  assert opened.labels.names == names
  params = load_params(opened)
  assert_same(our_logits(opened.config, params), expected, opened.config)

  folder = tmp_path / "ours"
  folder.mkdir()
  huggingface.save(
    folder, opened.config, params, opened.family, more_fields=config_fields(opened.labels)
  )
  again = open_there(transformers, folder)
  assert type(again) is type(theirs)
  assert tuple(again.config.id2label.values()) == names
  np.testing.assert_allclose(their_logits(torch, again), expected, atol=1e-6)
  reopened = HuggingFaceModel(str(folder))
  assert (reopened.config, reopened.labels) == (opened.config, opened.labels)
  jax.tree.map(np.testing.assert_array_equal, load_params(reopened), params)


@pytest.mark.parametrize(
  ("changes", "labels", "expected"),
  [
    ({}, CLASSES, "GPT2ForSequenceClassification"),
    ({}, Labels("multi_label", CLASSES.names), "GPT2ForSequenceClassification"),
    (
      BIDIRECTIONAL | {"head.pooler": True},
      TAGS,
      "BertForTokenClassification",
    ),
    (
      BIDIRECTIONAL | {"head.pooler": True, "label_head.pooling": "pooler"},
      CLASSES,
      "BertForSequenceClassification",
    ),
  ],
)
def test_what_was_fine_tuned_here_answers_the_same_there(
  changes, labels, expected, tiny_config, random_params, reference, load_params, tmp_path
):
  torch, transformers = reference
  config = tiny_config(num_layers=1, **changes, **{"label_head.num_labels": K})
  params = random_params(config)
  assert np.abs(params["label_head"]["bias"]).max() > 0.1
  ours = our_logits(config, params)
  folder = save_folder(tmp_path / "model", config, params, labels=labels)
  theirs = open_there(transformers, folder)
  assert type(theirs).__name__ == expected
  assert theirs.config.id2label == dict(enumerate(labels.names))
  assert theirs.config.label2id == {name: index for index, name in enumerate(labels.names)}
  kinds = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
  }
  assert theirs.config.problem_type == kinds.get(labels.task)
  assert_same(ours, their_logits(torch, theirs), config)
  opened = HuggingFaceModel(str(folder))
  assert opened.labels == labels
  np.testing.assert_allclose(our_logits(opened.config, load_params(opened)), ours, atol=1e-4)


@pytest.mark.parametrize(
  ("changes", "labels", "family", "message"),
  [
    (
      {"label_head.pooling": "mean"},
      CLASSES,
      "gpt2",
      "GPT2ForSequenceClassification lacks model.label_head.pooling='mean', not 'none'.",
    ),
    (
      LLAMA_SHAPE,
      CLASSES,
      None,
      "the nearest, LlamaForSequenceClassification, lacks model.label_head.bias=True, not False.",
    ),
    (
      BIDIRECTIONAL,
      CLASSES,
      "bert",
      "BertForSequenceClassification lacks model.head.pooler=False, not True; "
      "model.label_head.pooling='none', not 'pooler'.",
    ),
    (
      BIDIRECTIONAL | {"head.pooler": True, "label_head.pooling": "pooler"},
      TAGS,
      "bert",
      "BertForTokenClassification lacks model.label_head.pooling='pooler', not 'none'.",
    ),
    (
      {"position.kind": "rope", "residual.kind": "parallel_one_norm", "rope.dim": 4},
      TAGS,
      "gptj",
      "family 'gptj' has no class of `transformers` for TokenClassification; take --format=gptjax.",
    ),
    (
      LLAMA_SHAPE | {"label_head.num_labels": 2},
      Labels("span", ("LABEL_0", "LABEL_1")),
      "gemma2",
      "family 'gemma2' has no class of `transformers` for QuestionAnswering; take --format=gptjax.",
    ),
  ],
)
def test_a_head_that_they_do_not_have_is_refused(tiny_config, changes, labels, family, message):
  with pytest.raises(UserError) as error:
    huggingface.find_family(
      tiny_config(**{"label_head.num_labels": K} | changes), family, transformers_task(labels)
    )
  assert str(error.value).endswith(message)


def test_without_a_bias_llama_classifies_texts(tiny_config):
  config = tiny_config(**LLAMA_SHAPE, **{"label_head.num_labels": K, "label_head.bias": False})
  assert huggingface.find_family(config, None, transformers_task(CLASSES)).model_type == "llama"


def test_a_head_of_labels_is_not_lost_in_silence(tiny_config):
  with pytest.raises(
    UserError, match=r"model\.label_head\.num_labels=3: a head of labels is not written with"
  ):
    huggingface.find_family(tiny_config(**{"label_head.num_labels": K}))


def test_a_bias_that_no_shift_makes_is_refused(tiny_config, random_params, tmp_path):
  config = tiny_config(**{"label_head.num_labels": K})
  params = random_params(config)
  params["label_head"]["kernel"][:, 1] = params["label_head"]["kernel"][:, 0]
  with pytest.raises(
    UserError, match=r"are not independent; .*--config\.model\.label_head\.bias=false"
  ):
    save_folder(tmp_path / "model", config, params, labels=CLASSES)
  assert not list((tmp_path / "model").iterdir())
  params["label_head"]["bias"][:] = 0
  save_folder(tmp_path / "zero", config, params, labels=CLASSES)


@pytest.fixture(scope="module")
def tagger(tiny_config, random_params, tmp_path_factory):
  config = tiny_config(**BIDIRECTIONAL, **{"label_head.num_labels": K})
  folder = tmp_path_factory.mktemp("tagger") / "model"
  return save_folder(folder, config, random_params(config), labels=TAGS)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"id2label": {"0": "a", "2": "b"}}, "field 'id2label' is {'0': 'a', '2': 'b'}, not names by"),
    ({"id2label": ["a"]}, "field 'id2label' is ['a'], not names by 0, 1, ..."),
    (
      {"architectures": ["BertForSequenceClassification"], "problem_type": "ranking"},
      "field 'problem_type' is 'ranking'; only 'single_label_classification' or",
    ),
    ({"id2label": {"0": "a", "1": "b"}}, "'classifier.weight' is [3, 16], the config makes it [2"),
    ({"architectures": ["BertForMaskedLM"]}, "tensor 'classifier.bias' has no place in the model"),
    ({"architectures": ["BertForSequenceClassification"]}, "no tensor 'bert.pooler.dense.weight'"),
  ],
)
def test_a_folder_of_another_head_is_refused(tagger, tmp_path, fields, message):
  config = json.loads((tagger / "config.json").read_text()) | fields
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "model.safetensors").write_bytes((tagger / "model.safetensors").read_bytes())
  with pytest.raises(UserError) as error:
    HuggingFaceModel(str(tmp_path))
  assert message in str(error.value)


@pytest.mark.parametrize(
  ("fields", "task", "labels"),
  [
    ({}, "SequenceClassification", Labels("classification", ("LABEL_0", "LABEL_1"))),
    ({"num_labels": 1}, "SequenceClassification", Labels("regression", ("LABEL_0",))),
    ({"id2label": {"1": "b", "0": "a"}}, "TokenClassification", Labels("tagging", ("a", "b"))),
    ({"id2label": None}, "QuestionAnswering", Labels("span", ("LABEL_0", "LABEL_1"))),
  ],
)
def test_what_a_config_leaves_open_is_as_there(fields, task, labels):
  assert read_labels(fields, task, "config.json") == labels
