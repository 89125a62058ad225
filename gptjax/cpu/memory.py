"""Where weights lie in memory."""

import mmap

import jax
import numpy as np

# Bytes of a large page, and of a line of a cache.
PAGE, LINE = 2**21, 64


def in_large_pages(arrays: list[jax.Array]) -> list[jax.Array]:
  """Moves arrays into memory of large pages, if the system has them.

  With pages of 4 KiB a core spends much of a step on finding out where each of them is: in large
  ones SmolLM2-135M writes 1.4 times as many tokens in int8, and 1.1 times in float32.

  Args:
    arrays: of one CPU; each is replaced in the list, so that not all of them are held twice.
  """
  if not hasattr(mmap, "MADV_HUGEPAGE"):
    return arrays
  starts = np.cumsum([0, *(-(-array.nbytes // LINE) * LINE for array in arrays)])
  flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
  memory = mmap.mmap(-1, int(starts[-1]) + PAGE, flags=flags)
  try:
    memory.madvise(mmap.MADV_HUGEPAGE)
  except OSError:  # A system that was built without them.
    return arrays
  bytes_ = np.frombuffer(memory, np.uint8)
  bytes_ = bytes_[-bytes_.ctypes.data % PAGE :]
  for i, start in enumerate(starts[:-1]):
    array = np.asarray(arrays[i])
    place = bytes_[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    place[...] = array
    # The array is this memory itself, as it begins at a line.
    arrays[i] = jax.device_put(place, may_alias=True)
  return arrays
