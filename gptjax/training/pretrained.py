"""Loads a trained model: weights, tokenizer and config, from a run or another library's files.

A checkpoint is the work directory of a run, a folder of Hugging Face's files or hf:ORG/NAME, or a
GGUF file (FILE.gguf, or gguf:FILE under another name).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from etils import epath
from flax import nnx, traverse_util
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from gptjax import config as config_lib
from gptjax import tree, wings
from gptjax.data import tokenizer as tokenizers
from gptjax.data.tokenizer import Tokenizer, open_saved
from gptjax.devices import sharding
from gptjax.devices.hosts import keep_compiled_programs
from gptjax.errors import UserError
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import GPT, LABEL_HEAD, ParameterInfo, abstract_model, describe_parameters
from gptjax.training.adaptation import WHOLE, make_adaptation
from gptjax.training.checkpoints import Checkpoints, checksum, restore_params
from gptjax.training.metrics import waiting

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
# Formats of other libraries, and the wing's class that opens each (`ForeignModel`).
_FORMATS = {
  "hf:": "gptjax.interop.huggingface:HuggingFaceModel",
  "gguf:": "gptjax.gguf.model:GGUFModel",
}
# The files that tell a folder of Hugging Face's from a run's, which has a config.json too.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")


@dataclasses.dataclass(frozen=True)
class Labels:
  """The task that a head of labels was trained for, and the names of its labels."""

  task: str
  names: tuple[str, ...]


class ForeignModel(Protocol):
  """A model in another library's files, opened and checked, whose weights are not read yet.

  Attributes:
    config: its config in this package.
    parameters: {name: shape and axes} in this package.
    labels: the labels of its head; None for a language model.
    tokenizer: the spec of its tokenizer.
    for_transformers: the arguments with which `transformers` loads it by from_pretrained.
  """

  config: ModelConfig
  parameters: Mapping[str, ParameterInfo]
  labels: Labels | None
  tokenizer: str
  for_transformers: Mapping[str, Any]

  def load(self, shardings: Mapping[str, Sharding], *, progress: bool) -> dict[str, Any]:
    """Loads the parameters named in `shardings`, float32, placed accordingly."""
    ...


def number_labels(count: int) -> tuple[str, ...]:
  """The default names of labels in `transformers`."""
  return tuple(f"LABEL_{index}" for index in range(count))


def name_checkpoint(checkpoint: epath.PathLike) -> str:
  """Puts 'hf:' or 'gguf:' before a folder or a file that is one; a run's stays as it is."""
  name = str(checkpoint)
  if name.startswith(tuple(_FORMATS)):
    return name
  if name.endswith(".gguf"):
    return f"gguf:{name}"
  if name.startswith(("http:", "https:")):
    raise UserError(f"{name}: a web address; name a folder, gs://... or hf:ORG/NAME.")
  folder = epath.Path(name).expanduser()
  if not (folder / config_lib.CONFIG_FILE).exists() or (folder / CHECKPOINTS).exists():
    return name
  weights = any(file.name.endswith(_WEIGHTS) for file in folder.iterdir())
  return f"hf:{name}" if weights else name


def is_run(checkpoint: epath.PathLike) -> bool:
  """Whether a checkpoint is the work directory of a run."""
  return not name_checkpoint(checkpoint).startswith(tuple(_FORMATS))


def open_foreign(checkpoint: epath.PathLike) -> ForeignModel | None:
  """Opens the files of another library; None if the checkpoint is a run.

  Raises:
    UserError: there is no readable model.
  """
  name = name_checkpoint(checkpoint)
  for prefix, path in _FORMATS.items():
    if name.startswith(prefix):
      return wings.load(path, name)(name.removeprefix(prefix))
  return None


def load_model(
  checkpoint: epath.PathLike, *, ema: bool = False, progress: bool = True
) -> tuple[GPT, Tokenizer]:
  """Loads a model on one device, from a run its newest whole checkpoint. Adapters are merged into
  their base model where that is possible.

  Args:
    checkpoint: as `name_checkpoint` tells them apart.
    ema: take the moving average of the weights.
    progress: say on stderr that a run is being loaded; show a bar for another library's files.

  Raises:
    UserError: there is no model or no tokenizer, a run has no checkpoint yet, the weights do not
      fit the config, or the tokenizer has more tokens than the model.
  """
  keep_compiled_programs()
  if (foreign := open_foreign(checkpoint)) is None:
    return load_run(checkpoint, ema=ema, progress=progress)[:2]
  if ema:
    raise UserError(f"{checkpoint} has no moving average of its weights.")
  tokenizer = tokenizers.load(foreign.tokenizer)
  check_vocabulary(tokenizer, foreign.config, str(checkpoint))
  graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(foreign.config, nnx.Rngs(0))))
  params = foreign.load(on_one_device(foreign.parameters), progress=progress)
  return nnx.merge(graph, params), tokenizer


