"""Compiles ahead what an engine's answers will need, so that none of them waits for it."""

import math
from collections.abc import Iterator

import numpy as np

from gptjax.inference.engine import SHORTEST, Engine
from gptjax.inference.pages import PAGE
from gptjax.inference.reader import Row
from gptjax.inference.request import Request
from gptjax.inference.sampling import MAX_CANDIDATES, Adjustment, Sampling, Settings, choose


def warm_up(engine: Engine) -> Iterator[tuple[int, int]]:
  """Compiles the steps of every size, the shortest texts first, and every choice of a token.

  What few ask for is left to the first who does: scores of a prompt's own tokens, embeddings, and
  the checks of drafts. So is an encoder's reading of its text.

  Args:
    engine: idle; what its cache holds is overwritten, unless it is empty.

  Yields:
    How many of the programs are compiled, and how many there are.
  """
  reader, size = engine.reader, engine.tokenizer.vocab_size
  # All of a prefix is read at once.
  longest = engine.room if engine.config.visibility == "prefix" else min(engine.chunk, engine.room)
  lengths = _doubled(SHORTEST, longest)
  rows = _doubled(1, engine.rows)
  widths = sorted({reader.width(pages) for pages in _doubled(1, -(-engine.room // PAGE))})
  steps = [(1, T, width) for width in widths for T in lengths if 2 * width * PAGE > T]
  steps += [(B, 1, width) for width in widths for B in rows]
  # At the first of the widths, the choices.
  steps.sort(key=lambda step: step[2])
  told = (None, min(MAX_CANDIDATES, size))
  total, done = len(steps) + 2 * len(told) * len(rows), 0
  for B, T, width in steps:
    # Which pages are read and written does not matter to a program.
    tokens = [0] * min(T, engine.room)
    logits_BCV = reader.read([Row(pages=[0] * width)] * B, [tokens] * B, least=T)
    done += 1
    yield done, total
    if T > 1 or width > widths[0]:
      continue
    settings = Settings.of([Sampling(temperature=0)] * B, [0] * B, [0] * B)
    nothing = Adjustment(np.zeros((B, size), np.float32), np.zeros((B, size), bool))
    for adjustment in (None, nothing):
      for candidates in told:
        choose(logits_BCV, settings, adjustment, vocab_size=size, candidates=candidates)
        done += 1
        yield done, total
  reader.clear()
  if not reader.has_encoder:
    engine.run([Request([0] * min(2, engine.room - 1), 1, ignore_end=True)])


def _doubled(least: int, most: int) -> list[int]:
  """The powers of two from `least` to the first that is not below `most`."""
  return [least << i for i in range(max(math.ceil(math.log2(most / least)), 0) + 1)]
