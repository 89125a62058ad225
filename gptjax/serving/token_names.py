"""The texts of single tokens, as log-probabilities name them."""

from gptjax.data.tokenizer import Tokenizer


class TokenNames:
  """The texts of single tokens."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._specials = {token: text for text, token in tokenizer.specials.items()}

  def bytes(self, token: int) -> bytes:
    special = self._specials.get(token)
    return special.encode() if special else self._tokenizer.decode_bytes([token])

  def text(self, token: int) -> str:
    r"""The text of a token; parts of characters as OpenAI writes them, 'bytes:\xe4\xbd'."""
    raw = self.bytes(token)
    try:
      return raw.decode()
    except UnicodeDecodeError:
      return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
