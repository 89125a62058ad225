"""The schema of a training batch, the same for every task."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed rows: B rows of T tokens, or one row without the B axis.

  Attributes:
    inputs: int32 [B, T], the tokens the model reads.
    targets: int32 [B, T], the token that follows each input, or the label of the input.
    weights: float32 [B, T], what each target counts in the loss; 0 for padding.
    segment_ids: int32 [B, T], the document of each input, from 1; 0 for padding.
    positions: int32 [B, T], distance from the start of the segment within its row, from 0.
    prefix: int32 [B, T], 1 where all of the segment sees the input, for a prefix language model.
    token_types: int32 [B, T], 1 in the second of two texts.
    values: float32 [B, T, K], a target value for each of K labels, where no single label is right.
    encoder_inputs: int32 [B, S], tokens the encoder reads.
    encoder_segment_ids: int32 [B, S]; decoders see the encoder's segment of the same id.
    encoder_positions: int32 [B, S].
  """

  inputs: np.ndarray | jax.Array
  targets: np.ndarray | jax.Array
  weights: np.ndarray | jax.Array
  segment_ids: np.ndarray | jax.Array
  positions: np.ndarray | jax.Array
  prefix: np.ndarray | jax.Array | None = None
  token_types: np.ndarray | jax.Array | None = None
  values: np.ndarray | jax.Array | None = None
  encoder_inputs: np.ndarray | jax.Array | None = None
  encoder_segment_ids: np.ndarray | jax.Array | None = None
  encoder_positions: np.ndarray | jax.Array | None = None

  @classmethod
  def stack(cls, rows: Sequence["Batch"]) -> "Batch":
    """Stacks rows [T] to a batch [B, T]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
