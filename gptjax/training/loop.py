"""The training loop: from a config and a work directory to a trained model."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from flax import nnx

from gptjax import config as config_lib
from gptjax import wings
from gptjax.config import RunLength
from gptjax.data.pipeline import Dataset
from gptjax.devices import chips, hosts, sharding
from gptjax.devices.hosts import from_all_hosts, keep_compiled_programs, prepare_cpu
from gptjax.errors import UserError
from gptjax.optim.optimizer import Optimizer
from gptjax.training import plots, validation
from gptjax.training import step as step_lib
from gptjax.training.checkpoints import Checkpoints
from gptjax.training.datasets import check_data, open_data
from gptjax.training.metrics import StepLog, Writer, read_metrics, waiting
from gptjax.training.preemption import Preemption
from gptjax.training.pretrained import CHECKPOINTS, check_frozen, load_frozen, load_params_into
from gptjax.training.resolve import resolve
from gptjax.training.setup import Setup, make_setup
from gptjax.training.step import TrainState
from gptjax.training.validation import History
from gptjax.training.workdir import make_workdir, only_trainer


def train(config: Any, workdir: epath.PathLike) -> dict[str, float]:
  """Trains to `config.total_*`, resuming from `workdir` if it holds a checkpoint.

  Args:
    config: from configs/pretrain.py, or with the same keys.
    workdir: created if necessary; any path that etils supports, gs:// included.

  Returns:
    The last validation, or the best if `checkpoint.final` is: 'val/loss' (nats a token),
    'val/perplexity' and 'val/bits_per_byte', or the metrics of the labels.

  Raises:
    UserError: something in the config, the data or the work directory cannot be used, or another
      process trains there; more than
      `config.max_skipped_steps` updates were not finite, or the last loss is not.
    Stopped: a signal asked for it; the run has saved.
  """
  prepare_cpu()
  keep_compiled_programs()
  workdir = make_workdir(workdir)
  with only_trainer(workdir):
    return _train(config, workdir)


def _train(config: Any, workdir: epath.Path) -> dict[str, float]:
  config = resolve(config)
  setup = make_setup(config)
  validation.check(config, setup.task)
  dataset = open_data(setup, workdir)
  length = RunLength.from_config(config, dataset.tokens_per_step, dataset.steps_per_epoch)
  save_every = length.steps(config, "checkpoint.every")
  evaluate_every = length.steps(config, "eval.every")
  sample_every = length.steps(config, "sample.every")
  log_every = length.steps(config, "log.every")
  observe_every = length.steps(config, "log.layers_every")
  optimizer = setup.make_optimizer(length)
  train_step = setup.make_train_step(optimizer)
  observe_step = setup.make_observe_step(optimizer)
  evaluate = validation.make_evaluate(setup, dataset)
  takes_best = config.checkpoint.final == "best"

  with (
    jax.set_mesh(setup.mesh),
    Checkpoints(
      workdir / CHECKPOINTS,
      keep=config.checkpoint.keep,
      keep_every_steps=config.checkpoint.keep_every_steps,
      best_metric=config.checkpoint.best_metric,
    ) as checkpoints,
  ):
    state, frozen = init_or_restore(setup, optimizer, checkpoints)
    start, total = int(state.step), length.total_steps
    check_data(dataset, workdir, start)
    with (
      Writer(
        workdir,
        total_steps=total,
        resume_step=start,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        run_config=config.to_dict(),
        process_index=jax.process_index(),
      ) as writer,
      Preemption() as preemption,
      hosts.without_partner(),
    ):
      introduce(writer, setup, dataset, length, start, workdir)
      log = StepLog(
        writer,
        every_steps=log_every,
        tokens_per_step=length.tokens_per_step,
        flops_per_token=setup.flops_per_token,
        first_step=start,
        first_seconds=seconds_before(workdir, start),
      )

      def validate(step: int) -> None:
        found = evaluate(state, frozen)
        writer.write(step, log.spent(step) | found)
        writer.message(f"step {step}: {validation.describe(found)}")
        history.add(step, found)
        if step > 0:
          checkpoints.record_metrics(step, found)

      history = History.read(workdir, config, start)
      history.tell(checkpoints)
      checkpoints.thin_out()
      # A run that was killed between saving and evaluating catches up here. Process 0 decides: the
      # others may have read lines of metrics.jsonl that it has dropped since.
      behind = history.last.get("step") != start
      if from_all_hosts(behind)[0] and (start in (0, total) or due(evaluate_every, start)):
        validate(start)
      batches = dataset.training_batches(start)
      exhausted = agree_to_stop(history)
      for step in range(start, total):
        if exhausted:
          writer.message(f"stopped after step {step}: {history.patience} validations, none better")
          checkpoints.save(step, state)  # Evaluations may come between checkpoints.
          history.tell(checkpoints)
          break
        with profile(config.profile, step - start, workdir) as outputs:
          batch = sharding.to_global(next(batches), setup.mesh)
          if due(observe_every, step + 1):
            log.interrupt()
            stats = jax.device_get(observe_step(state, batch, frozen))
            writer.write(step + 1, step_lib.name_layers(stats))
          with waiting("compiling the step", quiet=step > start or jax.process_index() > 0):
            state, metrics = train_step(state, batch, frozen)  # dispatched, not awaited
          outputs.append(metrics)
        done = step + 1
        check_finite(log.step(done, metrics), setup, step, checkpoints)  # of the step before
        stop, last = preemption.requested(done), done == total
        evaluates = last or due(evaluate_every, done)
        if stop or due(save_every, done) or last or (takes_best and evaluates):
          check_finite(log.interrupt(), setup, done, checkpoints)
          checkpoints.save(done, state)  # before the evaluation, which may fail
        if stop and not last:
          writer.message(f"stopped by a signal after step {done}; run again to go on from there")
          raise preemption.stopped()
        if evaluates:
          log.interrupt()
          validate(done)
          exhausted = agree_to_stop(history)
        if setup.task.writes_text and sample_every and (last or due(sample_every, done)):
          log.interrupt()
          write_samples(writer, done, setup, state, frozen, dataset)
      result = history.result
      if takes_best and history.best:
        writer.message(f"the best of the run is step {result['step']}, which is what it has made")
      conclude(writer, config, dataset, result, workdir)
  loss = result.get("val/loss", 0.0)
  if loss is None or not math.isfinite(loss):  # metrics.jsonl writes it as null.
    raise UserError(f"{workdir}: the run ended with val/loss=nan; it has learnt nothing of use.")
  return without_step(result)


def init_or_restore(
  setup: Setup, optimizer: Optimizer, checkpoints: Checkpoints
) -> tuple[TrainState, Any]:
  """The state from this run's newest whole checkpoint, another model's weights or a fresh start;
  and the frozen parameters: those under adapters, and those of the task's second model."""
  abstract = setup.abstract_state(optimizer)
  restored = checkpoints.restore_latest(abstract)
  source, base, second, checksums = setup.config.init_from, None, None, {}
  if not setup.adaptation.is_whole:
    beside = (source, setup.model, setup.abstract_base())
    base, checksums["base_checksum"] = load_frozen(*beside, head=False)
  if setup.second is not None:
    beside = (setup.task.second_model, setup.second, setup.abstract_second())
    second, checksums["second_checksum"] = load_frozen(*beside)
  if restored is not None:
    check_frozen(restored[0], checksums, checkpoints.directory)
    return restored[0], setup.frozen(base, second)
  state = step_lib.init_state(
    setup.model, optimizer, setup.config.seed, abstract, setup.adaptation, base, checksums
  )
  if setup.adaptation.is_whole and source:
    labels = setup.config.task.get("labels", ())
    loaded, report = load_params_into(source, setup.model, abstract.params, labels)
    if jax.process_index() == 0:
      print(f"init_from {report}")
    state = step_lib.replace_params(state, loaded)
  setup.adaptation.check_start(state.params, setup.parameters)
  return state, setup.frozen(base, second)


