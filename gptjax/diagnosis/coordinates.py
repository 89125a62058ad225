"""The coordinate check: do activations keep their size when the model is made wider?

Yang et al. 2022 (arXiv:2203.03466), appendix D.1: train models of several widths for a few steps
and measure the size of the coordinates of every activation and of their change since the start. In
a parametrization whose learning rate transfers, the changes do not depend on width; if they grow, a
wider model needs a smaller learning rate, and if they shrink, a layer no longer learns. The logits
themselves, random sums at the start, shrink with the root of the width under muP until their change
outgrows them.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from gptjax import config as config_lib
from gptjax.data.batch import Batch
from gptjax.data.pipeline import Dataset
from gptjax.devices import sharding
from gptjax.errors import UserError
from gptjax.model.stats import ActivationStats, root_mean_square
from gptjax.training import step as step_lib
from gptjax.training.resolve import resolve
from gptjax.training.setup import Setup, make_setup

# The branches and the residual stream of each layer, the final hidden state, the logits.
QUANTITIES = ("attention", "mlp", "residual", "hidden", "logits")
# Slopes of at most this count as flat, since there are few widths and seeds.
FLAT = 0.15


def widen(config: Any, width: int) -> Any:
  """A copy of the config whose model is `width` wide, with heads of the same width.

  Raises:
    UserError: a number of heads or the width of the feed-forward network would not be whole.
  """
  model = config.model
  changes = {"embed_dim": width}
  for key in ("num_heads", "num_kv_heads", "mlp_dim"):
    changes[key], rest = divmod(model[key] * width, model.embed_dim)
    if rest:
      raise UserError(
        f"--widths: {width} is {width / model.embed_dim:g} times model.embed_dim="
        f"{model.embed_dim}, and as many times model.{key}={model[key]} is not a whole number."
      )
  config = copy.deepcopy(config)
  for key, value in changes.items():
    config_lib.override(config, f"model.{key}", value)
  return config


def measure(config: Any, dataset: Dataset, steps: int, seeds: int) -> dict[str, np.ndarray]:
  """Trains `seeds` models for `steps` steps on the first batches, at a constant learning rate.

  Returns:
    {quantity: [seeds, steps + 1, 2, L]}: root mean square on the first micro-batch, of the
    activation and of its difference from step 0. L is 1 for a quantity outside layers.
  """
  setup = make_setup(resolve(config))
  setup.require_whole_model()
  optimizer = dataclasses.replace(
    setup.make_optimizer(None), learning_rate=lambda _: jnp.float32(config.optim.learning_rate)
  )
  train_step, look = setup.make_train_step(optimizer), _make_look(setup)
  batches = [dataset.training_batch(step) for step in range(steps)]
  rows = config.batch_size // config.grad_accumulation
  runs = []
  with jax.set_mesh(setup.mesh):
    abstract = setup.abstract_state(optimizer)
    batch = sharding.to_global(jax.tree.map(lambda x: x[:rows], batches[0]), setup.mesh)
    for seed in range(config.seed, config.seed + seeds):
      state = step_lib.init_state(setup.model, optimizer, seed, abstract)
      initial = jax.tree.map(jnp.copy, state.params)  # the step donates the state's own
      seen = [jax.device_get(look(initial, initial, batch))]
      for one in batches:
        state, _ = train_step(state, sharding.to_global(one, setup.mesh))
        seen.append(jax.device_get(look(initial, state.params, batch)))
      runs.append(jax.tree.map(lambda *steps: np.stack(steps), *seen))
  return jax.tree.map(lambda *runs: np.stack(runs), *runs)


def _make_look(setup: Setup) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
  """jit(initial, params, batch) -> {quantity: [2, L]}, of `params` and of their difference."""

  def activations(params, batch: Batch) -> dict[str, jax.Array]:
    model, found = nnx.merge(setup.graph, params), ActivationStats(whole=True)
    x_BTD, _ = model.hidden(
      batch.inputs,
      positions_BT=batch.positions,
      segment_ids_BT=batch.segment_ids,
      stats=found,
    )
    found["hidden"] = x_BTD[None]
    found["logits"] = model.logits(x_BTD)[None]
    return {name: found[name].astype(jnp.float32) for name in QUANTITIES}

  def look(initial, params, batch: Batch):
    batch = sharding.balance_time(batch)
    before, now = activations(initial, batch), activations(params, batch)
    size = jax.vmap(root_mean_square)
    return {
      name: jnp.stack([size(now[name]), size(now[name] - before[name])]) for name in QUANTITIES
    }

  return jax.jit(look)


def slope(widths: Sequence[int], values: np.ndarray) -> float:
  """d log(value) / d log(width), by least squares."""
  return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def verdict(slope: float) -> str:
  if not math.isfinite(slope):
    return "zero, or not finite"
  return "flat" if abs(slope) <= FLAT else "grows" if slope > 0 else "shrinks"


def check(
  config: Any,
  dataset: Dataset,
  workdir: epath.Path,
  *,
  widths: Sequence[int],
  steps: int,
  seeds: int,
) -> dict[str, float]:
  """Measures each width, writes coordinates.csv and .png, prints the slopes at the last step.

  Returns:
    {'logits' or 'change of logits', and so on: slope} of geometric means over layers and seeds.

  Raises:
    UserError: fewer than two widths, no step, no seed, or a width that does not scale the model.
  """
  widths = sorted(set(widths))
  if len(widths) < 2 or min(*widths, steps, seeds) < 1:
    raise UserError(
      "coordinates needs two different --widths or more, and at least 1 of --steps and --seeds."
    )
  configs = [widen(config, width) for width in widths]
  lines, means = ["width,quantity,seed,step,layer,rms,change"], {}
  for wide, width in zip(configs, widths, strict=True):
    for name, found in measure(wide, dataset, steps, seeds).items():
      lines += [
        f"{width},{name},{config.seed + seed},{step},{layer},{rms},{change}"
        for seed, step, layer in np.ndindex(seeds, steps + 1, found.shape[-1])
        for rms, change in [found[seed, step, :, layer]]
      ]
      with np.errstate(divide="ignore"):  # nothing has changed at step 0
        mean = np.exp(np.log(found).mean((0, 3)))
      for kind, of_steps in zip((name, f"change of {name}"), mean.T, strict=True):
        means.setdefault(kind, []).append(of_steps)
    print(f"trained embed_dim={width}")
  (workdir / "coordinates.csv").write_text("\n".join(lines) + "\n")
  means = {name: np.stack(of_widths, axis=1) for name, of_widths in means.items()}
  title = (
    f"{config.model.transfer.parametrization}, {config.optim.name}, "
    f"learning rate {config.optim.learning_rate:g}"
  )
  _draw(widths, means, title, workdir / "coordinates.png")
  slopes = {name: slope(widths, values[-1]) for name, values in means.items()}
  print(f"{title}: d log(rms) / d log(width) after {steps} steps, flat within {FLAT}")
  for name, value in slopes.items():
    print(f"  {name:<20} {value:+.2f}  {verdict(value)}")
  print(f"wrote {workdir / 'coordinates.csv'} and {workdir / 'coordinates.png'}")
  return slopes


def _draw(widths, means: dict[str, np.ndarray], title: str, path: epath.Path) -> None:
  from matplotlib.figure import Figure  # it takes a second to import

  figure = Figure(figsize=(15, 6), layout="constrained")
  panels = figure.subplots(2, len(QUANTITIES), sharex=True).T.flat
  for axes, (name, values) in zip(panels, means.items(), strict=True):
    for step, of_widths in enumerate(values):
      if of_widths.all():
        grey = f"{0.8 * (1 - step / (len(values) - 1)):.2f}"
        axes.loglog(widths, of_widths, "o-", color=grey, label=f"step {step}")
    axes.set(title=name, xlabel="width", ylabel="root mean square")
    axes.set_xticks(widths, map(str, widths))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    # At least two decades, so that flat lines look flat.
    low, high = axes.get_ylim()
    wider = max(10 / math.sqrt(high / low), 1)
    axes.set_ylim(low / wider, high * wider)
  figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
  figure.suptitle(title)
  with path.open("wb") as file:
    figure.savefig(file, dpi=120)
