"""A hook that sees prompts and answers, and may refuse the one and cut off the other."""

import dataclasses
from typing import Protocol

from gptjax.serving.engine_thread import Piece


class Filter(Protocol):
  """Judges texts; called often, so it has to be quick.

  Attributes:
    window: how many characters of a growing answer are held back, so that what is wrong with a text
      is found before its beginning is sent.
  """

  window: int

  def refuses(self, prompt: str) -> str:
    """Why a prompt is not to be answered; empty if it is."""
    ...

  def cut(self, answer: str) -> int | None:
    """Where an answer has to end; None if nothing is wrong with it so far."""
    ...


class FilteredAnswer:
  """One growing answer behind a filter."""

  def __init__(self, judge: Filter):
    self._judge = judge
    self._text = ""
    self._sent = 0
    self._scores = []

  def add(self, piece: Piece) -> Piece:
    """Takes a piece, and returns what of the text may be sent. Scores name the tokens that are held
    back, so all of them come at the end."""
    self._text += piece.text
    self._scores += piece.scores
    end = self._judge.cut(self._text)
    if end is not None:
      end = max(end, self._sent)
      text = self._text[self._sent : end]
      return dataclasses.replace(
        piece, text=text, scores=(), end_score=None, finish_reason="content_filter"
      )
    if piece.finish_reason:
      return dataclasses.replace(piece, text=self._text[self._sent :], scores=tuple(self._scores))
    end = max(len(self._text) - self._judge.window, self._sent)
    text, self._sent = self._text[self._sent : end], end
    return dataclasses.replace(piece, text=text, scores=())