def without_step(line: Mapping[str, Any]) -> dict[str, float]:
  """The metrics of a validation, without its step."""
  return {name: value for name, value in line.items() if name.startswith("val/")}


def seconds_before(workdir: epath.Path, start: int) -> float | None:
  """Training seconds before step `start` of a resumed run; None if they are not known."""
  if start == 0:
    return 0.0
  # On an object store, dropped steps remain until the next upload.
  lines = [line for line in read_metrics(workdir) if line["step"] <= start]
  known = [line["seconds"] for line in lines if line.get("seconds") is not None]
  return known[-1] if known else None


def write_samples(
  writer: Writer, step: int, setup: Setup, state: TrainState, frozen: Any, dataset: Dataset
) -> None:
  """Continues each prompt of `config.sample`, for the terminal and TensorBoard."""
  continue_prompts = wings.load(
    "gptjax.inference.generate:continue_prompts", "sample.every_steps (0 is never)"
  )
  model = nnx.merge(setup.graph, state.params, frozen or {})
  if setup.adaptation.is_whole:  # Adapters stay beside their base, which merging would copy.
    model = setup.adaptation.merge(model)
  model.second = None  # It writes alone.
  for number, text in enumerate(continue_prompts(model, dataset.tokenizer, setup.config.sample)):
    writer.write_text(step, f"sample/{number}", text)


