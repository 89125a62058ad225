"""A family of pretrained models: one mapping of its config and one of its tensors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptjax.errors import UserError
from gptjax.interop.fields import Fields, Rule
from gptjax.interop.labels import LabelHead, can_fold_bias
from gptjax.interop.tensors import Entry, applicable
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import describe_parameters

# Fields that change no logits, whatever they say, and are ignored in every config.
BOOKKEEPING = (
  # About the file and the programs that wrote it.
  *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version"),
  *("_name_or_path", "name_or_path", "_commit_hash", "transformers.js_config", "tokenizer_class"),
  *("unsloth_version", "unsloth_fixed"),
  # How a model is run.
  *("use_cache", "cache_implementation", "gradient_checkpointing", "chunk_size_feed_forward"),
  *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
  *("torchscript", "use_bfloat16", "xla_device", "tf_legacy_loss", "mamba_ssm_dtype"),
  # Outputs beside its logits.
  *("output_attentions", "output_hidden_states", "output_past", "output_router_logits"),
  *("output_scores", "return_dict", "return_dict_in_generate"),
  # Tokens with a meaning, and how texts are generated.
  *("bos_token_id", "eos_token_id", "eos_token_ids", "pad_token_id", "sep_token_id"),
  *("cls_token_id", "mask_token_id", "decoder_start_token_id", "prefix", "task_specific_params"),
  *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
  *("bad_words_ids", "max_length", "min_length", "do_sample", "early_stopping", "num_beams"),
  *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
  *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_return_sequences"),
  *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "remove_invalid_values"),
  # For training and trained heads: `Family.label_heads` reads the fields that they need itself.
  *("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task"),
  *("classifier_dropout", "router_aux_loss_coef", "predict_special_tokens", "summary_activation"),
  *("summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels", "summary_type"),
  "summary_use_proj",
  # Sizes that are given elsewhere.
  *("n_ctx", "n_special"),
)
# Fields with their only supported values; any other value would change the model.
_NEUTRAL: Mapping[str, Any] = {
  "add_cross_attention": False,
  "cross_attention_hidden_size": None,
  "is_decoder": False,
  "is_encoder_decoder": False,
  "pruned_heads": {},
  "tie_encoder_decoder": False,
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type` of Hugging Face's files.

  Attributes:
    model_type: its name there.
    architecture: the class that loads the files that we write for a config.
    rules: rules for the config's fields, in the order in which they are read.
    entries: entries for all tensors that a model of this config may have.
    prefix: beginning of the tensors' names, except in a model without a head.
    older_names: endings of tensors' names, and the endings in older files.
    ignored: patterns of tensors that hold nothing learnt, or a head that we do not have.
    copies: tensors that repeat another in some files, and that other.
    label_heads: the heads that score labels, by the classes of `transformers`.
    label_head: the label head that the models of this family have.
  """

  model_type: str
  architecture: Callable[[ModelConfig], str]
  rules: tuple[Rule, ...]
  entries: Callable[[ModelConfig], Sequence[Entry]]
  prefix: str = ""
  older_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  label_heads: Mapping[str, LabelHead] = dataclasses.field(default_factory=dict)
  label_head: LabelHead | None = None

  def with_task(self, task: str) -> "Family":
    """The family of the class for a task such as 'SequenceClassification'.

    Raises:
      UserError: there is none.
    """
    for name in self.label_heads:
      if name.endswith(f"For{task}"):
        return self.with_label_head(name)
    raise UserError(
      f"family {self.model_type!r} has no class of `transformers` for {task}; take --format=gptjax."
    )

  def with_label_head(self, architecture: str) -> "Family":
    """The family of one of `label_heads`."""
    head = self.label_heads[architecture]
    prefix = head.prefix or self.prefix
    own = {name for entry in head.entries for name in entry.ours}

    def entries(config: ModelConfig) -> list[Entry]:
      kept = [entry for entry in self.entries(config) if own.isdisjoint(entry.ours)]
      return [*head.entries, *(entry.with_prefix(self.prefix, prefix) for entry in kept)]

    return dataclasses.replace(
      self,
      architecture=lambda config: architecture,
      rules=(*self.rules, head.rule),
      entries=entries,
      prefix=prefix,
      label_head=head,
    )

  def stored(self, config: ModelConfig) -> ModelConfig:
    """The model that files of this family hold: beside a label head no other head, no pooler that
    it does not read, and no label bias that goes into the last norm's."""
    if self.label_head is None:
      return config
    has_pooler = bool(self.label_head.pooler or config.label_head.pooling == "pooler")
    folds = not self.label_head.bias and can_fold_bias(describe_parameters(config))
    return config.replace(
      {
        "head.pooler": config.head.pooler and has_pooler,
        "head.pooler_activation": config.head.pooler_activation if has_pooler else "tanh",
        "head.next_sentence": False,
        "label_head.bias": config.label_head.bias and not folds,
      }
    )

  def read_config(self, fields: Fields) -> ModelConfig:
    """Reads a config; UserError for a field that is missing or unknown or has an unknown value."""
    found: dict[str, Any] = {}
    for rule in self.rules:
      found |= rule.read(fields, found)
    pass_over_bookkeeping(fields)
    fields.refuse_unread()
    try:
      return ModelConfig.from_config(found)
    except UserError as error:
      raise UserError(f"{fields.source}: {error}") from error

  def write_config(self, config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json; UserError if the family cannot express the model."""
    if lacking := self.lacks(config):
      kind = f"family {self.model_type!r}" if self.label_head is None else self.architecture(config)
      raise UserError(f"{kind} lacks {'; '.join(lacking)}.")
    return self._written(config)

  def lacks(self, config: ModelConfig) -> list[str]:
    """Lists the fields of a config that the family cannot express; empty if it can express all.

    Raises:
      UserError: the fields it would write are no model, or it has no place for a parameter.
    """
    source = f"family {self.model_type!r} of this model"
    config = self.stored(config)
    written = Fields(self._written(config), source, self._tensors_that_decide(config))
    found = self.read_config(written)
    of_labels = [] if self.label_head is None else config.head_differences(found)
    if differences := [*config.differences(found), *of_labels]:
      return differences
    applicable(self.entries(config), describe_parameters(config), self.model_type)
    return []

  def _written(self, config: ModelConfig) -> dict[str, Any]:
    theirs: dict[str, Any] = {
      "model_type": self.model_type,
      "architectures": [self.architecture(config)],
    }
    for rule in self.rules:
      theirs |= rule.write(config)
    return theirs

  def _tensors_that_decide(self, config: ModelConfig) -> set[str]:
    """Names of tensors whose presence is part of the config, for `Fields.tensors`."""
    decided = {
      "head_transform/linear/kernel": config.head.transform,
      "pooler/kernel": config.head.pooler,
      "next_sentence/kernel": config.head.next_sentence,
      "head/kernel": not config.head.tied,
    }
    return {entry.theirs for entry in self.entries(config) if decided.get(entry.ours[0])}


def pass_over_bookkeeping(fields: Fields) -> None:
  """Takes the fields that do not change the model; UserError if the value of one would."""
  for name in BOOKKEEPING:
    fields.take(name, None)
  for name, neutral in _NEUTRAL.items():
    if (value := fields.take(name, None)) not in (None, neutral):
      raise fields.refuse(name, value, (neutral,))


def always_these(*entries: Entry) -> Callable[[ModelConfig], Sequence[Entry]]:
  """The entries of a family in which they do not depend on the config."""
  return lambda config: entries
