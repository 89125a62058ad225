"""Stops a run on a signal, or on a notice to the cluster if there are many hosts."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
  """Ends a run that a signal asked to stop, once it has saved.

  Uncaught, it ends the program with 128 + the number of the signal, so that shells and schedulers
  see a program that was stopped, not one that is done.
  """

  def __init__(self, number: int):
    super().__init__(128 + number)


class Preemption:
  """A context in which SIGTERM and SIGINT ask the loop to save and leave."""

  def __enter__(self) -> "Preemption":
    self._signal: int | None = None
    # With several processes JAX handles SIGTERM: the process that gets it tells the others, and our
    # handler would take its place. Python lets only the main thread handle signals; in another
    # thread, the caller has to.
    handled = SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
    if threading.current_thread() is not threading.main_thread():
      handled = ()
    self._handlers = {number: signal.signal(number, self._request) for number in handled}
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    """Whether to stop after `step`; all hosts get the same answer."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._signal is not None

  def stopped(self) -> Stopped:
    """Returns what to raise when the run has saved; a host that was only told had SIGTERM."""
    return Stopped(self._signal or signal.SIGTERM)

  def _request(self, number: int, frame: Any) -> None:
    del frame
    if self._signal is not None:  # A second signal means: do not wait.
      raise KeyboardInterrupt
    self._signal = number
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX passes it on.