def load_run(
  run: epath.PathLike, *, ema: bool = False, plain: bool = False, progress: bool = True
) -> tuple[GPT, Tokenizer, int]:
  """Loads a run like `load_model`, and tells the step of its checkpoint; `plain` is float32 also
  where it is stored in few bits."""
  folder = epath.Path(run) / TOKENIZER
  with waiting(f"loading {run}", quiet=not progress):
    model, step = load_checkpoint(run, ema=ema)
  adaptation = make_adaptation(config_lib.open_saved(epath.Path(run)))
  model = adaptation.plain(model) if plain else adaptation.merge(model)
  if (tokenizer := open_saved(folder)) is None:
    raise UserError(f"{folder}: no whole tokenizer, which a run keeps there.")
  return model, tokenizer, step


def save_model(
  folder: epath.PathLike,
  model: GPT,
  tokenizer: Tokenizer,
  labels: Labels | None,
  more: Mapping[str, Any] | None = None,
) -> None:
  """Writes a model into a folder as a run at step 0, which `load_model` loads; `more` are further
  keys of its config."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  values: dict[str, Any] = {"model": dataclasses.asdict(model.config), "tokenizer": tokenizer.spec}
  values |= more or {}
  if labels:
    values["task"] = {"name": labels.task, "labels": labels.names}
  text = json.dumps(values, indent=2, sort_keys=True) + "\n"
  (folder / config_lib.CONFIG_FILE).write_text(text)
  tokenizer.save(folder / TOKENIZER)
  with Checkpoints(folder / CHECKPOINTS, keep=1) as checkpoints:
    checkpoints.save(0, {"params": nnx.to_pure_dict(nnx.state(model))})
    checkpoints.wait()


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: str) -> None:
  """Raises UserError if the tokenizer has more tokens than the model."""
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's "
      f"{config.vocab_size}."
    )


def on_one_device(parameters: Mapping[str, Any]) -> dict[str, Sharding]:
  return dict.fromkeys(parameters, SingleDeviceSharding(jax.devices()[0]))


def read_model_config(checkpoint: epath.PathLike) -> ModelConfig:
  """The model config of a checkpoint of any kind; UserError if there is none."""
  foreign = open_foreign(checkpoint)
  if foreign is not None:
    return foreign.config
  return ModelConfig.from_config(config_lib.open_saved(epath.Path(checkpoint)).model)


def labels_of(checkpoint: epath.PathLike) -> Labels | None:
  """The labels of a checkpoint's label head; None if it has none, UserError without a model."""
  foreign = open_foreign(checkpoint)
  if foreign is not None:
    return foreign.labels
  config = config_lib.open_saved(epath.Path(checkpoint))
  if not (count := ModelConfig.from_config(config.model).label_head.num_labels):
    return None
  return Labels(config.task.name, config.task.get("labels", ()) or number_labels(count))


def tokenizer_of(checkpoint: epath.PathLike) -> str:
  """The spec of a checkpoint's tokenizer; UserError if there is none."""
  if not checkpoint:
    raise UserError(
      "tokenizer='init_from' needs init_from: a run, a folder of Hugging Face's or a GGUF file."
    )
  foreign = open_foreign(checkpoint)
  return str(epath.Path(checkpoint) / TOKENIZER) if foreign is None else foreign.tokenizer


def load_params_into(
  checkpoint: epath.PathLike,
  config: ModelConfig,
  abstract: Mapping[str, Any],
  labels: Sequence[str] = (),
) -> tuple[dict[str, Any], str]:
  """Loads a checkpoint's parameters with the shardings of `abstract`, and a report on the matches.

  Args:
    checkpoint: as in `load_model`.
    config: the model to load them into.
    abstract: its parameters as `jax.ShapeDtypeStruct`s with shardings.
    labels: the names of its labels, if any. A label head in another library's files is left out if
      it has other labels or another input.

  Raises:
    UserError: the weights do not fit the model.
  """
  foreign = open_foreign(checkpoint)
  if foreign is None:
    source = epath.Path(checkpoint)
    config_of_run = config_lib.open_saved(source)
    if make_adaptation(config_of_run) is not WHOLE:
      return _load_merged(source, abstract)
    best = makes_best(config_of_run)
    loaded, report = restore_params(source / CHECKPOINTS, abstract, best=best)
    if report.mismatched or not report.matched:
      raise UserError(f"init_from={source} does not fit the model of this config.\n{report}")
    return loaded, str(report)
  if differences := config.differences(foreign.config):
    raise UserError(
      f"init_from={checkpoint} does not fit the model of this config: {'; '.join(differences)}. "
      "Choose the preset model=init_from to take the checkpoint's."
    )
  flat = traverse_util.flatten_dict(abstract, sep="/")
  if missing := set(flat) - {*foreign.parameters, *LABEL_HEAD}:
    raise UserError(f"init_from={checkpoint} lacks {min(missing)!r} of the model of this config.")
  new_head = _differences_of_heads(config, labels, foreign) if config.label_head.num_labels else []
  own = set(foreign.parameters) - set(LABEL_HEAD if new_head else ())
  shardings = {name: leaf.sharding for name, leaf in flat.items() if name in own}
  loaded = foreign.load(shardings, progress=jax.process_index() == 0)
  new = f"; the head of labels is new ({'; '.join(new_head)})" if new_head else ""
  return loaded, f"{checkpoint}: all {len(shardings)} parameters{new}"


