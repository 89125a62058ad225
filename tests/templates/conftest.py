"""Tokenizers and configs of the data's tests."""

from tests.data.conftest import corpus, make_config, write_tokenizer  # noqa: F401