def introduce(
  writer: Writer, setup: Setup, dataset: Dataset, length: RunLength, start: int, workdir: epath.Path
) -> None:
  """Saves and prints the config, and a summary of the run that starts.

  The config of a completed run stays unchanged.
  """
  config, complete = setup.config, 0 < length.total_steps <= start
  changes = config_lib.changes(config, workdir)
  if jax.process_index() == 0 and not (complete and changes):
    config_lib.save(config, workdir)
  writer.message(config_lib.to_text(config))
  whole = setup.num_trained == setup.num_parameters
  trained = "" if whole else f", of which {setup.num_trained:,} are trained"
  writer.message(f"parameters: {setup.num_parameters:,}{trained}")
  examples = f" of {config.batch_size} examples" if setup.task.packs_batches else ""
  writer.message(
    f"{dataset.num_tokens:,} training tokens, {length.tokens_per_step:,} a step{examples}; "
    f"{length.total_steps:,} steps are {length.total_steps / dataset.steps_per_epoch:.2f} epochs"
  )
  kind = jax.devices()[0].device_kind
  chip = chips.find_chip(kind)
  peak = f"{chip.name}, {chip.peak_flops / 1e12:.0f} TFLOP/s" if chip else f"unknown chip {kind!r}"
  writer.message(f"mfu counts {setup.flop_rule}, against the peak of each device: {peak}")
  with contextlib.suppress(UserError):  # Without that wing, nothing is exported at all.
    unwritable = wings.load("gptjax.interop.convert:unwritable", "a warning")
    if reason := unwritable(setup.model, setup.task.name):
      writer.message(f"`gptjax convert --format=hf` will not be able to write this: {reason}")
  for change in changes:
    when = "not as it was run, and without effect" if complete else "changed since the last start"
    writer.message(f"{when}: {change}")
  if start:
    state = "complete already" if complete else "resuming"
    writer.message(f"{workdir}: {state} at step {start:,} of {length.total_steps:,}")


def conclude(
  writer: Writer, config: Any, dataset: Dataset, result: Mapping[str, float], workdir: epath.Path
) -> None:
  """Draws the loss curve and prints the result as the last line, beside its baselines."""
  if jax.process_index() != 0:
    return
  others = {}
  if config.eval.baselines and "val/bits_per_byte" in result:
    baselines = wings.load("gptjax.scores.baselines:bits_per_byte", "eval.baselines=true")
    others = baselines(dataset.training_text(), [*dataset.validation_text()])
  writer.upload()  # The picture is drawn of what is there.
  writer.message(f"loss curve: {plots.loss_curve(workdir, others)}")
  if "val/bits_per_byte" in result:
    beside = "".join(f", {name} {value:.4f}" for name, value in others.items())
    writer.message(f"validation bits per byte: {result['val/bits_per_byte']:.4f}{beside}")
  else:
    writer.message(validation.describe(result))


def check_finite(
  metrics: Mapping[str, Any], setup: Setup, step: int, checkpoints: Checkpoints
) -> None:
  """Stops the run when too many updates were skipped; `metrics` of `step` may be empty."""
  skipped = int(metrics.get("skipped", 0))
  if skipped > setup.config.max_skipped_steps:
    raise UserError(
      f"step {step}: loss or gradient is not finite, for the {skipped}th time "
      f"(max_skipped_steps={setup.config.max_skipped_steps}). Checkpoints of finite weights, by "
      f"step: {checkpoints.steps() or 'none yet'}. The batch can be rebuilt: "
      f"gptjax.training.datasets.open_dataset(config, workdir).training_batch({step - 1}), with "
      f"seed={setup.config.seed}."
    )


def agree_to_stop(history: History) -> bool:
  """Whether process 0 has run out of patience. It waits for all hosts, so ask only after a
  validation."""
  return bool(history.patience) and from_all_hosts(history.exhausted)[0]


def due(every: int, step: int) -> bool:
  return every > 0 and step % every == 0


@contextlib.contextmanager
def profile(config: Any, step: int, workdir: epath.Path) -> Iterator[list[Any]]:
  """Traces `config.steps` steps from `config.start` on, counted from the start of this process.

  Yields a list for what a step returns: the trace ends when the last step has, and not when it has
  been dispatched.
  """
  outputs = []
  if config.steps and step == config.start:
    jax.profiler.start_trace(str(workdir / "profile"))
  yield outputs
  if config.steps and step == config.start + config.steps - 1:
    jax.block_until_ready(outputs)
    jax.profiler.stop_trace()