def _differences_of_heads(
  config: ModelConfig, labels: Sequence[str], foreign: ForeignModel
) -> list[str]:
  """Reasons why the label head in another library's files does not fit a config."""
  theirs = foreign.config
  if not theirs.label_head.bias:  # A new bias is 0.
    theirs = theirs.replace({"label_head.bias": config.label_head.bias})
  differences = config.head_differences(theirs)
  if differences or not labels:
    return differences
  names = foreign.labels.names
  if names in (tuple(labels), number_labels(len(names))):
    return []
  return [f"task.labels={','.join(labels)}, not {','.join(names)}"]


def load_frozen(
  checkpoint: epath.PathLike, config: ModelConfig, abstract: Mapping[str, Any], *, head: bool = True
) -> tuple[dict[str, Any], int]:
  """The parameters of a model that is not trained, and their checksum; like `load_params_into`, but
  none is missing. The `head` of labels of a model under adapters is trained with them."""
  abstract = abstract if head else tree.without(abstract, LABEL_HEAD)
  loaded, report = load_params_into(checkpoint, config, abstract)
  if missing := set(tree.named_leaves(abstract)) - set(tree.named_leaves(loaded)):
    raise UserError(f"{checkpoint} lacks {min(missing)!r} of a frozen model.\n{report}")
  return loaded, checksum(loaded)


def check_frozen(saved: Any, found: Mapping[str, int], checkpoint: epath.PathLike) -> None:
  """Raises UserError if a run was trained beside other frozen models than those with the checksums
  `found`; `saved` is its state, or a `ParamsReport`."""
  for name, now in found.items():
    if (before := getattr(saved, name)) is None or int(before) != now:
      model = {"base_checksum": "init_from", "second_checksum": "its task"}[name]
      raise UserError(
        f"{checkpoint}: was trained beside another frozen model than {model} names now (checksum "
        f"{before}, not {now}). Give that back, or start in another --workdir."
      )


def load_checkpoint(
  workdir: epath.PathLike, *, ema: bool = False, near: int | None = None
) -> tuple[GPT, int]:
  """The model of a run and the step of its checkpoint: the newest, or the nearest to `near`.
  Adapters are put on the model of the run's `init_from`."""
  device = SingleDeviceSharding(jax.devices()[0])
  return _restore(epath.Path(workdir), lambda name: device, ema=ema, near=near)


def _restore(
  workdir: epath.Path,
  sharding_of: Callable[[str], Sharding],
  *,
  ema: bool = False,
  near: int | None = None,
) -> tuple[GPT, int]:
  """Loads like `load_checkpoint`, with the sharding `sharding_of` each parameter's name."""
  config = config_lib.open_saved(workdir)
  model_config = ModelConfig.from_config(config.model)
  adaptation = make_adaptation(config)

  def abstract(state: nnx.State) -> dict[str, Any]:
    return tree.map_named(
      lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(name)),
      nnx.to_pure_dict(state),
    )

  graph, state = nnx.split(adaptation.abstract_model(model_config))
  params, report = restore_params(
    workdir / CHECKPOINTS,
    abstract(state.filter(adaptation.kind)),
    ema=ema,
    near=near,
    best=makes_best(config),
  )
  if report.missing or report.mismatched:
    raise UserError(f"{workdir}: its checkpoint does not fit its config.\n{report}")
  frozen = None
  if not adaptation.is_whole:
    base = abstract(nnx.state(abstract_model(model_config)))
    base, found = load_frozen(config.init_from, model_config, base, head=False)
    check_frozen(report, {"base_checksum": found}, workdir)
    described = describe_parameters(model_config)
    frozen = adaptation.freeze(base, described, adaptation.trained(model_config))
  return nnx.merge(graph, params, frozen or {}), int(report.source.name)


def makes_best(config: Any) -> bool:
  """Whether the result of a run is its best checkpoint, not its newest."""
  return config.get("checkpoint", {}).get("final") == "best"


def _load_merged(source: epath.Path, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """Loads like `load_params_into`, from a run that trained adapters, merged into their base, or a
  model that is stored in few bits."""
  wanted = tree.named_leaves(abstract)
  of_adapters = next(iter(wanted.values())).sharding
  if isinstance(of_adapters, NamedSharding):
    of_adapters = sharding.replicated(of_adapters.mesh)
  model, step = _restore(
    source, lambda name: wanted[name].sharding if name in wanted else of_adapters
  )
  model = make_adaptation(config_lib.open_saved(source)).plain(model)
  plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  found = {name: x.shape for name, x in tree.named_leaves(plain).items()}
  if found != {name: leaf.shape for name, leaf in wanted.items()}:
    raise UserError(f"init_from={source} does not fit the model of this config.")
  placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), plain, abstract)
  return placed, f"{source}, step {step}: all {len(found)} parameters, as they are used"
