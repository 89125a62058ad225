"""What the TPU compiler expects of a product whose weights, or inputs too, are stored in few bits.

    python -m experiments.compression.products

Compiles one projection of a 7B model for one chip of v5e in each format, and writes its part of
README.md, in a minute. Needs no accelerator, but the TPU compiler: pip install 'jax[tpu]'.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from flax import nnx
from jax.sharding import SingleDeviceSharding

from gptjax.compiler.hlo import Program
from gptjax.compiler.topology import Slice, find_slice
from gptjax.quantization.formats import Format
from gptjax.quantization.kernel import StoredKernel, prepare_for_xla, round_matrix

HERE = Path(__file__).parent
INPUTS, OUTPUTS = 4096, 11_008
TOKENS = (8, 256, 4096)
# Format of the weights, and of the inputs.
WAYS = {
  "bfloat16": (None, "none"),
  "int8": (Format("int8"), "none"),
  "int8, inputs too": (Format("int8"), "int8"),
  "float8": (Format("float8"), "none"),
  "int4, groups of 128": (Format("int4", 128), "none"),
  "nf4, groups of 64": (Format("nf4", 64), "none"),
}


def compiled_seconds(form: Format | None, activations: str, tokens: int, target: Slice) -> float:
  """The estimated time of the product of so many tokens."""

  def make():
    matrix = jnp.zeros((OUTPUTS, INPUTS))
    if form is None:
      return {"kernel": matrix.astype(jnp.bfloat16)}
    return StoredKernel(round_matrix(matrix, form), (INPUTS,), (OUTPUTS,), None, activations)

  def prepared(kernel):
    model = nnx.List([kernel])
    prepare_for_xla(model, jnp.bfloat16)
    return model[0]

  where = SingleDeviceSharding(target.devices[0])

  def place(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  abstract = nnx.eval_shape(make)
  x_MI = place(jax.ShapeDtypeStruct((tokens, INPUTS), jnp.bfloat16))
  if form is None:
    arguments = (jax.tree.map(place, abstract["kernel"]), x_MI)
    compiled = jax.jit(lambda w_OI, x_MI: x_MI @ w_OI.T).lower(*arguments).compile()
  else:
    graph, state = nnx.split(nnx.eval_shape(lambda: prepared(make())))

    def product(state, x_MI):
      return nnx.merge(graph, state).product(x_MI, 1, (None, None))

    compiled = jax.jit(product).lower(jax.tree.map(place, state), x_MI).compile()
  program, clock = Program(compiled.as_text()), target.generation.clock_hz
  memory = program.memory_cycles(target.chip.hbm_bytes_per_second / clock)
  return sum(max(cycles, memory[name]) for name, cycles in program.cycles().items()) / clock


def main(_: list[str]) -> None:
  jax.config.update("jax_platforms", "cpu")
  target = find_slice("v5e-1")
  heads = ["weights", *(f"{tokens:,} tokens, us" for tokens in TOKENS), "over bfloat16"]
  lines, base = [heads, ["---"] * len(heads)], None
  for name, (form, activations) in WAYS.items():
    seconds = np.array([compiled_seconds(form, activations, tokens, target) for tokens in TOKENS])
    base = seconds if base is None else base
    ratios = ", ".join(f"{ratio:.2f}" for ratio in seconds / base)
    lines.append([name, *(f"{1e6 * one:.0f}" for one in seconds), ratios])
  made = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
  print(made)
  readme = HERE / "README.md"
  part = re.compile(r"(?<=<!-- products -->\n).*(?=<!-- end of products -->)", re.DOTALL)
  readme.write_text(part.sub(lambda _: made, readme.read_text()))


if __name__ == "__main__":
  app.run(main)
