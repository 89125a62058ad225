"""Puts adapters on a model, and merges them into it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx, traverse_util

from gptjax import tree
from gptjax.errors import UserError, did_you_mean
from gptjax.model.config import ModelConfig
from gptjax.model.feedforward import FeedForward
from gptjax.model.gpt import GPT, LABEL_HEAD, ParameterInfo, describe
from gptjax.model.layers import Linear, find
from gptjax.peft.config import PeftConfig
from gptjax.peft.layers import (
  AdaLoRALinear,
  AdaptedLinear,
  Adapter,
  Bottleneck,
  DoRALinear,
  HoulsbyLinear,
  IA3Linear,
  LoRALinear,
  ParallelFeedForward,
)
from gptjax.peft.quantized import QuantizedKernel, quantize_model, quantized_names
from gptjax.peft.virtual import (
  PrefixAttention,
  PromptGPT,
  add_encoded_prompt,
  add_prefix,
  add_prompt,
)

# Adapters that can be merged into the projection's own parameters.
MERGED = ("lora", "adalora", "dora", "ia3", "bitfit", "prompt", "ptuning")


def adapt(model: GPT, config: PeftConfig, rngs: nnx.Rngs) -> GPT:
  """Puts adapters on a model without changing its output, except by virtual tokens and by rounding
  to the format `config.base`.

  The model itself is changed, and must not be used afterwards. Its parameters keep their names;
  trained ones are `Adapter`s, so `nnx.split(adapted, Adapter, ...)` separates them.

  Raises:
    UserError: a rule of `config.targets` matches nothing that the method can adapt, one of
      `config.unfrozen` matches no parameter or a quantised one, or the model cannot see virtual
      tokens.
  """
  whole = _find_whole(model, config)
  quantize_model(model, config.base)
  for name in whole:
    *path, leaf = name.split("/")
    _train(find(model, path), leaf)
  match config.method:
    case "prompt":
      return add_prompt(model, config.virtual_tokens, rngs)
    case "ptuning":
      return add_encoded_prompt(model, config.virtual_tokens, rngs)
    case "prefix":
      return add_prefix(model, config.virtual_tokens, rngs)
  for name, options in find_targets(model, config).items():
    *path, leaf = name.split("/")
    if config.method == "parallel":
      path = [*path, leaf]
    parent, module = find(model, path[:-1]), find(model, path)
    rank, alpha = options.get("rank", config.rank), options.get("alpha", config.alpha)
    low_rank = {"rank": rank, "scale": config.scale(rank, alpha), "rngs": rngs}
    match config.method:
      case "bitfit":
        _train(module, leaf)
        continue
      case "lora":
        adapted = LoRALinear(module, **low_rank)
      case "adalora":
        adapted = AdaLoRALinear(module, **low_rank)
      case "dora":
        adapted = DoRALinear(module, **low_rank)
      case "ia3":
        adapted = IA3Linear(module, scale_input=options.get("scale_input", False))
      case "houlsby":
        adapted = HoulsbyLinear(module, rank=rank, rngs=rngs)
      case "parallel":
        adapted = ParallelFeedForward(module, **(low_rank | {"scale": alpha / rank}))
    setattr(parent, path[-1], adapted)
  return model


def _find_whole(model: GPT, config: PeftConfig) -> list[str]:
  """Names of the parameters that are trained beside the adapters: a label head, which is new, and
  the matches of `config.unfrozen`."""
  parameters = describe(model)
  whole = [name for name in LABEL_HEAD if name in parameters]
  for pattern in config.unfrozen:
    found = tree.match_rules(parameters, [(pattern, True), ("", False)], "peft.unfrozen")
    names = [name for name, is_found in found.items() if is_found]
    if not names:
      raise UserError(
        f"peft.unfrozen: {pattern!r} is found in the name of no parameter of the model. "
        f"{did_you_mean(pattern, parameters)}"
      )
    if rounded := set(names) & set(quantized_names(parameters, config.base)):
      raise UserError(
        f"peft.unfrozen: {min(rounded)!r} is kept in {config.base} and cannot be trained; set "
        "peft.base=float32."
      )
    whole += names
  return list(dict.fromkeys(whole))


def _train(module: nnx.Module, name: str) -> None:
  """Turns one of a module's own parameters into an `Adapter`, so that it is trained."""
  parameter = getattr(module, name)
  told = {"fan_in_axes": parameter.fan_in_axes} if hasattr(parameter, "fan_in_axes") else {}
  adapter = Adapter(parameter[...], axes=parameter.axes, role=parameter.role, **told)
  setattr(module, name, adapter)


def find_targets(model: GPT, config: PeftConfig) -> dict[str, Mapping[str, Any]]:
  """{name: options} of the parameters or networks that the rules adapt.

  Raises:
    UserError: a rule matches nothing.
  """
  kind, candidates = _candidates(model, config.method)
  named = by_name(config, describe(model)).rules
  for (pattern, _), (named_pattern, _) in zip(config.rules, named, strict=True):
    found = tree.match_rules(candidates, [(named_pattern, True), ("", False)], "peft.targets")
    if not any(found.values()):
      raise UserError(
        f"peft.targets: {pattern!r} is found in the name of no {kind} of the model. "
        f"{did_you_mean(pattern, candidates) if candidates else 'It has none.'}"
      )
  matched = tree.match_rules(candidates, [*named, ("", None)], "peft.targets")
  return {name: options for name, options in matched.items() if options is not None}


