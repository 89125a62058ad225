"""A small byte-level tokenizer."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tests.data.conftest import DOCUMENTS

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def split_then_bytes(pattern):
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
  return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


@pytest.fixture(scope="module")
def byte_level():
  """A BPE trained on whole lines, so that what cuts a text decides its tokens."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = split_then_bytes(r"\n")
  trainer = trainers.BpeTrainer(
    vocab_size=1500,
    special_tokens=CONTROLS,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )
  tokenizer.train_from_iterator([*DOCUMENTS, "12345678 in 2024 (a<=b) don't I'LL " * 50], trainer)
  return tokenizer
