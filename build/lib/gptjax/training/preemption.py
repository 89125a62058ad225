"""Asked to stop: by a signal on one host, by a notice to the cluster on many."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
  """A context in which SIGTERM and, of a single process, SIGINT ask the loop to save and leave."""

  def __enter__(self) -> "Preemption":
    self._requested = False
    self._handlers = {}
    # Of several processes JAX handles SIGTERM: one that gets it tells the others, and a handler of
    # ours would take its place. Python lets only the main thread handle signals; in another, the
    # caller has to.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._handlers = {number: signal.signal(number, self._request) for number in SIGNALS}
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    """Whether to stop after `step`; all hosts get the same answer."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._requested

  def _request(self, number: int, frame: Any) -> None:
    del number, frame
    if self._requested:  # Whoever asks twice does not want to wait.
      raise KeyboardInterrupt
    self._requested = True
