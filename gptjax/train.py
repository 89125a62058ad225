"""The training loop.

    python -m gptjax.train --config=configs/pretrain.py:model=tiny,data=text \\
      --config.data.path=corpus/ --workdir=runs/first [--config.KEY=VALUE ...] [--dry_run]

Run again with the same --workdir, it goes on from the newest checkpoint, bit for bit. The work
directory holds config.json, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/ and loss.png.
"""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from gptjax import config as config_lib
from gptjax import optim, plot, sharding
from gptjax import step as step_lib
from gptjax.checkpoint import Checkpoints, restore_params
from gptjax.chips import flops_per_token
from gptjax.config import RunLength
from gptjax.data import pipeline
from gptjax.data.batch import Batch
from gptjax.data.pipeline import Dataset
from gptjax.data.tokenizer import declared_vocab_size
from gptjax.errors import UserError
from gptjax.evals import compression
from gptjax.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.metrics import StepLog, Sums, Writer
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import ParameterInfo, describe_parameters
from gptjax.pretrained import CHECKPOINTS
from gptjax.step import TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a config says before any data is read: the checked model, its parameters, the mesh."""

  config: Any
  model: ModelConfig
  parameters: Mapping[str, ParameterInfo]
  graph: nnx.GraphDef
  mesh: jax.sharding.Mesh


def make_plan(config: Any) -> Plan:
  """Settles the vocabulary and checks model and mesh; nothing is allocated.

  Raises:
    UserError: a value of `config.model` or `config.mesh`, or a batch that does not divide.
  """
  if not config.model.vocab_size:
    with config.unlocked():
      config.model.vocab_size = declared_vocab_size(config.tokenizer)
  model = ModelConfig.from_config(config.model)
  if model.position == "learned" and config.sequence_length > model.max_positions:
    raise UserError(
      f"sequence_length={config.sequence_length} exceeds model.max_positions="
      f"{model.max_positions}; raise the latter or choose model.position=rope."
    )
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(config.batch_size, config.sequence_length, config.grad_accumulation, mesh)
  return Plan(config, model, describe_parameters(model), step_lib.model_graph(model), mesh)


def make_optimizer(plan: Plan, length: RunLength) -> optim.Optimizer:
  config = plan.config.optim
  schedule = optim.make_schedule(
    config,
    total_steps=length.total_steps,
    warmup_steps=length.steps(config, "warmup"),
    decay_steps=length.steps(config, "decay"),
  )
  return optim.make_optimizer(config, plan.parameters, schedule)


def make_train_step(plan: Plan, optimizer: optim.Optimizer):
  return step_lib.make_train_step(
    plan.graph,
    optimizer,
    seed=plan.config.seed,
    grad_accumulation=plan.config.grad_accumulation,
    dropout=plan.model.has_dropout,
    ema_decay=plan.config.optim.ema_decay,
  )


def abstract_state(plan: Plan, optimizer: optim.Optimizer) -> TrainState:
  ema = plan.config.optim.ema_decay > 0
  return step_lib.abstract_state(plan.model, optimizer, plan.parameters, plan.mesh, ema=ema)


def train(config: Any, workdir: epath.PathLike) -> dict[str, float]:
  """Trains to `config.total_*`, resuming from `workdir` if it holds a checkpoint.

  Args:
    config: from configs/pretrain.py, or with the same keys.
    workdir: created if need be; any path that etils takes, gs:// included.

  Returns:
    The last validation: 'val/loss' (nats a token), 'val/perplexity', 'val/bits_per_byte'.

  Raises:
    UserError: something in the config, the data or the work directory cannot be used, or more
      than `config.max_skipped_steps` updates were not finite.
  """
  workdir = _make_workdir(workdir)
  plan = make_plan(config)
  lead = jax.process_index() == 0
  dataset = pipeline.open_dataset(
    config,
    workdir,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    progress=lead,
  )
  if dataset.tokenizer.vocab_size > plan.model.vocab_size:
    raise UserError(
      f"the tokenizer has {dataset.tokenizer.vocab_size} tokens, more than "
      f"model.vocab_size={plan.model.vocab_size}; set the latter to 0 to take the tokenizer's."
    )
  length = RunLength.from_config(config, dataset.steps_per_epoch)
  optimizer = make_optimizer(plan, length)
  save_every, evaluate_every, sample_every, log_every = (
    length.steps(section, "every")
    for section in (config.checkpoint, config.eval, config.sample, config.log)
  )
  train_step = make_train_step(plan, optimizer)
  eval_step = step_lib.make_eval_step(plan.graph)

  with (
    jax.set_mesh(plan.mesh),
    Checkpoints(
      workdir / CHECKPOINTS,
      keep=config.checkpoint.keep,
      keep_every_steps=config.checkpoint.keep_every_steps,
      best_metric=config.checkpoint.best_metric,
    ) as checkpoints,
  ):
    state = init_or_restore(plan, optimizer, checkpoints)
    start, total = int(state.step), length.total_steps
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
      _Preemption() as preemption,
    ):
      introduce(writer, plan, dataset, length, start, workdir)
      log = StepLog(
        writer,
        every_steps=log_every,
        tokens_per_step=length.tokens_per_step,
        flops_per_token=model_flops_per_token(plan),
      )
      validation = {}
      if start == 0 or start == total:
        validation = evaluate(eval_step, state, dataset, plan.mesh)
        writer.write(start, validation)
        writer.message(f"step {start}: {describe(validation)}")
      batches = dataset.training_batches(start)
      for step in range(start, total):
        with _profile(config.profile, step - start, workdir):
          batch = sharding.to_global(next(batches), plan.mesh)
          state, metrics = train_step(state, batch)  # dispatched, not awaited
        done = step + 1
        check_finite(log.step(done, metrics), plan, done - 1, checkpoints)
        stop = preemption.requested(done)
        if stop or done == total or due(save_every, done):
          check_finite(log.interrupt(), plan, done, checkpoints)
          checkpoints.save(done, state)  # before the evaluation, which may fail
        if stop:
          writer.message(f"stopped by a signal after step {done}; run again to go on from there")
          return validation
        if done == total or due(evaluate_every, done):
          log.interrupt()
          validation = evaluate(eval_step, state, dataset, plan.mesh)
          writer.write(done, validation)
          writer.message(f"step {done}: {describe(validation)}")
          checkpoints.record_metrics(done, validation)
        if done == total or due(sample_every, done):
          log.interrupt()
          write_samples(writer, done, plan, state, dataset)
      conclude(writer, config, dataset, validation, workdir)
  return validation


def init_or_restore(plan: Plan, optimizer: optim.Optimizer, checkpoints: Checkpoints) -> TrainState:
  """The newest whole checkpoint of this run, or another run's weights, or a fresh start."""
  abstract = abstract_state(plan, optimizer)
  restored = checkpoints.restore_latest(abstract)
  if restored is not None:
    return restored[0]
  state = step_lib.init_state(plan.model, optimizer, plan.config.seed, abstract)
  if plan.config.init_from:
    source = epath.Path(plan.config.init_from)
    loaded, report = restore_params(source / CHECKPOINTS, abstract.params)
    if report.mismatched or not report.matched:
      raise UserError(f"init_from={source} does not fit the model of this config.\n{report}")
    print(f"init_from {report}")
    state = step_lib.replace_params(state, loaded)
  return state


