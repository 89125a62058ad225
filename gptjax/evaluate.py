"""Evaluates a model on your own tasks and lm-eval's, with confidence intervals.

    python -m gptjax.evaluate --checkpoint=runs/demo --tasks=perplexity:PATH --output=DIR
    python -m gptjax.evaluate --checkpoint=gguf:FILE.gguf --tasks=TASK.json --shots=4
    python -m gptjax.evaluate --checkpoint=hf:FOLDER --lm_eval=arc_easy --limit=200
    python -m gptjax.evaluate --checkpoint=runs/sentiment --tasks=labels:test.jsonl

A task is FILE.json (see gptjax/evals/task.py), FILE.jsonl with FILE.json beside it, perplexity:PATH
of text files or JSON lines, or, for a run that was fine-tuned to labels, labels:FILE.jsonl with
records like its training data. Intervals are 95 %: by the bootstrap over examples, for lm-eval by
its standard errors. `--output` keeps results.json, each prediction, and a picture of each
classification. Tasks of kind 'code' run the model's code in a sandbox, and only with --run_code; if
the sandbox is found not to hold, only with --accept_weak_isolation.
"""

from typing import Any

from absl import flags
from etils import epath

from gptjax import config as config_lib
from gptjax.devices.hosts import prepare_cpu
from gptjax.errors import UserError
from gptjax.evals.evaluate import config_of_labels, evaluate, harness_rows, save, table
from gptjax.evals.subject import Subject
from gptjax.scores.scores import RESAMPLES, need
from gptjax.training.pretrained import load_model

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string(
    "checkpoint",
    None,
    "A run, a folder of Hugging Face's, hf:ORG/NAME or FILE.gguf.",
    required=True,
  )
  flags.DEFINE_bool("ema", False, "Use the exponential moving average of the weights.")
  flags.DEFINE_list(
    "tasks", [], "FILE.json, FILE.jsonl, perplexity:PATH or labels:FILE, by commas."
  )
  flags.DEFINE_list("lm_eval", [], "Tasks of EleutherAI's lm-eval, by commas.")
  flags.DEFINE_string("lm_eval_include", "", "A folder with tasks for lm-eval (YAML).")
  flags.DEFINE_integer("shots", None, "Worked examples before each question.", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "Of shots, limit, sampling and bootstrap.", lower_bound=0)
  flags.DEFINE_integer("limit", 0, "Examples of each task; 0 is all.", lower_bound=0)
  flags.DEFINE_integer("resamples", RESAMPLES, "Of the bootstrap.", lower_bound=1)
  flags.DEFINE_bool("chat", False, "Ask by the model's chat template.")
  flags.DEFINE_integer("batch_size", 8, "Rows of a batch.", lower_bound=1)
  flags.DEFINE_integer(
    "max_length", 0, "Tokens that the model reads at a time; 0 is its max_positions.", lower_bound=0
  )
  flags.DEFINE_bool("run_code", False, "Run what the model writes, for tasks of kind 'code'.")
  flags.DEFINE_bool(
    "accept_weak_isolation", False, "Run it even where it could reach what is outside its sandbox."
  )
  flags.DEFINE_string("output", "", "A folder for results.json, predictions and pictures.")


def main(overrides) -> None:
  if overrides:
    raise UserError("gptjax.evaluate takes no --config.KEY flags; a run's config comes with it.")
  if not FLAGS.tasks and not FLAGS.lm_eval:
    raise UserError("nothing to evaluate: give --tasks=TASK.json,... or --lm_eval=TASK,...")
  if FLAGS.output:
    epath.Path(FLAGS.output).mkdir(parents=True, exist_ok=True)  # If that fails, it does so early.
  prepare_cpu()
  if FLAGS.lm_eval:
    need("lm_eval")
  model, tokenizer = load_model(FLAGS.checkpoint, ema=FLAGS.ema)
  subject = Subject(
    model,
    tokenizer,
    chat=FLAGS.chat,
    batch_size=FLAGS.batch_size,
    max_length=FLAGS.max_length or None,
    progress=True,
  )
  results = evaluate(
    subject,
    FLAGS.tasks,
    shots=FLAGS.shots or 0,
    seed=FLAGS.seed,
    limit=FLAGS.limit,
    resamples=FLAGS.resamples,
    config=config_of_labels(FLAGS.checkpoint, FLAGS.tasks),
    run_code=FLAGS.run_code,
    accept_weak_isolation=FLAGS.accept_weak_isolation,
  )
  rows = [
    (result.name, name, metric) for result in results for name, metric in result.metrics.items()
  ]
  names = ("checkpoint", "ema", "tasks", "lm_eval", "shots", "seed", "limit", "resamples", "chat")
  names += ("batch_size", "max_length", "run_code", "accept_weak_isolation")
  evaluation: dict[str, Any] = {"evaluation": {name: FLAGS[name].value for name in names}}
  if FLAGS.lm_eval:
    from gptjax.evals import harness  # Two seconds.

    found = harness.run(
      subject,
      FLAGS.lm_eval,
      include=FLAGS.lm_eval_include,
      shots=FLAGS.shots,
      seed=FLAGS.seed,
      limit=FLAGS.limit,
    )
    rows += harness_rows(found)
    evaluation["lm_eval"] = {name: found[name] for name in ("results", "n-samples", "versions")}
  for result in results:
    if result.report:
      print(f"{result.name}\n{result.report}")
  print(table(rows))
  if FLAGS.output:
    folder = epath.Path(FLAGS.output)
    save(folder, evaluation, results)
    print(f"{folder / 'results.json'} has it all.")


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
