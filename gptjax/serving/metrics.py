"""What /metrics tells Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gptjax.serving.engine_thread import EngineThread

_SHORT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LONG = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class Metrics:
  """The measures of one server.

  Attributes:
    registry: what is exported.
    requests: counts by route and status.
    first_token, between_tokens, duration: seconds.
  """

  def __init__(self, thread: EngineThread):
    self.registry = CollectorRegistry()
    self.registry.register(_EngineCollector(thread))

    def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
      return Histogram(
        f"gptjax_{name}_seconds", text, labels, buckets=buckets, registry=self.registry
      )

    self.requests = Counter(
      "gptjax_requests", "Requests answered.", ("route", "status"), registry=self.registry
    )
    self.duration = histogram("request", "From a request to the end of its answer.", _LONG, "route")
    self.first_token = histogram("first_token", "From a request to its first text.", _LONG)
    self.between_tokens = histogram("between_tokens", "Between two pieces of an answer.", _SHORT)


class _EngineCollector(Collector):
  """Reads the engine's own counts when they are asked for."""

  def __init__(self, thread: EngineThread):
    self._thread = thread

  def collect(self) -> Iterator[Metric]:
    engine = self._thread.engine
    for name, text, value in (
      ("queue_length", "Answers that wait for a row.", len(engine.waiting)),
      ("running_rows", "Answers that have a row.", len(engine.running)),
      ("rows", "Answers that can grow at the same time.", engine.rows),
      ("cache_pages_used", "Pages of the cache in use.", engine.reader.pages.used),
      ("cache_pages", "Pages of the cache.", engine.reader.pages.count),
    ):
      yield GaugeMetricFamily(f"gptjax_{name}", text, value=value)
    counts = engine.counts
    for name, text, value in (
      ("prompt_tokens", "Tokens of prompts that were read.", counts.prompt_tokens),
      ("cached_tokens", "Tokens of prompts that were in the cache.", counts.cached_tokens),
      ("written_tokens", "Tokens that were written.", counts.written_tokens),
      ("drafted_tokens", "Tokens that were guessed.", counts.drafted_tokens),
      ("accepted_tokens", "Guessed tokens that were right.", counts.accepted_tokens),
      ("engine_steps", "Steps of the model.", counts.steps),
      ("preemptions", "Answers that gave up their pages to others.", counts.preemptions),
    ):
      yield CounterMetricFamily(f"gptjax_{name}", text, value=value)
