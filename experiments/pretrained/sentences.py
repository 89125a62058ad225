"""Sentence embeddings of all-MiniLM-L6-v2, here and in `transformers`.

    python -m experiments.pretrained.sentences

A sentence is the mean of its tokens' hidden states, of length 1 (Reimers and Gurevych 2019,
arXiv:1908.10084, section 3).
"""

from collections.abc import Sequence

import numpy as np
import torch
import transformers

from experiments import datasets
from gptjax.training.pretrained import load_model

QUERIES = {
  "A man is playing the guitar on stage.": "Someone performs music for an audience.",
  "The stock market fell sharply today.": "Share prices dropped a lot this afternoon.",
  "How do I reset my password?": "I forgot my login and need a new one.",
  "The cat is asleep on the sofa.": "A pet is napping on the couch.",
  "It will rain in London tomorrow.": "Wet weather is forecast for the British capital.",
  "She finished the marathon in three hours.": "It took her 180 minutes to run 42 kilometres.",
}


def pool(hidden_BTD: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
  """The mean over valid tokens [B, D], of length 1."""
  weights = mask_BT[..., None]
  mean_BD = (hidden_BTD * weights).sum(1) / weights.sum(1)
  return mean_BD / np.linalg.norm(mean_BD, axis=-1, keepdims=True)


def main() -> None:
  folder = datasets.fetch("minilm")
  model, tokenizer = load_model(f"hf:{folder}")
  reference = transformers.AutoModel.from_pretrained(folder).eval()
  candidates = list(QUERIES.values())
  sentences = [*QUERIES, *candidates]
  rows = [[*tokenizer.start, *tokenizer.encode(text), tokenizer.end_of_text] for text in sentences]
  length = max(map(len, rows))
  tokens_BT = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
  mask_BT = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32)
  hidden_BTD, _ = model.hidden(tokens_BT, segment_ids_BT=mask_BT)
  with torch.no_grad():
    out = reference(torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(mask_BT))
  embeddings = {
    "gptjax": pool(np.asarray(hidden_BTD), mask_BT),
    "transformers": pool(out.last_hidden_state.numpy(), mask_BT),
  }
  difference = np.abs(embeddings["gptjax"] - embeddings["transformers"]).max()
  print(f"largest difference of an embedding's element: {difference:.1e}")
  rankings = {name: rank(x_BD) for name, x_BD in embeddings.items()}
  for name, ranking in rankings.items():
    right = np.mean([order[0] == i for i, order in enumerate(ranking)])
    print(f"{name}: the paraphrase comes first for {right:.0%} of {len(QUERIES)} sentences")
  print(f"the same order of all candidates: {rankings['gptjax'] == rankings['transformers']}")


def rank(x_BD: np.ndarray) -> Sequence[list[int]]:
  """Ranks the candidates for each query, the most similar first."""
  queries, candidates = x_BD[: len(QUERIES)], x_BD[len(QUERIES) :]
  return np.argsort(-(queries @ candidates.T), axis=-1).tolist()


if __name__ == "__main__":
  main()
