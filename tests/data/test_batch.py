import jax
import numpy as np

from gptjax.data.batch import Batch


def test_batch_is_a_pytree_of_its_fields():
  batch = Batch.stack([Batch.padding(8)] * 3)
  doubled = jax.jit(lambda b: jax.tree.map(lambda x: x + 1, b))(batch)
  assert isinstance(doubled, Batch)
  assert {name: (x.shape, x.dtype.name) for name, x in vars(doubled).items()} == {
    "inputs": ((3, 8), "int32"),
    "targets": ((3, 8), "int32"),
    "weights": ((3, 8), "float32"),
    "segment_ids": ((3, 8), "int32"),
    "positions": ((3, 8), "int32"),
  }
  assert not np.any(batch.weights)
