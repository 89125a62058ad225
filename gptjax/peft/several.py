"""Several LoRA adapters on one model, chosen for each row of a batch (the setting of Punica, Chen
et al. 2023, arXiv:2310.18547, and S-LoRA, Sheng et al. 2023, arXiv:2311.03285).

    model = put_several_on(model, [(config, adapters), (other_config, other_adapters)])
    generate(model, tokenizer, [prompt, other_prompt, third_prompt], adapters=[0, 1, None])

Axes: A adapters, B rows of a batch, T positions, I inputs, O outputs, R the largest rank; a stack
has a leading axis L.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax import tree
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.model.layers import Linear
from gptjax.peft.config import PeftConfig
from gptjax.peft.layers import AdaptedLinear, split_shape
from gptjax.peft.quantized import quantize_model
from gptjax.peft.surgery import describe_adapters, find_targets


class SeveralLoRALinear(AdaptedLinear):
  """x W + b + scale x A B, with the scale, A and B of each row's adapter. It is not trained.

  lora_a: float32 [A, *in, R]. lora_b: float32 [A, R, *out]. scales: float32 [A]. ids: int32 [B],
  -1 for none; at first without rows, which is no adapter for any.
  """

  def __init__(self, base: Linear, lora_a: np.ndarray, lora_b: np.ndarray, scales: np.ndarray):
    super().__init__(base)
    self.lora_a = nnx.Variable(jnp.asarray(lora_a))
    self.lora_b = nnx.Variable(jnp.asarray(lora_b))
    self.scales = nnx.Variable(jnp.asarray(scales))
    self.ids = nnx.Variable(jnp.zeros((*scales.shape[:-1], 0), jnp.int32))

  def __call__(self, x: jax.Array) -> jax.Array:
    ids_B = self.ids[...]
    B = x.shape[0]
    y = super().__call__(x)
    if not ids_B.size:
      return y
    if ids_B.shape != (B,):
      raise UserError(f"adapters are chosen for {ids_B.size} rows, the batch has {B}: `choose`.")
    a, b = self.lora_a[...][ids_B].astype(self.dtype), self.lora_b[...][ids_B].astype(self.dtype)
    R = a.shape[-1]
    a_BIR, b_BRO = a.reshape(B, -1, R), b.reshape(B, R, -1)
    scales_B = jnp.where(ids_B < 0, 0, self.scales[...][ids_B]).astype(self.dtype)
    x_BTI = x.reshape(B, -1, a_BIR.shape[1]).astype(self.dtype)
    change_BTO = (x_BTI @ a_BIR * scales_B[:, None, None]) @ b_BRO
    return y + change_BTO.reshape(y.shape)

  @property
  def adapters(self) -> int:
    """How many adapters there are."""
    return self.scales.shape[-1]

  def choose(self, ids_B: jax.Array) -> None:
    """Assigns adapters to the rows of the next batches, -1 for none."""
    stack = self.scales.shape[:-1]
    self.ids.set_value(jnp.broadcast_to(ids_B, (*stack, *ids_B.shape)))

  def merged(self):
    raise UserError("several adapters are not to be merged: put the one on a model by `put_on`.")


def put_several_on(
  model: GPT,
  adapters: Sequence[tuple[PeftConfig, Mapping[str, Any]]],
  names: Sequence[str] | None = None,
) -> GPT:
  """Puts several trained adapters on a model; `choose` then assigns them to rows.

  Args:
    model: changed, and must not be used afterwards.
    adapters: for each its config, of method 'lora', and its values, a nested dict, as
      `surgery.put_on` takes and `huggingface.read` returns. Ranks and targets may differ.
    names: their names in errors; by default their numbers.

  Raises:
    UserError: there are none, one is not LoRA or does not fit the model, or they were trained
      beside models of different formats.
  """
  if not adapters:
    raise UserError("put_several_on needs at least one adapter.")
  bases = {config.base for config, _ in adapters}
  if len(bases) > 1:
    raise UserError(f"adapters of different peft.base, {' and '.join(sorted(bases))}.")
  # For each adapter, (A, B, scale) by projection.
  found: list[dict[str, tuple[np.ndarray, np.ndarray, float]]] = []
  for name, (config, values) in zip(names or range(len(adapters)), adapters, strict=True):
    of = f"adapter {name}"
    if config.method != "lora":
      raise UserError(
        f"{of}: peft.method={config.method!r}; only 'lora' goes with others. Load a run as the "
        "model itself, or merge a folder into its base with gptjax.convert."
      )
    if config.unfrozen:
      raise UserError(f"{of}: peft.unfrozen={config.unfrozen}: all rows share the model.")
    flat = tree.named_leaves(values)
    for leaf, info in describe_adapters(model.config, config).items():
      if leaf not in flat or flat[leaf].shape != info.shape:
        shape = list(flat[leaf].shape) if leaf in flat else "missing"
        raise UserError(f"{of}: {leaf!r} is {shape}, the model makes it {list(info.shape)}.")
    found.append({})
    for target, options in find_targets(model, config).items():
      a, b = (
        np.asarray(flat[target.removesuffix("kernel") + part]) for part in ("lora_a", "lora_b")
      )
      scale = config.scale(a.shape[-1], options.get("alpha", config.alpha))
      found[-1][target.removesuffix("/kernel")] = (a, b, scale)
  quantize_model(model, bases.pop())
  for name in dict.fromkeys(name for of_adapter in found for name in of_adapter):
    *path, last = name.split("/")
    parent = functools.reduce(getattr, path, model)
    setattr(parent, last, _make(getattr(parent, last), [of_one.get(name) for of_one in found]))
  return model


def _make(base: Linear, parts: Sequence[tuple[np.ndarray, np.ndarray, float] | None]):
  """Stacks the adapters of a projection, padded with zeros to one rank; None is no adapter."""
  stack, ins, outs = split_shape(base)
  rank = max(part[0].shape[-1] for part in parts if part is not None)
  lora_a = np.zeros((*stack, len(parts), *ins, rank), np.float32)
  lora_b = np.zeros((*stack, len(parts), rank, *outs), np.float32)
  scales = np.zeros((*stack, len(parts)), np.float32)
  every = (slice(None),) * len(stack)
  for i, part in enumerate(parts):
    if part is not None:
      a, b, scales[*every, i] = part
      lora_a[*every, i, ..., : a.shape[-1]] = a
      lora_b[*every, i, : a.shape[-1]] = b
  return SeveralLoRALinear(base, lora_a, lora_b, scales)


def choose(model: GPT, adapter_ids: Sequence[int | None]) -> None:
  """Assigns an adapter, by its index, to each row of the next batches; None is no adapter.

  Raises:
    UserError: there is no such adapter.
  """
  modules = [m for _, m in nnx.iter_modules(model) if isinstance(m, SeveralLoRALinear)]
  count = modules[0].adapters if modules else 0
  for row, i in enumerate(adapter_ids):
    if i is not None and not 0 <= i < count:
      raise UserError(f"row {row}: no adapter {i}; the model has {count}, counted from 0.")
  ids_B = jnp.array([-1 if i is None else i for i in adapter_ids], jnp.int32)
  for module in modules:
    module.choose(ids_B)
