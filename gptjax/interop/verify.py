"""Compares our model with the one of `transformers` on the same tokens."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT
from gptjax.training.pretrained import ForeignModel

TEXT = (
  "The quick brown fox jumps over the lazy dog; 1,234.5 times. "
  "def greet(name):\n  return f'Hello, {name}!'\n"
  "人工智能正在改变世界，但它仍然需要人的判断。"
)
_RANDOM_TOKENS = 64
_NEEDS = "--verify runs transformers: pip install torch transformers, and accelerate for GGUF."


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Agreement of two models' logits on a row of tokens.

  largest_difference: over all logits. scale: the largest logit of the reference. kl: nats, the mean
  over positions of KL(reference || ours). top1: the share of positions with the same best token.
  """

  largest_difference: float
  scale: float
  kl: float
  top1: float

  def __str__(self) -> str:
    return (
      f"max difference {self.largest_difference:.2e} of {self.scale:.3g}, KL {self.kl:.2e} nats, "
      f"top-1 agreement {self.top1:.4f}"
    )


def compare(ours: np.ndarray, reference: np.ndarray) -> Agreement:
  """Measures how near two float arrays [T, V] of logits are."""
  ours, reference = ours.astype(np.float64), reference.astype(np.float64)
  log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (reference, ours))
  return Agreement(
    float(np.abs(ours - reference).max()),
    float(np.abs(reference).max()),
    float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
    float((ours.argmax(-1) == reference.argmax(-1)).mean()),
  )


def verify(
  model: GPT, reference: ForeignModel, encode: Callable[[str], Sequence[int]]
) -> Mapping[str, Agreement]:
  """Runs both models, in float32, on random tokens and on `TEXT`.

  Args:
    model: ours.
    reference: the files for `transformers` to load.
    encode: the tokenizer's function from text to ids.

  Raises:
    UserError: torch, transformers or, for GGUF, accelerate is not installed.
  """
  config = model.config
  rng = np.random.default_rng(0)
  # Ids from the offset on: RoBERTa gives padding, the id before that, no position.
  random = rng.integers(config.position.offset, config.vocab_size, _RANDOM_TOKENS)
  room = config.position.room
  rows = {"random tokens": random[:room], "text": encode(TEXT)[:room]}
  run_reference = _load_reference(reference)
  graphdef, params = nnx.split(model)

  @jax.jit
  def run_ours(params, tokens_BT):
    model = nnx.merge(graphdef, params)
    if model.encoder is not None:
      return model(tokens_BT, encoded=model.encode(tokens_BT))
    if not config.label_head.num_labels and _has_logits(config):
      return model(tokens_BT)
    hidden_BTD, _ = model.hidden(tokens_BT)
    return model.label_logits(hidden_BTD) if config.label_head.num_labels else hidden_BTD

  def run(tokens) -> Agreement:
    ours = np.asarray(run_ours(params, np.asarray([tokens], np.int32)))[0]
    theirs = run_reference(tokens)
    if theirs.ndim == 1:  # Scores of the text; ours has scores of each token.
      ours, theirs = ours[0 if config.visibility == "bidirectional" else -1, None], theirs[None]
    return compare(ours, theirs)

  return {name: run(tokens) for name, tokens in rows.items()}


def _has_logits(config: ModelConfig) -> bool:
  return config.visibility != "bidirectional" or config.head.transform


def _load_reference(reference: ForeignModel) -> Callable[[Sequence[int]], np.ndarray]:
  """A function from tokens [T] to logits [T, V], or hidden states if there are none; with labels to
  scores [T, K], or [K] from a class that scores texts."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise UserError(_NEEDS) from error
  config = reference.config
  if config.label_head.num_labels:
    auto = getattr(transformers, reference.family.architecture(config))
  elif config.encoder_layers:
    auto = transformers.AutoModelForSeq2SeqLM
  elif config.visibility == "bidirectional":
    auto = transformers.AutoModelForMaskedLM if _has_logits(config) else transformers.AutoModel
  else:
    auto = transformers.AutoModelForCausalLM
  try:
    model = auto.from_pretrained(
      **reference.for_transformers, dtype=torch.float32, attn_implementation="eager"
    ).eval()
  except ImportError as error:
    raise UserError(_NEEDS) from error

  def run(tokens) -> np.ndarray:
    tokens = torch.tensor([list(map(int, tokens))])
    extra = {"decoder_input_ids": tokens} if config.encoder_layers else {}
    with torch.no_grad():
      out = model(input_ids=tokens, **extra)
    if "start_logits" in out:
      return torch.stack([out.start_logits[0], out.end_logits[0]], dim=-1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state)[0].numpy()

  return run
