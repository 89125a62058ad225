"""The perplexity of SmolLM2-135M-Instruct on real texts, here and in `transformers`.

    python -m experiments.pretrained.perplexity

Both read the same GGUF file and the same windows of tokens, in float32.
"""

import json
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from experiments import datasets
from gptjax.training.pretrained import load_model

WINDOW = 512
MAX_WINDOWS = 8


def texts() -> dict[str, str]:
  prose = datasets.fetch("prose")
  return {
    "State of the Union 2000": (prose / "sotu-2000_william_j_clinton_d.txt").read_text(),
    "Moby-Dick, chapter 1": (prose / "moby-dick-chapter_1.txt").read_text(),
    "Python's json/decoder.py": Path(json.decoder.__file__).read_text(),
  }


def main() -> None:
  (path,) = datasets.fetch("smollm2").glob("*.gguf")
  model, tokenizer = load_model(f"gguf:{path}")
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  graphdef, params = nnx.split(model)

  @jax.jit
  def our_logits(params, tokens_BT):
    return nnx.merge(graphdef, params)(tokens_BT)

  print("| text | tokens | gptjax | transformers | largest difference of a logit |")
  print("|---|---|---|---|---|")
  for name, text in texts().items():
    tokens = np.array(tokenizer.encode(text), np.int32)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)[:MAX_WINDOWS]
    nats, difference, count = np.zeros(2), 0.0, 0
    for row in windows:
      ours = np.asarray(our_logits(params, row[None]))[0]
      with torch.no_grad():
        theirs = reference(torch.tensor(row[None]).long()).logits[0].numpy()
      difference = max(difference, float(np.abs(ours - theirs).max()))
      for i, logits in enumerate((ours, theirs)):
        logits = logits[:-1].astype(np.float64)
        log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        nats[i] -= log_p[np.arange(len(log_p)), row[1:]].sum()
      count += len(row) - 1
    ours, theirs = np.exp(nats / count)
    print(f"| {name} | {count:,} | {ours:.4f} | {theirs:.4f} | {difference:.1e} |")


if __name__ == "__main__":
  main()
