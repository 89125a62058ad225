"""BERT, RoBERTa, XLM-R, CamemBERT and DistilBERT: encoders, with the head of masked language
modelling and the pooler if the file has them. Chinese BERT and RoBERTa-wwm-ext have BERT's
architecture."""

from collections.abc import Mapping
from typing import Any

from gptjax.interop.families.gpt import ACTIVATIONS
from gptjax.interop.family import Family, always_these
from gptjax.interop.fields import (
  Fields,
  Rule,
  always,
  choice,
  copied,
  fixed,
  ignored,
  same,
  several,
)
from gptjax.interop.labels import LabelHead
from gptjax.interop.tensors import Entry, linear, linears, norm, table
from gptjax.model.config import ModelConfig

_POST_NORM = {"visibility": "bidirectional", "norm.placement": "post", "embed.norm": True}
_RULES = (
  *copied({"vocab_size": "vocab_size", "embed_dim": "hidden_size", "mlp_dim": "intermediate_size"}),
  *copied({"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}),
  same("max_position_embeddings", "position.max_positions", 512),
  same("type_vocab_size", "embed.token_types", 2),
  same("layer_norm_eps", "norm.eps", 1e-12),
  same("initializer_range", "init.std", 0.02),
  several("hidden_dropout_prob", "dropout.embed", "dropout.residual", default=0.1),
  same("attention_probs_dropout_prob", "dropout.attention", 0.1),
  fixed("position_embedding_type", "absolute"),
  fixed("tie_word_embeddings", True),
  # In the original Chinese models, whose pooler is the usual one.
  ignored(
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
  ),
  always(_POST_NORM),
)


_NEXT_SENTENCE = "cls.seq_relationship"


def _heads(transform: str, prefix: str) -> Rule:
  """The heads of a model, which follow from its tensors."""

  def read(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    has_head = f"{transform}.weight" in fields.tensors
    names = {f"{prefix}pooler.dense.weight", "pooler.dense.weight"}
    return {
      "head.transform": has_head,
      "head.bias": has_head,
      "head.next_sentence": f"{_NEXT_SENTENCE}.weight" in fields.tensors,
      "head.pooler": not names.isdisjoint(fields.tensors),
    }

  return Rule(read, lambda config: {})


def _encoder(prefix: str) -> list[Entry]:
  layer = f"{prefix}encoder.layer.{{i}}"
  return [
    *table(f"{prefix}embeddings.word_embeddings", "embed"),
    *table(f"{prefix}embeddings.position_embeddings", "position"),
    *table(f"{prefix}embeddings.token_type_embeddings", "token_type"),
    *norm(f"{prefix}embeddings.LayerNorm", "embed_norm"),
    *linears(f"{layer}.attention.self", "blocks/attention", query="query", key="key"),
    *linear(f"{layer}.attention.self.value", "blocks/attention/value"),
    *linear(f"{layer}.attention.output.dense", "blocks/attention/out"),
    *norm(f"{layer}.attention.output.LayerNorm", "blocks/attention_norm"),
    *linears(layer, "blocks/mlp", up="intermediate.dense", down="output.dense"),
    *norm(f"{layer}.output.LayerNorm", "blocks/mlp_norm"),
    *linear(f"{prefix}pooler.dense", "pooler"),
  ]


def _read_offset(fields: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
  # Positions are counted from the id after padding's.
  return {"position.offset": fields.take("pad_token_id", 1, int) + 1}


def _architecture(name: str):
  def of(config: ModelConfig) -> str:
    heads = {
      (False, False): "Model",
      (True, False): "ForMaskedLM",
      (False, True): "ForNextSentencePrediction",
      (True, True): "ForPreTraining",
    }
    return name + heads[config.head.transform, config.head.next_sentence]

  return of


# Names in LayerNorms, in files from before 2019 and files made from them.
_OLDER_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

BERT = Family(
  "bert",
  _architecture("Bert"),
  (
    *_RULES,
    choice("hidden_act", ACTIVATIONS, "gelu"),
    _heads("cls.predictions.transform.dense", "bert."),
  ),
  always_these(
    *_encoder("bert."),
    *linear("cls.predictions.transform.dense", "head_transform/linear"),
    *norm("cls.predictions.transform.LayerNorm", "head_transform/norm"),
    Entry("cls.predictions.bias", ("head_bias",)),
    *linear(_NEXT_SENTENCE, "next_sentence"),
  ),
  prefix="bert.",
  older_names=_OLDER_NAMES,
  ignored=(r"(bert\.)?embeddings\.position_ids",),
  copies={
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
  },
  label_heads={
    "BertForSequenceClassification": LabelHead("classifier", pooler="bert.pooler.dense"),
    "BertForNextSentencePrediction": LabelHead(_NEXT_SENTENCE, pooler="bert.pooler.dense"),
    "BertForTokenClassification": LabelHead("classifier"),
    "BertForQuestionAnswering": LabelHead("qa_outputs"),
  },
)


def _roberta(model_type: str, stem: str) -> Family:
  """RoBERTa, or a family that differs from it in its name and its vocabulary."""
  return Family(
    model_type,
    _architecture(stem),
    (
      *_RULES,
      # Its head always has this activation; our head has the activation of the layers.
      choice("hidden_act", {"gelu": {"mlp.activation": "gelu"}}, "gelu"),
      Rule(_read_offset, lambda config: {"pad_token_id": config.position.offset - 1}),
      _heads("lm_head.dense", "roberta."),
    ),
    always_these(
      *_encoder("roberta."),
      *linear("lm_head.dense", "head_transform/linear"),
      *norm("lm_head.layer_norm", "head_transform/norm"),
      Entry("lm_head.bias", ("head_bias",)),
    ),
    prefix="roberta.",
    ignored=(r"(roberta\.)?embeddings\.position_ids",),
    copies={
      "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
      "lm_head.decoder.bias": "lm_head.bias",
    },
    label_heads={
      f"{stem}ForSequenceClassification": LabelHead(
        "classifier.out_proj", pooler="classifier.dense"
      ),
      f"{stem}ForTokenClassification": LabelHead("classifier"),
      f"{stem}ForQuestionAnswering": LabelHead("qa_outputs"),
    },
  )


ROBERTA = _roberta("roberta", "Roberta")
XLM_ROBERTA = _roberta("xlm-roberta", "XLMRoberta")
CAMEMBERT = _roberta("camembert", "Camembert")

_DISTIL_LAYER = "distilbert.transformer.layer.{i}"
DISTILBERT = Family(
  "distilbert",
  _architecture("DistilBert"),
  (
    *copied({"vocab_size": "vocab_size", "embed_dim": "dim", "mlp_dim": "hidden_dim"}),
    *copied({"num_layers": "n_layers", "num_heads": "n_heads"}),
    same("max_position_embeddings", "position.max_positions", 512),
    same("initializer_range", "init.std", 0.02),
    several("dropout", "dropout.embed", "dropout.residual", default=0.1),
    same("attention_dropout", "dropout.attention", 0.1),
    choice("activation", ACTIVATIONS, "gelu"),
    fixed("tie_word_embeddings", True),
    # The table of positions is in the file, even if it was computed.
    ignored("sinusoidal_pos_embds", "tie_weights_", "qa_dropout", "seq_classif_dropout"),
    always({**_POST_NORM, "norm.eps": 1e-12}),
    _heads("vocab_transform", "distilbert."),
  ),
  always_these(
    *table("distilbert.embeddings.word_embeddings", "embed"),
    *table("distilbert.embeddings.position_embeddings", "position"),
    *norm("distilbert.embeddings.LayerNorm", "embed_norm"),
    *linears(f"{_DISTIL_LAYER}.attention", "blocks/attention", query="q_lin", key="k_lin"),
    *linears(f"{_DISTIL_LAYER}.attention", "blocks/attention", value="v_lin", out="out_lin"),
    *norm(f"{_DISTIL_LAYER}.sa_layer_norm", "blocks/attention_norm"),
    *linears(f"{_DISTIL_LAYER}.ffn", "blocks/mlp", up="lin1", down="lin2"),
    *norm(f"{_DISTIL_LAYER}.output_layer_norm", "blocks/mlp_norm"),
    *linear("vocab_transform", "head_transform/linear"),
    *norm("vocab_layer_norm", "head_transform/norm"),
    Entry("vocab_projector.bias", ("head_bias",)),
  ),
  prefix="distilbert.",
  copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
  label_heads={
    "DistilBertForSequenceClassification": LabelHead(
      "classifier", pooler="pre_classifier", pooler_activation="relu"
    ),
    "DistilBertForTokenClassification": LabelHead("classifier"),
    "DistilBertForQuestionAnswering": LabelHead("qa_outputs"),
  },
)
