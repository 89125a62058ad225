import jax
import numpy as np

from gptjax.data.batch import Batch


def test_batch_is_a_pytree_of_the_fields_that_it_has():
  zeros = np.zeros(8, np.int32)
  row = Batch(zeros, zeros, zeros.astype(np.float32), zeros, zeros, encoder_inputs=zeros[:4])
  doubled = jax.jit(lambda b: jax.tree.map(lambda x: x + 1, b))(Batch.stack([row] * 3))
  assert isinstance(doubled, Batch)
  found = {name: (x.shape, x.dtype.name) for name, x in vars(doubled).items() if x is not None}
  assert found == {
    "inputs": ((3, 8), "int32"),
    "targets": ((3, 8), "int32"),
    "weights": ((3, 8), "float32"),
    "segment_ids": ((3, 8), "int32"),
    "positions": ((3, 8), "int32"),
    "encoder_inputs": ((3, 4), "int32"),
  }
