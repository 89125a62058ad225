"""Serves a model over HTTP, in the form of OpenAI's API, with a page to chat.

    python -m gptjax.serve --checkpoint=runs/chat --port=8000
    curl localhost:8000/v1/models

Ctrl-C or SIGTERM lets running answers end first. docs/serving.md has the routes.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import PurePath

import jax
from absl import flags

from gptjax import config as config_lib
from gptjax import wings
from gptjax.errors import UserError, check_number
from gptjax.inference.engine import Engine
from gptjax.inference.flags import define_model_flags
from gptjax.inference.pages import PAGE, page_bytes
from gptjax.inference.reader import page_options
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SHORTEST_KEPT = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _define_flags() -> None:
  define_model_flags()
  flags.DEFINE_string("name", None, "The model's name in requests; by default the checkpoint's.")
  flags.DEFINE_multi_string("adapter", [], "NAME=PATH of LoRA beside the model; may be repeated.")
  flags.DEFINE_string("host", "127.0.0.1", "The address to listen at; 0.0.0.0 is all.")
  flags.DEFINE_integer("port", 8000, "The port to listen at.", lower_bound=0, upper_bound=65535)
  flags.DEFINE_multi_string(
    "api_key",
    [],
    "A key that clients have to send; may be repeated. Also GPTJAX_API_KEYS=KEY,KEY.",
  )
  flags.DEFINE_multi_string("cors_origin", [], "A web page's origin that may ask; may be repeated.")
  flags.DEFINE_integer("rows", 8, "Answers that grow at the same time.", lower_bound=1)
  flags.DEFINE_integer(
    "context", 0, "Tokens of a prompt with its answer; 0 is max_positions.", lower_bound=0
  )
  flags.DEFINE_string("max_memory", None, "Memory of the cache, such as 2GB; by default enough.")
  flags.DEFINE_integer("max_queue", 64, "Answers that may wait for a row.", lower_bound=0)
  flags.DEFINE_string("max_body", "4MB", "The largest request.")
  flags.DEFINE_float("timeout", 600, "Seconds of an answer, at most.")
  flags.DEFINE_float("drain", 30, "Seconds in which running answers may end at the end.")
  flags.DEFINE_string("rate_limit", "", "Requests of a key, such as 60/minute.")


def main(overrides) -> None:
  if overrides:
    raise UserError("gptjax.serve takes no --config.KEY flags; a run's config comes with it.")
  # Only here, so that other commands do not need its libraries.
  try:
    from gptjax.serving.app import make_app
    from gptjax.serving.middleware import parse_rate
    from gptjax.serving.server import Server
    from gptjax.serving.service import Limits, Service
  except ModuleNotFoundError as error:
    raise UserError(f'{error.name} is not installed: pip install ".[serve]"') from error
  if FLAGS.rate_limit:
    parse_rate(FLAGS.rate_limit)
  check_number("--timeout", FLAGS.timeout, above=0)
  check_number("--drain", FLAGS.drain, at_least=0)
  limits = Limits(
    max_queue=FLAGS.max_queue,
    max_body=_bytes("max_body", FLAGS.max_body),
    timeout=FLAGS.timeout,
    drain_seconds=FLAGS.drain,
    rate=FLAGS.rate_limit,
  )
  memory = FLAGS.max_memory and _bytes("max_memory", FLAGS.max_memory)
  name = FLAGS.name or _name(FLAGS.checkpoint)
  adapters = _adapters(name, FLAGS.adapter)
  keys = [*FLAGS.api_key, *filter(None, os.environ.get("GPTJAX_API_KEYS", "").split(","))]
  if _SHORTEST_KEPT not in os.environ:
    # Most of what each start compiles takes less than the second that JAX finds worth keeping.
    jax.config.update(_SHORTEST_KEPT.lower(), 0.1)
  model, tokenizer = load_model(FLAGS.checkpoint, ema=FLAGS.ema)
  if adapters:
    load_adapters = wings.load("gptjax.peft.load:load_adapters", "--adapter")
    model = load_adapters(model, FLAGS.checkpoint, adapters)
  least = page_bytes(model.config, **page_options(model, FLAGS.cache))
  pages = memory and memory // least
  if memory and not pages:
    raise UserError(f"--max_memory={FLAGS.max_memory}: a page of {PAGE} tokens has {least} bytes.")
  engine = Engine(
    model,
    tokenizer,
    rows=FLAGS.rows,
    length=FLAGS.context or None,
    pages=pages,
    weights=FLAGS.weights,
    cache=FLAGS.cache,
    draft=FLAGS.draft,
  )
  del model  # The engine has its own form of it.
  logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
  numbers = {adapter: number for number, adapter in enumerate(adapters)}
  service = Service(engine, name, limits=limits, adapters=numbers)
  # A web page cannot reach a server at home under a name of its own.
  hosts = [*_LOOPBACK, "[::1]"] if FLAGS.host in _LOOPBACK and not keys else []
  app = make_app(service, keys=keys, origins=FLAGS.cors_origin, hosts=hosts)
  Server(app, service, host=FLAGS.host, port=FLAGS.port).run()


def _bytes(name: str, text: str) -> int:
  found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB|TB)", text, re.IGNORECASE)
  size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
  if not size:
    raise UserError(f"--{name}={text!r} is no size; write one like 500MB or 2GB.")
  return size


def _adapters(model: str, given: Sequence[str]) -> dict[str, str]:
  """{name: path} of the adapters, which are models beside the one of that name."""
  found: dict[str, str] = {}
  for text in given:
    name, _, path = text.partition("=")
    if not name or not path:
      raise UserError(f"--adapter={text!r}: write NAME=PATH.")
    if name == model or name in found:
      raise UserError(f"--adapter={text!r}: another model has the name {name!r}; choose one.")
    found[name] = path
  return found


def _name(checkpoint: str) -> str:
  """The last part of a checkpoint's path, without what tells its format."""
  path = PurePath(re.sub("^(hf|gguf):", "", checkpoint))
  return path.name.removesuffix(".gguf") or "model"


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
