"""Quantises a model: a checkpoint whose matrices are stored in few bits.

Axes: M tokens, I inputs, O outputs of a projection.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from gptjax.compression.awq import awq, clipped_grid
from gptjax.compression.calibration import Layer, walk
from gptjax.compression.gptq import gptq
from gptjax.compression.models import calibration_rows, load_whole
from gptjax.compression.smoothquant import largest_inputs, smooth
from gptjax.errors import UserError, check_choice
from gptjax.model.gpt import GPT, ParameterInfo, describe
from gptjax.model.layers import find
from gptjax.quantization.formats import make_grid, to_codes
from gptjax.quantization.kernel import StoredKernel, as_matrix, store_codes
from gptjax.quantization.stored import KEY, Stored, stored_kernels
from gptjax.small_files import check_new, new_folder
from gptjax.training.pretrained import labels_of, save_model

# 'nearest' needs no text to calibrate on.
METHODS = ("nearest", "gptq", "awq", "awq+gptq", "smoothquant")
# Projections that read the same.
_SHARED = (("attention/query", "attention/key", "attention/value"), ("mlp/gate", "mlp/up"))
_PREFIX = "blocks/"


def quantize(
  checkpoint: str,
  target: Path,
  stored: Stored,
  *,
  method: str = "nearest",
  data: str | None = None,
  rows: int = 128,
  length: int = 512,
  seed: int = 0,
  ema: bool = False,
  progress: bool = True,
) -> dict[str, int]:
  """Writes a quantised model as a checkpoint.

  Args:
    checkpoint: the model, as for `pretrained.load_model`.
    target: the folder to write, which must not exist.
    stored: how the weights are to be stored.
    method: one of `METHODS`.
    data: text for all but 'nearest', with `rows`, `length` and `seed` as for `read_rows`.
    ema: take the moving average of a run's weights.
    progress: show bars on stderr.

  Returns:
    {'before', 'after'}: bytes of the parameters.

  Raises:
    UserError: the target exists, the checkpoint cannot be loaded or is quantised already, the text
      is missing or not used, or a matrix cannot be stored so.
  """
  check_choice("--method", method, METHODS)
  if (method == "nearest") == bool(data):
    told = "is not used by it: leave it out, or take another" if data else "is missing"
    raise UserError(f"--method={method}: --data, text to calibrate on, {told}.")
  if method == "smoothquant" and stored.activations == "none":
    raise UserError(
      "--method=smoothquant is of inputs that are rounded too: add --activations=int8."
    )
  check_new(target)
  labels = labels_of(checkpoint)
  model, tokenizer = load_whole(checkpoint, ema=ema, progress=progress)
  before, tokens_RT = count_bytes(model), None
  if data:
    tokens_RT = calibration_rows(data, tokenizer, rows=rows, length=length, seed=seed)
  model, stored = quantized(model, stored, method=method, tokens_RT=tokens_RT, progress=progress)
  with new_folder(target) as folder:
    save_model(folder, model, tokenizer, labels, {KEY: stored.to_config()})
  return {"before": before, "after": count_bytes(model)}


def quantized(
  model: GPT, stored: Stored, *, method: str, tokens_RT: np.ndarray | None, progress: bool = False
) -> tuple[GPT, Stored]:
  """Quantises a model in memory, and tells how it is stored then; arguments as for `quantize`. The
  model itself is changed."""
  scales_inputs = method.startswith(("awq", "smoothquant"))
  stored = dataclasses.replace(stored, scales_inputs=scales_inputs)
  kernels = stored_kernels(describe(model))
  found = {}
  if method != "nearest":
    _check_calibrated(kernels)
    layers = walk(model, tokens_RT)
    for layer in tqdm(layers, method, model.config.num_layers, disable=not progress):
      found[layer.index] = _round_layer(layer, kernels, stored, method)
  model = stored.store(model)
  for name in kernels if found else ():
    parts = [found[index][name] for index in range(model.config.num_layers)]
    of_layers = [nnx.state(part) for part in parts]
    nnx.update(find(model, name.split("/")), jax.tree.map(lambda *x: jnp.stack(x), *of_layers))
  return model, stored


def count_bytes(model: GPT) -> int:
  """Bytes of the arrays of a model."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def measure_inputs(x_MI: jax.Array) -> dict[str, jax.Array]:
  """What `gptq` and `awq` need to know of the inputs of a projection: sums over tokens."""
  return {
    "gram": x_MI.T @ x_MI,
    "size": jnp.abs(x_MI).sum(0),
    "count": jnp.float32(x_MI.shape[0]),
  }


