"""Answers of SmolLM2 before and after fine-tuning on instructions, side by side.

    python -m experiments.finetune.answers --runs=runs/finetune

asks the first questions of the test files in English and Chinese, after `run --only=instructions`,
and writes answers.md.
"""

import json
from pathlib import Path

from absl import app, flags

from experiments.datasets import fetch
from experiments.finetune.run import SEEDS, checkpoint_of
from experiments.finetune.tasks import FULL, LORA, SMOLLM2
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.templates.chat import ChatTemplate
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS
QUESTIONS = 3
MAX_TOKENS = 96


def questions(name: str) -> list[dict[str, str]]:
  lines = (fetch(name) / "test.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines[:QUESTIONS]]


def ask(checkpoint: str, asked: list[str]) -> list[str]:
  """The most likely answers, cut after MAX_TOKENS."""
  model, tokenizer = load_model(checkpoint)
  template = ChatTemplate(tokenizer)
  prompts = [template.encode([{"role": "user", "content": text}]) for text in asked]
  found = generate(
    model, tokenizer, prompts, max_tokens=MAX_TOKENS, sampling=Sampling(temperature=0)
  )
  # A cut may go through a character.
  return [
    one.completion.strip().rstrip("\ufffd") + ("" if one.finish_reason == "stop" else " [...]")
    for one in found
  ]


def main(_: list[str]) -> None:
  records = questions("alpaca_en") + questions("alpaca_zh")
  # As gptjax/finetuning/conversations.py joins an instruction and what it is about.
  asked = ["\n\n".join(filter(None, (one["instruction"], one["input"]))) for one in records]
  runs = Path(FLAGS.runs) / "instructions"
  answers = {"untrained": ask(checkpoint_of(SMOLLM2), asked)}
  for method in (LORA, FULL):
    answers[method] = ask(str(runs / f"{method}-{SEEDS[0]}" / "run"), asked)
  lines = ["# Answers to instructions that nothing was trained on", ""]
  for index, question in enumerate(asked):
    lines += [f"## {' '.join(question.split())}", ""]
    for name, texts in answers.items():
      said = (f"> {line}".rstrip() for line in texts[index].splitlines())
      lines += [f"**{name}**", "", *said, ""]
  (Path(__file__).parent / "answers.md").write_text("\n".join(lines))


if __name__ == "__main__":
  flags.DEFINE_string("runs", "runs/finetune", "The folder that run.py wrote to.")
  app.run(main)