def evaluate(
  eval_step, state: TrainState, dataset: Dataset, mesh: jax.sharding.Mesh
) -> dict[str, float]:
  """Loss, perplexity and bits per byte of the whole validation set, exact over its tokens.

  The weights are those of the moving average, where there is one.
  """
  params = state.params if state.ema is None else state.ema
  sums = Sums()
  for batch in dataset.validation_batches():
    sums.add(eval_step(params, sharding.to_global(batch, mesh)))
  means = sums.finish(text_bytes=dataset.validation_bytes)
  return {f"val/{name}": value for name, value in means.items()}


def describe(validation: Mapping[str, float]) -> str:
  return (
    f"validation loss {validation['val/loss']:.4f}, perplexity {validation['val/perplexity']:.2f}, "
    f"bits per byte {validation['val/bits_per_byte']:.4f}"
  )


def write_samples(
  writer: Writer, step: int, plan: Plan, state: TrainState, dataset: Dataset
) -> None:
  """Continues each prompt of `config.sample`, for the terminal and TensorBoard."""
  config = plan.config.sample
  completions = generate(
    nnx.merge(plan.graph, state.params),
    dataset.tokenizer,
    list(config.prompts),
    max_tokens=config.max_tokens,
    sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
    seed=range(len(config.prompts)),
  )
  for number, completion in enumerate(completions):
    writer.write_text(step, f"sample/{number}", f"{completion.prompt}{completion.completion}")


def introduce(
  writer: Writer, plan: Plan, dataset: Dataset, length: RunLength, start: int, workdir: epath.Path
) -> None:
  """Saves and prints the config, and says what is about to happen."""
  config = plan.config
  changes = config_lib.save(config, workdir) if jax.process_index() == 0 else []
  writer.message(config_lib.to_text(config))
  writer.message(f"parameters: {count_parameters(plan):,}")
  writer.message(
    f"{dataset.num_tokens:,} training tokens, {length.tokens_per_step:,} a step; "
    f"{length.total_steps:,} steps are {length.total_steps / dataset.steps_per_epoch:.2f} epochs"
  )
  for change in changes:
    writer.message(f"changed since the last start: {change}")
  if start:
    state = "complete already" if start >= length.total_steps else "resuming"
    writer.message(f"{workdir}: {state} at step {start:,} of {length.total_steps:,}")


def conclude(writer: Writer, config: Any, dataset: Dataset, validation, workdir) -> None:
  """Draws the loss curve and prints the last line: the result, beside what it has to beat."""
  if jax.process_index() != 0:
    return
  baselines = {}
  if config.eval.baselines:
    baselines = {
      "gzip -9": compression.gzip_bits_per_byte(dataset.validation_text()),
      "byte 5-gram": compression.ngram_bits_per_byte(
        dataset.training_text(), dataset.validation_text(), order=5
      ),
    }
  writer.message(f"loss curve: {plot.loss_curve(workdir, baselines)}")
  others = "".join(f", {name} {value:.4f}" for name, value in baselines.items())
  writer.message(f"validation bits per byte: {validation['val/bits_per_byte']:.4f}{others}")


