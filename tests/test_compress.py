"""The command: its words, what it refuses, and a checkpoint that is quantised and judged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

from gptjax import compress
from gptjax.compression import flags
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.model.gpt import model_graph
from gptjax.training.pretrained import save_model

ROOT = Path(__file__).parents[1]


def call(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "gptjax.compress", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_commands_of_the_docstring_have_known_words_and_flags():
  text = re.sub(r"\\\n\s*", "", compress.__doc__)
  commands = re.findall(r"python -m gptjax\.compress (.*)", text)
  assert [command.split()[0] for command in commands] == list(flags.WORDS)
  source = Path(flags.__file__).read_text()
  known = set(re.findall(r'(?:DEFINE_\w+|string|integer|number)\(\s*"(\w+)"', source))
  known |= set(flags.SIZES)
  for command in commands:
    assert set(re.findall(r"--(\w+)=", command)) <= known


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "give one word of quantize"),
    (["quantise"], "no way to compress 'quantise'. Did you mean 'quantize'?"),
    (["report", "x"], "give one word of quantize"),
  ],
)
def test_unknown_words_are_refused(words, message):
  with pytest.raises(UserError, match=re.escape(message)):
    compress.main({}, words)


def test_a_flag_of_another_word_is_refused(tmp_path):
  refused = call("prune", f"--checkpoint={tmp_path}", "--to=x", "--sparsity=0.5", "--group=32")
  assert refused.stderr == "error: --group is not a flag of prune; leave it out.\n"


@pytest.mark.slow
def test_a_checkpoint_is_quantised_and_judged(tiny_config, random_params, tmp_path):
  config = tiny_config(vocab_size=264, embed_dim=32, **{"position.max_positions": 128})
  run, small = tmp_path / "run", tmp_path / "small"
  model = nnx.merge(model_graph(config), random_params(config))
  save_model(run, model, tokenizers.load("bytes"), None)
  (tmp_path / "text.txt").write_text("".join(f"Line {i} of a text.\n" for i in range(300)))
  data = (f"--data={tmp_path}/text.txt", "--rows=8", "--length=64")
  quantize = ("quantize", f"--checkpoint={run}", f"--to={small}", "--format=int4", "--group=32")
  done = call(*quantize, "--embedding=int8", "--method=awq+gptq", *data)
  assert done.returncode == 0, done.stderr
  assert re.search(r"bytes of parameters, 0\.\d+ of", done.stdout)
  again = call(*quantize)
  assert f"error: --to={small} is there already" in again.stderr
  unused = call(*quantize[:2], f"--to={tmp_path}/other", *data)
  assert "error: --method=nearest: --data, text to calibrate on, is not used" in unused.stderr
  told = call("report", f"--checkpoint={small}", f"--original={run}", *data, "--price=1")
  assert told.returncode == 0, told.stderr
  for line in (
    r"in memory: [\d,]+ bytes of parameters, 0\.\d+ of",
    r"KL from the original, nats a token: 0\.\d+ \[0\.\d+, 0\.\d+\]",
    r"8 at once: [\d.]+ tokens/s .*, [\d.]+ for a million tokens",
    r"on disk: [\d,]+ bytes, 0\.\d+ of",
  ):
    assert re.search(line, told.stdout), told.stdout