def by_name(config: PeftConfig, parameters: Mapping[str, ParameterInfo]) -> PeftConfig:
  """The config with roles of parameters replaced by their names."""
  roles = {name: info.role for name, info in parameters.items()}
  return dataclasses.replace(config, targets=tuple(tree.name_roles(config.rules, roles)))


def _candidates(model: GPT, method: str) -> tuple[str, list[str]]:
  """A word for the things that a method can adapt, and their names."""
  if method == "bitfit":
    biases = [name for name, info in describe(model).items() if info.role == "bias"]
    return "bias", [name for name in biases if name not in LABEL_HEAD]
  wanted = FeedForward if method == "parallel" else Linear
  paths = [
    "/".join(map(str, path))
    for path, module in nnx.iter_modules(model)
    # The loss uses the kernel of the output projection without calling the module; the label head
    # is trained whole.
    if isinstance(module, wanted) and path not in (("head",), ("label_head",))
  ]
  if method == "parallel":
    return "feed-forward network", paths
  return "projection", [f"{path}/kernel" for path in paths]


def _parameters(model: GPT) -> dict[str, nnx.Variable]:
  return {
    "/".join(map(str, path)): parameter
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def abstract_model(model_config: ModelConfig, config: PeftConfig | None) -> GPT:
  """The adapted model without allocating anything; without a config, the model itself."""

  def make() -> GPT:
    model = GPT(model_config, nnx.Rngs(0))
    return model if config is None else adapt(model, config, nnx.Rngs(0))

  return nnx.eval_shape(make)


def describe_adapters(model_config: ModelConfig, config: PeftConfig) -> dict[str, ParameterInfo]:
  """Name, shape and axes of every parameter that is trained; nothing is allocated."""
  return describe(abstract_model(model_config, config), Adapter)


def initial_adapters(
  model_config: ModelConfig, config: PeftConfig, base: Mapping[str, Any], seed: int
) -> dict[str, Any]:
  """The initial trained parameters, a nested dict, given the model's, `base`."""
  model = GPT(model_config, nnx.Rngs(seed))
  nnx.update(model, base)
  model = adapt(model, config, nnx.Rngs(seed))
  return nnx.to_pure_dict(nnx.state(model, Adapter))


def put_on(model: GPT, config: PeftConfig, adapters: Mapping[str, Any]) -> GPT:
  """Adapts a model like `adapt`, with the values of trained parameters, a nested dict."""
  adapted = adapt(model, config, nnx.Rngs(0))
  nnx.update(adapted, adapters)
  return adapted


def merge(model: GPT) -> GPT:
  """Merges adapters into the model: the result is a plain `GPT`, or, for a tuned prompt, a model
  with the prompt's keys and values.

  With a quantised base, adapters are merged into the dequantised kernels that they were trained
  beside; the plain model is float32 again.

  Raises:
    UserError: the adapters cannot become part of a plain model.
  """
  if isinstance(model, PromptGPT):
    graph, params = nnx.split(model)
    return model.as_prefix(*jax.jit(lambda p: nnx.merge(graph, p).keys_and_values())(params))
  for path, module in nnx.iter_modules(model):
    if isinstance(module, Bottleneck | PrefixAttention):
      raise UserError(f"{'/'.join(map(str, path))}: {type(module).__name__} is not to be merged.")
  plain = abstract_model(model.config, None)
  params = {name: x[...] for name, x in _parameters(model).items() if name in _parameters(plain)}
  for path, module in nnx.iter_modules(model):
    if isinstance(module, QuantizedKernel):
      params["/".join(map(str, path))] = module[...]
  for path, layer in _adapted_linears(model):
    params[f"{path}/kernel"], bias = layer.merged()
    if bias is not None:
      params[f"{path}/bias"] = bias
  params = {name: x.astype("float32") for name, x in params.items()}
  return nnx.merge(nnx.graphdef(plain), traverse_util.unflatten_dict(params, sep="/"))


def unmerge(model: GPT, config: PeftConfig, adapters: Mapping[str, Any]) -> GPT:
  """The inverse of `merge`, up to rounding: returns the adapted model.

  Args:
    model: changed, and must not be used afterwards.
    config: config of the adapters.
    adapters: their values, a nested dict.

  Raises:
    UserError: merging by this method loses the original parameters.
  """
  if config.method not in ("lora", "adalora", "ia3"):
    raise UserError(f"peft.method={config.method!r}: what was merged cannot be told apart again.")
  adapted = put_on(model, dataclasses.replace(config, base="float32"), adapters)
  for _, layer in _adapted_linears(adapted):
    bias = None if layer.bias is None else layer.bias[...]
    layer.kernel[...], bias = layer.unmerged(layer.kernel[...], bias)
    if bias is not None:
      layer.bias[...] = bias
  return adapted


def _adapted_linears(model: GPT) -> Iterator[tuple[str, AdaptedLinear]]:
  for path, module in nnx.iter_modules(model):
    if isinstance(module, AdaptedLinear):
      yield "/".join(map(str, path)), module
