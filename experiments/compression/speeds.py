"""Tokens a second of two checkpoints, measured in turn in one process.

    python -m experiments.compression.speeds --original=runs/demo \\
      --checkpoint=runs/recovery/trials/distilled-seed0 --data=runs/quickstart/texts/code
"""

from pathlib import Path

from absl import flags

from experiments.compression.quantize import PROMPT, ROUNDS, measure_speeds
from experiments.decoding.compare import describe_machine
from gptjax import config as config_lib
from gptjax.compression.calibration import read_rows
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS


def main(overrides: dict[str, str]) -> None:
  if overrides:
    raise UserError("this takes no --config.KEY flags.")
  machine = describe_machine()
  prepare_cpu()
  _, tokenizer = load_model(FLAGS.original, progress=False)
  prompts_RT = read_rows(FLAGS.data, tokenizer, rows=8, length=PROMPT, seed=1)
  folders = {"float32": Path(FLAGS.original), "small": Path(FLAGS.checkpoint)}
  told = measure_speeds(folders, prompts_RT)
  print(f"{machine['threads']} threads, load before {machine['load_before']}, {ROUNDS} rounds")
  for rows, (rate, ratio, least) in told["small"].items():
    base = told["float32"][rows][0]
    print(f"{rows} rows: {base:.1f} -> {rate:.1f} tokens/s, {ratio:.2f} times, least {least:.2f}")


if __name__ == "__main__":
  flags.DEFINE_string("original", None, "The model that is compared with.", required=True)
  flags.DEFINE_string("checkpoint", None, "The smaller model.", required=True)
  flags.DEFINE_string("data", None, "Text whose beginnings are continued.", required=True)
  config_lib.run_app(main, __doc__)
