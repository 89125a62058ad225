"""Handlers that XLA calls, compiled by numba, whose work XLA's own threads share.

XLA hands a handler one `XLA_FFI_CallFrame` of C (`xla/ffi/api/c_api.h`), read here by the word. The
structs of this API only grow at their ends. All values are int64: numbers and addresses.
"""

import ctypes
import functools
import os

import jax
import numba
import numpy as np
from numba import types

from gptjax.cpu import vectors
from gptjax.cpu.vectors import fetch_add, get, put

# A job: words that tell how far it is, and then words that its kind may use.
STATE, WORDS = 4, 28
# Who still uses the job, the next part of it, the parts that are done, and how many there are.
_USERS, _NEXT, _DONE, _PARTS = range(STATE)
# Jobs that threads share. If there is no room for another, its thread does it alone, since the
# others may be waiting for the very same.
_jobs = np.zeros((64, STATE + WORDS), np.int64)
_COUNT, _FIRST, _BYTES = len(_jobs), _jobs.ctypes.data, _jobs.strides[0]
# Looks at a job that others are about to finish, before the processor is left to them.
_PATIENCE = 2000
# Words of the frame, of a buffer, and of the API's table of functions.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 1, 2, 3, 9, 14, 20
_DATA, _SIZES = 3, 5
_DESTROY_ERROR, _SCHEDULE = 8, 17

_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Memory by its address. An array of numba's would be freed behind the last place that names it.
allocate = types.ExternalFunction("malloc", types.int64(types.int64))
free = types.ExternalFunction("free", types.void(types.int64))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_own_words, _request_words = vectors.stack(STATE + WORDS), vectors.stack(5)

# Division as in C, and no exceptions: there is nobody to catch them. Python calls none of these.
_options = {"error_model": "numpy"}
compiled = functools.partial(numba.njit, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_options)
_called_from_c = numba.cfunc(types.int64(types.int64), **_options)


def word_function(count):
  """Compiles a function of so many words that returns one."""
  return compiled(types.int64(*[types.int64] * count))


@word_function(2)
def argument(frame, i):
  """Address of an operand."""
  return get(get(get(frame, _ARGUMENTS), i), _DATA)


@word_function(3)
def argument_size(frame, i, axis):
  return get(get(get(get(frame, _ARGUMENTS), i), _SIZES), axis)


@word_function(2)
def result(frame, i):
  """Address of a result."""
  return get(get(get(frame, _RESULTS), i), _DATA)


@word_function(2)
def attribute(frame, i):
  """Address of the i-th attribute, in the order of their names."""
  return get(get(get(frame, _ATTRIBUTES), i), 1)


def register(name, begin, part):
  """Compiles a handler and makes it known to JAX as `name`.

  Args:
    begin: a compiled function of (frame, job) that fills the words of the job and returns in how
      many parts it is to be done, with a minus if that is not worth the help of other threads.
    part: a compiled function of (job, i) that does a part.

  Returns what must live as long as the handler.
  """

  @_called_from_c
  def work(at):
    while True:
      i = fetch_add(at, _NEXT, 1)
      if i >= get(at, _PARTS):
        break
      part(at + 8 * STATE, i)
      fetch_add(at, _DONE, 1)
    fetch_add(at, _USERS, -1)
    return 0

  working = work.address

  @_called_from_c
  def handler(frame):
    if get(frame, _EXTENSION) != 0 and _describe(get(frame, _EXTENSION)):
      return 0
    own = _own_words()
    _do(frame, own, begin(frame, own + 8 * STATE), working)
    return 0

  capsule = jax.ffi.pycapsule(ctypes.cast(handler.address, ctypes.c_void_p))
  jax.ffi.register_ffi_target(name, capsule, platform="cpu")
  return handler, work


@word_function(1)
def _describe(extension):
  """Whether XLA asks what the handler is; the answer is version 0.3 of the API and no traits."""
  if get(extension, 1) & 0xFFFFFFFF != 1:
    return 0
  metadata = get(extension, 3)
  put(metadata, 3, 3 << 32)
  put(metadata, 4, 0)
  return 1


@word_function(4)
def _ask_for_help(frame, at, helpers, work):
  """Lets threads of XLA's pool work at a job too, as soon as they are free."""
  api, request = get(frame, _API), _request_words()
  for i in range(helpers):
    put(request, 0, 40)
    put(request, 1, 0)
    put(request, 2, get(frame, _CONTEXT))
    put(request, 3, work)
    put(request, 4, at)
    error = vectors.call(get(api, _SCHEDULE), request)
    if error != 0:
      # XLA has no pool here: nobody else will look at the job.
      put(request, 0, 24)
      put(request, 2, error)
      vectors.call(get(api, _DESTROY_ERROR), request)
      fetch_add(at, _USERS, i - helpers)
      break
  return 0


@word_function(4)
def _do(frame, own, parts, work):
  """Does the job at `own`: with others, if it is worth their help and there is room for it."""
  at, helpers = own, min(_cores, parts) - 1
  parts = abs(parts)
  if helpers > 0:
    for i in range(_COUNT):
      # Users: those who work, and this function.
      if vectors.replace(_FIRST + i * _BYTES, _USERS, 0, helpers + 2):
        at = _FIRST + i * _BYTES
        break
  if at != own:
    for i in range(STATE, STATE + WORDS):
      put(at, i, get(own, i))
  put(at, _NEXT, 0)
  put(at, _DONE, 0)
  put(at, _PARTS, parts)
  if at != own:
    _ask_for_help(frame, at, helpers, work)
  vectors.call(work, at)
  looks = 0
  while vectors.get_shared(at, _DONE) < parts:
    looks += 1
    if looks > _PATIENCE:
      _sched_yield()
  fetch_add(at, _USERS, -1)
  return 0
