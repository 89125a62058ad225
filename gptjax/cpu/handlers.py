"""Handlers that XLA calls, compiled by numba, whose work XLA's own threads share.

XLA hands a handler one `XLA_FFI_CallFrame` of C (`xla/ffi/api/c_api.h`), read here by the word. The
structs of this API only grow at their ends.
"""

import ctypes
import os

import jax
import numba
import numpy as np
from numba import types

from gptjax.cpu import vectors

# A job: words that tell how far it is, and then words that its kind may use.
JOB, WORDS = 4, 28
# Who still uses the job, the next part of it, the parts that are done, and how many there are.
_USERS, _NEXT, _DONE, _PARTS = range(JOB)
# Jobs that threads share. If there is no room for another, its thread does it alone, since the
# others may be waiting for the very same.
_jobs = np.zeros((64, JOB + WORDS), np.int64)
_COUNT, _FIRST, _BYTES = len(_jobs), _jobs.ctypes.data, _jobs.strides[0]
# Looks at a job that others are about to finish, before the processor is left to them.
_PATIENCE = 2000
# Words of the frame, and of the API's table of functions.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS = 1, 2, 3, 9, 14
_DESTROY_ERROR, _SCHEDULE = 8, 17

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_ATTRIBUTES = 20
_own_words, _request_words = vectors.stack(JOB + WORDS), vectors.stack(5)

# Division as in C, and no exceptions: there is nobody to catch them.
compiled = numba.njit(error_model="numpy")
inlined = numba.njit(error_model="numpy", inline="always")
_called_from_c = numba.cfunc(types.int64(types.int64), error_model="numpy")


@inlined
def words(address, count):
  """So many int64 at an address, as an array."""
  return numba.carray(vectors.pointer(address, numba.int64), count)


@inlined
def floats(address, count):
  """So many float32 at an address, as an array."""
  return numba.carray(vectors.pointer(address, numba.float32), count)


@inlined
def argument(frame, i):
  """Address and sizes of an operand."""
  buffer = words(words(frame[_ARGUMENTS], i + 1)[i], 6)
  return buffer[3], words(buffer[5], buffer[4])


@inlined
def result(frame, i):
  """Address and sizes of a result."""
  buffer = words(words(frame[_RESULTS], i + 1)[i], 6)
  return buffer[3], words(buffer[5], buffer[4])


@inlined
def attribute(frame, i):
  """Address of the i-th attribute, in the order of their names."""
  return words(words(frame[_ATTRIBUTES], i + 1)[i], 2)[1]


def register(name, begin, part):
  """Compiles a handler and makes it known to JAX as `name`.

  Args:
    begin: a compiled function of (frame, job) that fills the words of the job and returns in how
      many parts it is to be done, and whether that is worth the help of other threads.
    part: a compiled function of (job, i) that does a part.

  Returns what must live as long as the handler.
  """

  @_called_from_c
  def work(at):
    parts, job = words(at, JOB)[_PARTS], words(at + 8 * JOB, WORDS)
    while True:
      i = vectors.fetch_add(at + 8 * _NEXT, 1)
      if i >= parts:
        break
      part(job, i)
      vectors.fetch_add(at + 8 * _DONE, 1)
    vectors.fetch_add(at + 8 * _USERS, -1)
    return 0

  working = work.address

  @_called_from_c
  def handler(address):
    frame = words(address, 21)
    if frame[_EXTENSION] != 0 and _describe(frame[_EXTENSION]):
      return 0
    own = _own_words()
    parts, large = begin(frame, words(own + 8 * JOB, WORDS))
    _do(frame, own, parts, min(_cores, parts) - 1 if large else 0, working)
    return 0

  capsule = jax.ffi.pycapsule(ctypes.cast(handler.address, ctypes.c_void_p))
  jax.ffi.register_ffi_target(name, capsule, platform="cpu")
  return handler, work


@compiled
def _describe(address):
  """Whether XLA asks what the handler is; the answer is version 0.3 of the API and no traits."""
  extension = words(address, 4)
  if extension[1] & 0xFFFFFFFF != 1:
    return False
  metadata = words(extension[3], 5)
  metadata[3], metadata[4] = 3 << 32, 0
  return True


@compiled
def _do(frame, own, parts, helpers, work):
  """Does the job at `own`, with as many helpers if there is room for it."""
  at = own
  if helpers > 0:
    for i in range(_COUNT):
      # Users: those who work, and this function.
      if vectors.replace(_FIRST + i * _BYTES + 8 * _USERS, 0, helpers + 2):
        at = _FIRST + i * _BYTES
        break
  state, job, own_job = words(at, JOB), words(at + 8 * JOB, WORDS), words(own + 8 * JOB, WORDS)
  for i in range(WORDS):
    job[i] = own_job[i]
  state[_NEXT], state[_DONE], state[_PARTS] = 0, 0, parts
  if at != own:
    _ask_for_help(frame, at, helpers, work)
  vectors.call(work, at)
  looks = 0
  while vectors.load_shared(at + 8 * _DONE) < parts:
    looks += 1
    if looks > _PATIENCE:
      _sched_yield()
  vectors.fetch_add(at + 8 * _USERS, -1)


@compiled
def _ask_for_help(frame, at, helpers, work):
  """Lets threads of XLA's pool work at a job too, as soon as they are free."""
  api, address = words(frame[_API], 18), _request_words()
  request = words(address, 5)
  for i in range(helpers):
    request[0], request[1], request[2], request[3], request[4] = 40, 0, frame[_CONTEXT], work, at
    error = vectors.call(api[_SCHEDULE], address)
    if error != 0:
      # XLA has no pool here: nobody else will look at the job.
      request[0], request[1], request[2] = 24, 0, error
      vectors.call(api[_DESTROY_ERROR], address)
      vectors.fetch_add(at + 8 * _USERS, i - helpers)
      break