def check_finite(
  metrics: Mapping[str, Any], plan: Plan, step: int, checkpoints: Checkpoints
) -> None:
  """Stops the run when too many updates were skipped; `metrics` are those of `step`, or empty."""
  skipped = int(metrics.get("skipped", 0))
  if skipped > plan.config.max_skipped_steps:
    raise UserError(
      f"step {step}: loss or gradient is not finite, for the {skipped}th time "
      f"(max_skipped_steps={plan.config.max_skipped_steps}). The weights of the last checkpoint, "
      f"step {checkpoints.latest_step()}, are finite. The batch can be rebuilt: "
      f"open_dataset(config, workdir).training_batch({step - 1}) with seed={plan.config.seed}."
    )


def due(every: int, step: int) -> bool:
  return every > 0 and step % every == 0


def count_parameters(plan: Plan) -> int:
  return sum(math.prod(info.shape) for info in plan.parameters.values())


def model_flops_per_token(plan: Plan) -> float:
  """FLOPs of forward and backward a token, by the rule of `chips`."""
  model = plan.model
  weights = sum(
    math.prod(info.shape) for info in plan.parameters.values() if info.fan_in_axes is not None
  )
  if model.tied_head:
    weights += model.vocab_size * model.embed_dim
  return flops_per_token(
    matmul_params=weights,
    heads=model.num_heads,
    head_dim=model.head_dim,
    sequence_length=plan.config.sequence_length,
    windows=model.windows * (model.num_layers // len(model.windows)),
  )


def dry_run(config: Any) -> None:
  """Traces the step on abstract values and prints what it would take; nothing is written."""
  plan = make_plan(config)
  if "total_epochs" in config:  # Only the data could tell how long that is.
    steps, schedule = f"{config.total_epochs} epochs", optax.constant_schedule(0.0)
    optimizer = optim.make_optimizer(config.optim, plan.parameters, schedule)
  else:
    length = RunLength.from_config(config, steps_per_epoch=None)
    steps, optimizer = f"{length.total_steps:,}", make_optimizer(plan, length)
  rows = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32)
  weights = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
  with jax.set_mesh(plan.mesh):
    state = abstract_state(plan, optimizer)
    make_train_step(plan, optimizer).trace(state, Batch(rows, rows, weights, rows, rows))
  print(config_lib.to_text(config))
  print(f"parameters: {count_parameters(plan)}")
  print(f"steps: {steps}")
  print(f"tokens a step: {config.batch_size * config.sequence_length}")
  mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items())
  print(f"mesh: {mesh} ({jax.devices()[0].device_kind})")
  for name, part in (("parameters", state.params), ("optimizer", (state.opt_state, state.ema))):
    leaves = jax.tree.leaves(part)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    each = sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    print(f"memory of {name}: {total / 2**20:.1f} MiB in all, {each / 2**20:.1f} MiB a device")


def _make_workdir(workdir: epath.PathLike) -> epath.Path:
  workdir = epath.Path(workdir).expanduser()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".writable"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise UserError(
      f"--workdir={workdir}: cannot be written ({error.strerror or error})."
    ) from error
  return workdir


class _Preemption:
  """Tells whether to save and stop, after SIGTERM, SIGINT or a notice of the cluster."""

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __enter__(self) -> "_Preemption":
    self._requested = False
    self._handlers = {}
    # Only the main thread may handle signals; in another, the caller has to.
    if threading.current_thread() is threading.main_thread():
      self._handlers = {number: signal.signal(number, self._request) for number in self.SIGNALS}
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    """All hosts get the same answer for a step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._requested

  def _request(self, number: int, frame: Any) -> None:
    del frame
    if self._requested:  # A second Ctrl-C does not wait.
      raise KeyboardInterrupt
    self._requested = True


@contextlib.contextmanager
def _profile(config: Any, step: int, workdir: epath.Path) -> Iterator[None]:
  """Traces `config.steps` steps from `config.start` on, counted from the start of this process."""
  if config.steps and step == config.start:
    jax.profiler.start_trace(str(workdir / "profile"))
  yield
  if config.steps and step == config.start + config.steps - 1:
    jax.effects_barrier()
    jax.profiler.stop_trace()


FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string(
    "config", None, "FILE or FILE:ARGUMENT; override with --config.KEY=VALUE.", required=True
  )
  flags.DEFINE_string("workdir", None, "Where the run lives; run again to resume.")
  flags.DEFINE_bool("dry_run", False, "Print what the run would be and take, and exit.")


def main(overrides: Mapping[str, str]) -> None:
  config = config_lib.load(FLAGS.config, overrides)
  if FLAGS.dry_run:
    dry_run(config)
  elif not FLAGS.workdir:
    raise UserError("--workdir is missing: the directory that the run lives in.")
  else:
    train(config, FLAGS.workdir)


if __name__ == "__main__":
  _define_flags()
  config_lib.run_app(main, __doc__)
