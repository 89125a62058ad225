"""The corpus and the configs of the data's tests."""

from tests.data.conftest import (  # noqa: F401
  corpus,
  encode,
  make_config,
  make_label_config,
  wordpiece,
  write_tokenizer,
)