def _round_layer(
  layer: Layer, kernels: Mapping[str, ParameterInfo], stored: Stored, method: str
) -> dict[str, StoredKernel]:
  """Rounds the kernels of a layer, and has the layer go on with what they stand for."""
  matrices, shapes, form = {}, {}, stored.weights
  for name, info in kernels.items():
    own = name.removeprefix(_PREFIX)
    kernel, projection = layer.params[own], own.removesuffix("/kernel")
    count = len(info.fan_in_axes)
    shapes[projection] = kernel.shape[:count], kernel.shape[count:]
    matrices[projection] = as_matrix(kernel, count, kernel.ndim - count)
    form.check(name, matrices[projection].shape[-1])
  inputs, factors = {}, {}
  if method == "smoothquant":
    largest = layer.measure(largest_inputs, jnp.maximum)
    factors = _of_shared(matrices, lambda names, own: smooth(own, largest[names[0]]))
  else:
    inputs = layer.measure(measure_inputs)
  if method.startswith("awq"):

    def find_factors(names: Sequence[str], own: Sequence[jax.Array]) -> jax.Array:
      told = inputs[names[0]]
      return awq(own, told["gram"], told["size"] / told["count"], form)

    factors = _of_shared(matrices, find_factors)
  rounded = {}
  for projection, matrix_OI in matrices.items():
    factors_I, gram_II = factors.get(projection), inputs.get(projection, {}).get("gram")
    if factors_I is not None:
      matrix_OI = matrix_OI * factors_I[None]
      gram_II = None if gram_II is None else gram_II / jnp.outer(factors_I, factors_I)
    if method.endswith("gptq"):
      # Not clipped: GPTQ would make up for what is cut off, which costs more than it gains
      # (experiments/compression).
      codes_OI, grid = gptq(matrix_OI, gram_II, form)
    else:
      clips = method == "awq"
      grid = clipped_grid(matrix_OI, gram_II, form) if clips else make_grid(matrix_OI, form)
      codes_OI = to_codes(matrix_OI, grid, form)
    scales_I = None if factors_I is None else 1 / factors_I
    codes = store_codes(codes_OI, grid, form)
    kernel = StoredKernel(codes, *shapes[projection], scales_I, stored.activations)
    rounded[f"{_PREFIX}{projection}/kernel"] = kernel
    layer.params[f"{projection}/kernel"] = kernel[...]
  return rounded


def _of_shared(
  matrices: Mapping[str, jax.Array],
  find_factors: Callable[[Sequence[str], Sequence[jax.Array]], jax.Array],
) -> dict[str, jax.Array]:
  """The factors of the inputs of each projection, the same where projections read the same."""
  shared = {name for names in _SHARED for name in names}
  factors = {}
  for names in [*_SHARED, *((name,) for name in matrices if name not in shared)]:
    if names := [name for name in names if name in matrices]:
      found = find_factors(names, [matrices[name] for name in names])
      factors |= dict.fromkeys(names, found)
  return factors


def _check_calibrated(kernels: Mapping[str, ParameterInfo]) -> None:
  for name, info in kernels.items():
    if "experts" in info.axes:
      raise UserError(
        f"{name!r}: experts read few tokens each, and are not calibrated: take --method=nearest."
      )
