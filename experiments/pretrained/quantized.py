"""Measures the loss of SmolLM2-135M-Instruct with its frozen kernels in fewer bits.

    python -m experiments.pretrained.quantized

The texts and windows are those of experiments.pretrained.perplexity; products are float32.
"""

import jax
import numpy as np
from flax import nnx

from experiments import datasets
from experiments.pretrained.perplexity import MAX_WINDOWS, WINDOW, texts
from gptjax.peft.config import BASES
from gptjax.peft.quantized import quantize_model
from gptjax.training.pretrained import load_model


def main() -> None:
  (path,) = datasets.fetch("smollm2").glob("*.gguf")
  model, tokenizer = load_model(f"gguf:{path}")
  graph, state = nnx.split(model)
  original = nnx.to_pure_dict(state)
  print(f"| base | MiB of the layers | {' | '.join(texts())} |")
  print(f"|---|---|{'---|' * len(texts())}")
  for base in BASES:
    model = nnx.merge(graph, original)
    quantize_model(model, base)
    graphdef, params = nnx.split(model)

    @jax.jit
    def log_probabilities(params, tokens_BT, graphdef=graphdef):
      logits_BTV = nnx.merge(graphdef, params)(tokens_BT)[:, :-1]
      targets_BT1 = tokens_BT[:, 1:, None]
      return jax.numpy.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT1, axis=-1)

    perplexities = []
    for text in texts().values():
      tokens = np.array(tokenizer.encode(text), np.int32)
      windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)[:MAX_WINDOWS]
      found = [np.asarray(log_probabilities(params, row[None]), np.float64) for row in windows]
      perplexities.append(f"{np.exp(-np.mean(found)):.2f}")
    size = sum(x.nbytes for x in jax.tree.leaves(params["blocks"])) / 2**20
    print(f"| {base} | {size:.1f} | {' | '.join(perplexities)} |")


if __name__ == "__main__":
  main()
