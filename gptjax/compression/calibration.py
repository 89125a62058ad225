"""A model read layer by layer: what reaches each projection of a layer on real text.

Axes: R rows, T positions, M tokens (rows times positions), D width, I inputs of a projection.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from gptjax import tree
from gptjax.data import files
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT
from gptjax.model.layers import Linear, adopt, find
from gptjax.model.stack import Stack

# Rows that go through a layer at a time.
ROWS = 8
# A statistic of a projection's inputs [M, I], float32: a tree of sums over M, or of what else can
# be joined.
Statistic = Callable[[jax.Array], Any]


def read_rows(
  path: str, tokenizer: Tokenizer, *, rows: int, length: int, seed: int = 0
) -> np.ndarray:
  """Rows of text to calibrate on, int32 [R, T], at random places of the documents.

  Args:
    path: text files, or the key 'text' of records, as for training.
    tokenizer: the model's. Documents are joined by its `end_of_text`.
    rows, length: how many rows, and tokens in each.
    seed: decides the places.

  Raises:
    UserError: there is no text, or less than one row.
  """
  source = files.open_texts(path)
  rng = np.random.default_rng(seed)
  wanted, tokens = rows * length, []
  for index in rng.permutation(len(source)):
    tokens += [*tokenizer.encode(source[index]), tokenizer.end_of_text]
    # Several times what is needed, so that a long document does not give all rows.
    if len(tokens) >= 4 * wanted:
      break
  if len(tokens) < wanted:
    raise UserError(
      f"--data={path}: its text has {len(tokens)} tokens, fewer than the {rows} rows of {length} "
      "that --rows and --length ask for."
    )
  starts = np.sort(rng.permutation(len(tokens) // length)[:rows]) * length
  return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)


class _Notes:
  """Statistics by the name of a projection, filled while a forward pass is traced."""

  def __init__(self):
    self.found: dict[str, Any] = {}


class _Noted(Linear):
  """A projection that also notes a statistic of its inputs."""

  def __init__(self, base: Linear, name: str, statistic: Statistic, notes: _Notes):
    adopt(self, base)
    self.name, self.statistic, self.notes = name, statistic, notes

  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = math.prod(x.shape[x.ndim - self.contracted_axes :])
    self.notes.found[self.name] = self.statistic(x.astype(jnp.float32).reshape(-1, inputs))
    return super().__call__(x)


@dataclasses.dataclass
class Layer:
  """A layer and what it reads.

  Attributes:
    index: its number, from 0.
    params: its parameters by their names in the model without 'blocks/', without the axis of
      layers. What they are replaced by decides what the next layer reads.
    inputs: float [R, T, D], `ROWS` rows at a time.
    graphdef: a stack of this one layer.
    around: the parameters of the stack that are not the layer's.
  """

  index: int
  params: dict[str, jax.Array]
  inputs: list[jax.Array]
  graphdef: nnx.GraphDef
  around: dict[str, jax.Array]

  def measure(
    self,
    statistic: Statistic,
    join: Callable[[jax.Array, jax.Array], jax.Array] = operator.add,
  ) -> dict[str, Any]:
    """The statistic of the inputs of each projection, by the projection's name ('mlp/up'), those
    of some rows and of others joined, by default added."""
    found = [self._run(x_RTD, statistic)[1] for x_RTD in self.inputs]
    return jax.tree.map(lambda *parts: functools.reduce(join, parts), *found)

  def outputs(self) -> list[jax.Array]:
    """What the layer makes of its inputs, in the same shapes."""
    return [self._run(x_RTD, None)[0] for x_RTD in self.inputs]

  def _run(self, x_RTD: jax.Array, statistic: Statistic | None) -> tuple[jax.Array, dict[str, Any]]:
    stacked = {f"blocks/{name}": x[None] for name, x in self.params.items()}
    params = traverse_util.unflatten_dict(stacked | self.around, sep="/")
    return _run(self.graphdef, params, x_RTD, statistic=statistic)


def walk(model: GPT, tokens_RT: np.ndarray) -> Iterator[Layer]:
  """Yields the layers of a decoder in their order, each with what it reads of some text.

  A layer runs when the next one is asked for, with the parameters that it has by then. One layer's
  activations of all rows are in memory at a time.

  Raises:
    UserError: a layer reads more than the one before it, or an encoder.
  """
  config = model.config
  if model.encoder is not None or config.residual.embedding or config.residual.values:
    raise UserError(
      "calibration reads layers one after another: a model with an encoder, "
      "model.residual.embedding or model.residual.values cannot be read so."
    )
  embed = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).embedded(tokens))
  graphdef, params = nnx.split(model)
  inputs = [embed(params, tokens_RT[i : i + ROWS]) for i in range(0, len(tokens_RT), ROWS)]
  flat = tree.named_leaves(nnx.to_pure_dict(params))
  layers = {name: x for name, x in flat.items() if name.startswith("blocks/")}
  around = {name: x for name, x in flat.items() if name.startswith("attention_bias/")}
  for index in range(config.num_layers):
    of_layer = {name.removeprefix("blocks/"): x[index] for name, x in layers.items()}
    kind = config.layer_pattern[index % len(config.layer_pattern)]
    layer = Layer(index, of_layer, inputs, _one_layer(config, kind), around)
    yield layer
    inputs = layer.outputs()


@functools.cache
def _one_layer(config: ModelConfig, kind: str) -> nnx.GraphDef:
  """A stack of one layer, of a kind of `config.layer_pattern`, without a last norm."""
  changes = {"num_layers": 1, "layer_pattern": (kind,)}
  changes |= {"execution.scan_layers": False, "execution.remat": "none"}
  one = config.replace(changes)
  # What depends on the depth stays that of the whole model.
  scale = config.residual.scale * one.depth_ratio / config.depth_ratio
  one = one.replace({"residual.scale": scale})

  def make() -> Stack:
    stack = Stack(one, nnx.Rngs(0))
    stack.final_norm = None
    return stack

  return nnx.graphdef(nnx.eval_shape(make))


@functools.partial(jax.jit, static_argnames=("graphdef", "statistic"))
def _run(
  graphdef: nnx.GraphDef, params: Mapping[str, Any], x_RTD: jax.Array, *, statistic: Any
) -> tuple[jax.Array, dict[str, Any]]:
  """Runs a stack; returns its output, and the statistic of the inputs of its projections."""
  stack, notes = nnx.merge(graphdef, params), _Notes()
  if statistic is not None:
    for path, module in list(nnx.iter_modules(stack.blocks)):
      # The router of experts is not compressed.
      if isinstance(module, Linear) and module.kernel.role != "router":
        noted = _Noted(module, "/".join(path), statistic, notes)
        setattr(find(stack.blocks, path[:-1]), path[-1], noted)
  positions_RT = jnp.broadcast_to(jnp.arange(x_RTD.shape[1]), x_RTD.shape[:2])
  return stack.run(x_RTD, positions_RT)[0], notes.found
