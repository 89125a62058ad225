"""Unstructured pruning: weights of the layers become zero, and the shapes stay.

A kernel is seen as a matrix [I, O]. Its axes of inputs are flattened in their order, and so are
those of outputs: inputs of attention's output projection are ordered by head.

Axes: M calibration tokens, I inputs and O outputs of a projection, G inputs of a group, B inputs of
a block.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from gptjax.compression.calibration import Statistic, walk
from gptjax.compression.gptq import factor_of_inverse
from gptjax.compression.models import calibration_rows, load_whole, params_of, with_params
from gptjax.errors import UserError, check_choice
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, ParameterInfo, describe_parameters
from gptjax.small_files import check_new, new_folder
from gptjax.training.pretrained import labels_of, read_model_config, save_model

# Inputs that SparseGPT chooses zeros among at a time, at most (the paper's B_s = B = 128).
BLOCK = 128
# What is added to the diagonal of the Hessian, relative to its mean (the paper's 1 %).
_DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class Sparsity:
  """How many of the weights are zero.

  Attributes:
    zeros: their share, above 0 and below 1.
    group: the share is that of every so many inputs in order; 0 is of all inputs.
  """

  zeros: Fraction
  group: int = 0

  @classmethod
  def parse(cls, text: str | float, key: str = "--sparsity") -> "Sparsity":
    """Reads a share of zeros ('0.5'), or 'N:M': of every M inputs in order, N are not zero (Zhou et
    al. 2021, arXiv:2102.04010; '2:4' is what NVIDIA's sparse tensor cores multiply). `key` names
    the option in errors."""
    if found := re.fullmatch(r"(\d+):(\d+)", str(text)):
      kept, group = map(int, found.groups())
      if 0 < kept < group:
        return cls(1 - Fraction(kept, group), group)
    with contextlib.suppress(ValueError):  # No number, or not a finite one.
      # The decimal fraction that is written: of 100 weights, floor(0.29 * 100) would be 28.
      share = Fraction(str(float(text)))
      if 0 < share < 1:
        return cls(share)
    raise UserError(
      f"{key}={text} is neither a share above 0 and below 1, such as 0.5, nor N:M with N below M, "
      "such as 2:4."
    )

  @property
  def kept(self) -> int:
    """Weights of a group that are not zero, at most."""
    return self.group - self.count(self.group)

  def count(self, size: int) -> int:
    """Zeros among so many weights."""
    return int(self.zeros * size)

  def check(self, name: str, inputs: int) -> None:
    """Raises UserError if a parameter's inputs cannot be divided into groups."""
    if self.group and inputs % self.group:
      raise UserError(f"{name!r} has {inputs} inputs, no multiple of the {self.group} of {self}.")

  def __str__(self) -> str:
    return f"{self.kept}:{self.group}" if self.group else str(float(self.zeros))


@dataclasses.dataclass(frozen=True)
class Pruned:
  """What became of a model.

  Attributes:
    parameters: their number, zeros included.
    weights: number of those that pruning is of: the layers' kernels.
    zeros: number of these that are zero.
  """

  parameters: int
  weights: int
  zeros: int


def _sum_squares(x_MI: jax.Array) -> jax.Array:
  return jnp.square(x_MI).sum(0)


def _gram(x_MI: jax.Array) -> jax.Array:
  return jnp.matmul(x_MI.T, x_MI, precision="highest")


# The statistic of a projection's inputs that each method decides by.
METHODS: Mapping[str, Statistic | None] = {
  "magnitude": None,
  "wanda": _sum_squares,
  "sparsegpt": _gram,
}


def prune(
  checkpoint: epath.PathLike,
  target: Path,
  *,
  method: str,
  sparsity: str | float,
  data: str | None = None,
  rows: int = 128,
  length: int = 2048,
  seed: int = 0,
  ema: bool = False,
  progress: bool = True,
) -> Pruned:
  """Writes a pruned model, which has the same shape, into a new folder.

  Args:
    checkpoint: as for `load_model`.
    target: a folder that does not exist or is empty. It is written completely or not at all.
    method: one of `METHODS`; see `prune_model`.
    sparsity: as for `Sparsity.parse`.
    data: text for 'wanda' and 'sparsegpt', with `rows`, `length` and `seed` as for `read_rows`.
    ema: take the moving average of a run's weights.
    progress: show a bar.

  Raises:
    UserError: as `prune_model`; the checkpoint or the text cannot be read, or is not what the
      method takes; the target exists or cannot be written.
  """
  check_new(target)
  wanted = Sparsity.parse(sparsity)
  _check(read_model_config(checkpoint), method, wanted)
  if (METHODS[method] is None) == bool(data):
    told = (
      "looks at weights alone: leave --data out" if data else "needs --data, text to measure on"
    )
    raise UserError(f"--method={method} {told}.")
  labels = labels_of(checkpoint)
  model, tokenizer = load_whole(checkpoint, ema=ema, progress=progress)
  tokens_RT = None
  if data:
    tokens_RT = calibration_rows(data, tokenizer, rows=rows, length=length, seed=seed)
  pruned = prune_model(model, method, wanted, tokens_RT, progress=progress)
  with new_folder(target) as folder:
    save_model(folder, pruned, tokenizer, labels)
  params = params_of(pruned)
  kernels = [params[name] for name in prunable(describe_parameters(model.config))]
  return Pruned(
    sum(x.size for x in params.values()),
    sum(x.size for x in kernels),
    sum(x.size - int(jnp.count_nonzero(x)) for x in kernels),
  )


def prunable(parameters: Mapping[str, ParameterInfo]) -> dict[str, ParameterInfo]:
  """The parameters that are pruned: kernels of the layers, but for routers."""
  return {name: info for name, info in parameters.items() if info.role == "hidden"}


def prune_model(
  model: GPT,
  method: str,
  sparsity: Sparsity,
  tokens_RT: np.ndarray | None = None,
  *,
  progress: bool = False,
) -> GPT:
  """Returns the model with a share of each kernel of its layers set to zero.

  The methods:
    'magnitude': the smallest |W_ij| among the inputs of each output, where Wanda compares too.
    'wanda': the smallest |W_ij| ||x_i||_2 among the inputs i of each output, with the norm over the
      tokens (Sun et al. 2023, arXiv:2306.11695, equation 1).
    'sparsegpt': see `sparsegpt`; the weights that stay make up for those that go.
  The last two go from layer to layer, each pruned by what reaches it once those before are pruned.

  Args:
    tokens_RT: int32 rows of text for the last two.

  Raises:
    UserError: a kernel has no whole groups, or the method cannot be used on the model.
  """
  _check(model.config, method, sparsity)
  parameters = prunable(describe_parameters(model.config))
  params = params_of(model)
  if METHODS[method] is None:
    for name, info in tqdm(parameters.items(), "Pruning", unit="kernel", disable=not progress):
      pruned = [
        _without_lowest(kernel_IO, jnp.abs(kernel_IO), sparsity)
        for kernel_IO in params[name].reshape(-1, info.fan_in, info.fan_out)
      ]
      params[name] = jnp.stack(pruned).reshape(info.shape)
    return with_params(model.config, params)
  done: dict[str, list[jax.Array]] = {name: [] for name in parameters}
  layers = tqdm(walk(model, tokens_RT), "Pruning", model.config.num_layers, disable=not progress)
  for layer in layers:
    measured = layer.measure(METHODS[method])
    for projection, statistic in measured.items():
      name = f"{projection}/kernel"
      info, kernel = parameters[f"blocks/{name}"], layer.params[name]
      kernel_IO = kernel.reshape(info.fan_in, info.fan_out)
      if method == "wanda":
        scores_IO = jnp.abs(kernel_IO) * jnp.sqrt(statistic)[:, None]
        kernel_IO = _without_lowest(kernel_IO, scores_IO, sparsity)
      else:
        kernel_IO = sparsegpt(kernel_IO, statistic, sparsity)
      layer.params[name] = kernel_IO.reshape(kernel.shape)
      done[f"blocks/{name}"].append(layer.params[name])
  stacked = {name: jnp.stack(kernels) for name, kernels in done.items()}
  return with_params(model.config, params | stacked)


def _check(config: ModelConfig, method: str, sparsity: Sparsity) -> None:
  check_choice("--method", method, METHODS)
  if config.experts.count and METHODS[method] is not None:
    raise UserError(
      f"--method={method} needs the inputs of every projection, and those of experts are not "
      "measured; prune a mixture of experts by --method=magnitude."
    )
  for name, info in prunable(describe_parameters(config)).items():
    sparsity.check(name, info.fan_in)


def check_mask(model: GPT, pattern: str) -> None:
  """Raises UserError, which names the parameter, where a model's zeros are not 'N:M'."""
  params, sparsity = params_of(model), Sparsity.parse(pattern)
  for name, info in prunable(describe_parameters(model.config)).items():
    check_zeros(name, params[name], info, sparsity)


def check_zeros(name: str, x: jax.Array, info: ParameterInfo, sparsity: Sparsity) -> None:
  """Raises UserError if a kernel has not the zeros of a pattern."""
  if not sparsity.group:
    raise UserError(f"a share of {sparsity} is no pattern: give N:M, such as 2:4.")
  sparsity.check(name, info.fan_in)
  groups = x.reshape(-1, sparsity.group, info.fan_out)
  most = int((groups != 0).sum(1).max())
  if most > sparsity.kept:
    raise UserError(
      f"{name!r} is not {sparsity}: of {sparsity.group} inputs in order, as many as {most} have a "
      "weight that is not 0; prune the model to this pattern first."
    )


def _lowest(scores: jax.Array, count: int, axis: int) -> jax.Array:
  """Whether a score is among the lowest along an axis: exactly `count` are, of equals the first."""
  if not count:
    return jnp.zeros(scores.shape, bool)
  # Weights that were rounded to bfloat16 have many equals. (One sort of values takes a third of the
  # time that two of indices do.)
  ordered = jnp.sort(scores, axis=axis, stable=False)
  last = jax.lax.slice_in_dim(ordered, count - 1, count, axis=axis)
  below, equal = scores < last, scores == last
  missing = count - below.sum(axis, keepdims=True)
  return below | (equal & (jnp.cumsum(equal, axis=axis) <= missing))


@functools.partial(jax.jit, static_argnames="sparsity")
def _without_lowest(kernel_IO: jax.Array, scores_IO: jax.Array, sparsity: Sparsity) -> jax.Array:
  """Zeroes the weights with the lowest scores among the inputs, or each group, of each output."""
  group = sparsity.group or kernel_IO.shape[0]
  scores = scores_IO.reshape(-1, group, kernel_IO.shape[1])
  lowest_IO = _lowest(scores, sparsity.count(group), 1).reshape(kernel_IO.shape)
  return jnp.where(lowest_IO, 0.0, kernel_IO)


@functools.partial(jax.jit, static_argnames=("sparsity", "most"))
def sparsegpt(
  kernel_IO: jax.Array, gram_II: jax.Array, sparsity: Sparsity, most: int = BLOCK
) -> jax.Array:
  """Prunes a kernel and corrects what stays, so that its outputs change little in the mean square.

  Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1. Inputs are pruned in their order; the
  error of each is made up for by the inputs after it, for all outputs at once. The zeros are chosen
  anew for each block of inputs, over all its outputs, or for N:M for each group and output.

  Args:
    kernel_IO: float32.
    gram_II: X^T X of the inputs, float32; only its direction matters.
    sparsity: how many zeros.
    most: inputs of a block, at most; a block is a whole share of the inputs.
  """
  inputs = kernel_IO.shape[0]
  step = sparsity.group or 1
  block = max(size for size in range(step, max(most, step) + 1, step) if inputs % size == 0)
  group = sparsity.group or block
  mean = jnp.diagonal(gram_II).mean()
  hessian_II = gram_II + jnp.eye(inputs) * jnp.where(mean > 0, _DAMPING * mean, 1.0)
  upper_II = factor_of_inverse(hessian_II)

  def prune_block(number: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    start = number * block
    upper_BI = jax.lax.dynamic_slice_in_dim(upper_II, start, block)
    upper_BB = jax.lax.dynamic_slice_in_dim(upper_BI, start, block, 1)
    pivots_B1 = jnp.diagonal(upper_BB)[:, None]

    def prune_group(number: jax.Array, carry):
      first = number * group
      weights_GO, pivots_G1 = (
        jax.lax.dynamic_slice_in_dim(x, first, group) for x in (carry[0], pivots_B1)
      )
      scores_GO = jnp.square(weights_GO / pivots_G1)
      if sparsity.group:
        zero_GO = _lowest(scores_GO, sparsity.count(group), 0)
      else:
        flat = scores_GO.reshape(-1)
        zero_GO = _lowest(flat, sparsity.count(flat.size), 0).reshape(scores_GO.shape)

      def prune_input(index: jax.Array, carry):
        weights_BO, errors_BO = carry
        row = first + index
        kept_O = jnp.where(zero_GO[index], 0.0, weights_BO[row])
        error_O = (weights_BO[row] - kept_O) / upper_BB[row, row]
        # The factor is 0 for the inputs before this one.
        weights_BO = weights_BO - jnp.outer(upper_BB[row], error_O)
        return weights_BO.at[row].set(kept_O), errors_BO.at[row].set(error_O)

      return jax.lax.fori_loop(0, group, prune_input, carry)

    weights_BO = jax.lax.dynamic_slice_in_dim(kernel_IO, start, block)
    weights_BO, errors_BO = jax.lax.fori_loop(
      0, block // group, prune_group, (weights_BO, jnp.zeros_like(weights_BO))
    )
    kernel_IO = jax.lax.dynamic_update_slice_in_dim(kernel_IO, weights_BO, start, 0)
    later_BI = jnp.where(jnp.arange(inputs)[None] >= start + block, upper_BI, 0.0)
    return kernel_IO - jnp.matmul(later_BI.T, errors_BO, precision="highest")

  return jax.lax.fori_loop(0, inputs // block, prune_block, kernel_IO)
