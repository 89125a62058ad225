"""Models written as GGUF files, read back here, by the library `gguf`, and run by others."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Type

from gptjax import convert as convert_command
from gptjax import tree
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.gguf.families import FAMILIES
from gptjax.gguf.model import GGUFModel
from gptjax.gguf.writer import Writer
from gptjax.interop import convert as convert_lib
from gptjax.interop.convert import convert
from gptjax.interop.verify import verify
from gptjax.model.gpt import model_graph
from gptjax.training.pretrained import load_model
from tests.data.conftest import DOCUMENTS
from tests.data.test_tokenizer_formats import TEXTS
from tests.gguf.test_model import llama3_factors
from tests.interop.conftest import LLAMA, VOCAB_SIZE, save_folder
from tests.interop.test_convert import Flags

SHAPE = {"vocab_size": VOCAB_SIZE, "embed_dim": 64, "mlp_dim": 96}
LLAMA3 = {"rope.scaling": "llama3", "rope.factor": 8.0, "rope.original_positions": 8192}
YARN = {"rope.scaling": "yarn", "rope.factor": 4.0, "rope.original_positions": 8}
MODELS = {
  "gpt2": ("gpt2", {}),
  "gpt2 with an own head": ("gpt2", {"head.tied": False}),
  "gpt2 with grouped keys": ("gpt2", {"num_kv_heads": 2}),
  "llama": ("llama", LLAMA),
  "tied llama": ("llama", LLAMA | {"head.tied": True}),
  "llama 3.1": ("llama", LLAMA | LLAMA3 | {"head_dim": 64, "rope.base": 500_000.0}),
  "llama, positions divided": ("llama", LLAMA | {"rope.scaling": "linear", "rope.factor": 2}),
  "qwen2": ("qwen2", LLAMA | {"attention.qkv_bias": True}),
  "qwen3": ("qwen3", LLAMA | {"attention.qk_norm": True, "head_dim": 32, "norm.eps": 1e-6}),
  "qwen3, yarn": ("qwen3", LLAMA | {"attention.qk_norm": True} | YARN),
}


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(f"bpe:{VOCAB_SIZE - 3}", DOCUMENTS)


@pytest.fixture(scope="module")
def make(tiny_config, random_params):
  """Returns a function that makes a model, whose vocabulary has 3 ids more than the tokenizer."""

  def make(**changes):
    config = tiny_config(**SHAPE | changes)
    return nnx.merge(model_graph(config), random_params(config))

  return make


def named_params(model):
  return tree.named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def written(path):
  """The tensors of a file by name, as `gguf` reads them."""
  return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def floats(tensor):
  return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("name", MODELS)
def test_every_bit_and_every_token_come_back(make, tokenizer, tmp_path, name):
  architecture, changes = MODELS[name]
  model, path = make(**changes), tmp_path / "model.gguf"
  Writer(path, model.config).write(model, tokenizer)
  assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
  loaded, again = load_model(path)
  assert gguf.GGUFReader(path).fields["general.architecture"].contents() == architecture
  assert loaded.config.differences(model.config) == []
  expected, found = named_params(model), named_params(loaded)
  assert found.keys() == expected.keys()
  for parameter, x in expected.items():
    np.testing.assert_array_equal(found[parameter], x, err_msg=parameter)
  for text in TEXTS:
    assert again.encode(text) == tokenizer.encode(text), text
    assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
  assert again.stops == tokenizer.stops


def test_factors_of_llama_3_are_those_of_its_published_code(make, tokenizer, tmp_path):
  model = make(**MODELS["llama 3.1"][1])
  Writer(tmp_path / "model.gguf", model.config).write(model, tokenizer)
  factors = floats(written(tmp_path / "model.gguf")["rope_freqs.weight"])
  np.testing.assert_allclose(factors, llama3_factors(64, 500_000.0, 8, 8192), rtol=1e-6)


# The largest error of a rounded value: of the value, or of the largest of its 32 neighbours. The
# scale of Q4_0 goes to -8 on one side and to 7 on the other; scales are float16.
ERRORS = {
  Type.F16: lambda x, largest: 2**-11 * abs(x) + 2**-25,
  Type.BF16: lambda x, largest: 2**-8 * abs(x),
  Type.Q8_0: lambda x, largest: (1 / 127 / 2 + 2**-10) * largest,
  Type.Q4_0: lambda x, largest: (1 / 8 + 2**-10) * largest,
}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", "q4_0"])
def test_matrices_alone_are_rounded(make, tokenizer, load_params, tmp_path, name, dtype):
  model = make(**MODELS[name][1])
  kind = {"float16": Type.F16, "bfloat16": Type.BF16}.get(dtype) or Type[dtype.upper()]
  tensors = {}
  for to in ("float32", dtype):
    Writer(tmp_path / f"{to}.gguf", model.config, to).write(model, tokenizer)
    tensors[to] = written(tmp_path / f"{to}.gguf")
  assert [*tensors["float32"]] == [*tensors[dtype]]
  logits = "token_embd.weight" if model.config.head.tied else "output.weight"
  for tensor, original in tensors["float32"].items():
    stored, exact = tensors[dtype][tensor], floats(original)
    wanted = Type.F32 if exact.ndim == 1 or tensor == "position_embd.weight" else kind
    wanted = Type.Q8_0 if dtype == "q4_0" and tensor == logits else wanted
    assert stored.tensor_type is wanted, tensor
    rounded = gguf.quants.dequantize(gguf.quants.quantize(exact, wanted), wanted)
    np.testing.assert_array_equal(floats(stored), rounded, err_msg=tensor)
    if wanted in ERRORS:
      largest = abs(exact).reshape(-1, 32).max(1).repeat(32).reshape(exact.shape)
      assert (abs(rounded - exact) <= ERRORS[wanted](exact, largest)).all(), tensor
      assert (rounded != exact).any(), tensor
  # What is loaded is what the file says, in our order and shape.
  loaded = tree.named_leaves(load_params(GGUFModel(tmp_path / f"{dtype}.gguf")))
  query = floats(
    tensors[dtype]["blk.1.attn_qkv.weight" if name == "gpt2" else "blk.1.attn_q.weight"]
  )
  assert {*np.unique(loaded["blocks/attention/query/kernel"][1])} <= {*np.unique(query)}


def test_rows_without_whole_blocks_are_float16_with_a_warning(make, tokenizer, tmp_path, caplog):
  model = make(embed_dim=48)  # Of the matrices, only rows of `mlp_dim` are whole blocks.
  Writer(tmp_path / "model.gguf", model.config, "q4_0").write(model, tokenizer)
  tensors = written(tmp_path / "model.gguf")
  assert tensors["blk.0.ffn_down.weight"].tensor_type is Type.Q4_0
  odd = [name for name, tensor in tensors.items() if tensor.tensor_type is Type.F16]
  assert {name.rpartition("blk.")[2][2:] for name in odd if "blk" in name} == {
    *("attn_qkv.weight", "attn_output.weight", "ffn_up.weight")
  }
  (warning,) = [record.getMessage() for record in caplog.records if record.name == "absl"]
  assert "float16 in the place of q4_0" in warning
  assert all(f"{name} (48)" in warning for name in odd)
  assert "ffn_down" not in warning
  load_model(tmp_path / "model.gguf")


EXPERTS = {"experts.count": 4, "experts.per_token": 2}
CANNOT = [
  ({"bias": False}, "nearest, 'llama', lacks model.position.kind='learned', not 'rope'"),
  ({"mlp.activation": "gelu"}, "'gpt2', lacks model.mlp.activation='gelu', not 'gelu_tanh'"),
  ({"head_dim": 32}, "model.head_dim=32, not 16"),
  ({"residual.values": True}, "model.residual.values=True, not False"),
  (
    {"transfer.parametrization": "mup", "transfer.base_embed_dim": 16},
    "model.transfer.parametrization='mup'",
  ),
  ({"visibility": "bidirectional"}, "model.visibility='bidirectional', not 'causal'"),
  ({"label_head.num_labels": 2}, "label_head.num_labels=2: files for llama.cpp hold language mod"),
  (LLAMA | EXPERTS, "'llama', lacks model.experts.count=4, not 0"),
  (
    LLAMA | {"layer_pattern": ("full", "local"), "window": 4},
    "model.layer_pattern=('full', 'local",
  ),
  (LLAMA | {"rope.dim": 8}, "model.rope.dim=8, not 16"),
  (LLAMA | LLAMA3 | {"rope.low_freq_factor": 2.0}, "model.rope.low_freq_factor=2.0"),
  # So narrow a head has no frequency that is divided by 8.
  (LLAMA | LLAMA3 | {"head_dim": 4}, "model.rope.factor=8.0, not 1.0"),
  (LLAMA | LLAMA3 | {"rope.original_positions": 16}, "model.rope.original_positions=16, not 8192"),
  (LLAMA | LLAMA3 | {"attention.qk_norm": True}, "'llama', lacks model.attention.qk_norm=True"),
  (LLAMA | YARN | {"rope.truncate": False}, "model.rope.truncate=False, not True"),
]


@pytest.mark.parametrize(("changes", "reason"), CANNOT, ids=[reason[:40] for _, reason in CANNOT])
def test_what_no_architecture_can_be_is_told_in_a_sentence(tiny_config, tmp_path, changes, reason):
  with pytest.raises(UserError) as error:
    Writer(tmp_path / "model.gguf", tiny_config(**SHAPE | changes))
  assert reason in str(error.value)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_factors_of_frequencies_are_of_llama_alone(tiny_config):
  # llama.cpp refuses a file with a tensor that its architecture has not.
  config = tiny_config(**SHAPE | LLAMA | LLAMA3 | {"attention.qk_norm": True})
  assert "model.rope.scaling='llama3', not 'none'" in FAMILIES["qwen3"].lacks(config)


def test_a_file_has_a_name_and_a_dtype_of_its_own(tiny_config, tmp_path):
  config = tiny_config(**SHAPE)
  (tmp_path / "there.gguf").write_text("mine")
  for name, dtype, message in (
    ("model", "float32", r"--to=.*model: the name of a file for llama\.cpp ends in \.gguf"),
    ("there.gguf", "float32", r"there\.gguf is there already; nothing is overwritten"),
    ("model.gguf", "q8_1", "--dtype: no choice 'q8_1'. Did you mean 'q8_0'"),
  ):
    with pytest.raises(UserError, match=message):
      Writer(tmp_path / name, config, dtype)
  assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
  assert (tmp_path / "there.gguf").read_text() == "mine"


def no_room(self, tensor):
  if len(self.tensors[0]) < 9:
    raise OSError(28, "No space left on device")
  write_tensor_data(self, tensor)


write_tensor_data = gguf.GGUFWriter.write_tensor_data


def test_a_failure_to_write_leaves_nothing_behind(make, tokenizer, tmp_path, monkeypatch):
  model = make()
  monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", no_room)
  with pytest.raises(UserError, match=r"--to=.*model\.gguf: cannot be written \(.*No space left"):
    Writer(tmp_path / "model.gguf", model.config).write(model, tokenizer)
  assert not list(tmp_path.iterdir())
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UserError, match="cannot be written"):
    Writer(tmp_path / "file" / "model.gguf", model.config).write(model, tokenizer)
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
  ("value", "dtype", "kind"),
  [
    (np.nan, "float32", "F32"),
    (1e6, "float16", "F16"),
    (1e8, "q8_0", "Q8_0"),
    (np.nan, "q4_0", "Q4_0"),
  ],
)
def test_a_value_that_a_type_cannot_hold_is_refused(make, tokenizer, tmp_path, value, dtype, kind):
  model = make()
  kernel = model.blocks.mlp.up.kernel
  kernel[...] = jnp.asarray(kernel[...]).at[1, 0, 0].set(value)
  message = rf"--dtype={dtype}: tensor 'blk\.1\.ffn_up\.weight' has a value .* not finite in {kind}"
  with pytest.raises(UserError, match=message):
    Writer(tmp_path / "model.gguf", model.config, dtype).write(model, tokenizer)
  assert not list(tmp_path.iterdir())


# --- Through the command -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tiny_config, random_params, tmp_path_factory):
  """A folder of a small Llama's files."""
  config = tiny_config(**SHAPE | LLAMA)
  return save_folder(tmp_path_factory.mktemp("source") / "model", config, random_params(config))


@pytest.fixture
def command(monkeypatch):
  """Returns a function that runs the program with flags."""

  def call(source, target, **changes):
    values = {"from": str(source), "to": str(target), "format": "gguf", "family": None}
    values |= {"dtype": "float32", "verify": False, "adapter": None} | changes
    monkeypatch.setattr(convert_command, "FLAGS", Flags(**values))
    return convert_command.main({})

  return call


def test_the_command_tells_what_it_wrote(command, source, tmp_path, capsys):
  assert command(source, tmp_path / "model.gguf", dtype="q8_0") == 0
  model, _ = load_model(f"hf:{source}")
  count = sum(x.size for x in named_params(model).values())
  line = f"{tmp_path / 'model.gguf'}: {count:,} parameters, {VOCAB_SIZE} tokens\n"
  assert capsys.readouterr().out == line
  assert written(tmp_path / "model.gguf")["output.weight"].tensor_type is Type.Q8_0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"format": "hf", "dtype": "q8_0"}, "--dtype=q8_0 is of --format=gguf"),
    ({"format": "gptjax", "dtype": "q8_0"}, "--dtype is of --format=hf and gguf"),
    ({"family": "llama"}, "--family is of --format=hf"),
  ],
)
def test_flags_of_the_other_format_are_refused(command, source, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    command(source, tmp_path / "model.gguf", **changes)


def test_what_cannot_be_written_is_not_loaded(tiny_config, random_params, tmp_path, monkeypatch):
  config = tiny_config(**SHAPE | {"mlp.activation": "gelu"})
  folder = save_folder(tmp_path / "model", config, random_params(config))
  monkeypatch.setattr(convert_lib, "load_model", None)
  with pytest.raises(UserError, match=r"'gpt2', lacks model\.mlp\.activation='gelu'"):
    convert(f"hf:{folder}", tmp_path / "model.gguf", to="gguf")
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- In other programs -------------------------------------------------------------------------


# Sizes that `transformers` does not read from a file are its defaults.
DEFAULTS = {
  **{"gpt2": {"mlp_dim": 256, "position.max_positions": 1024}, "qwen3": {"head_dim": 128}},
  **{"llama": {}, "qwen2": {}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_transformers_computes_the_same_from_the_file(make, tokenizer, tmp_path, name):
  model = make(**MODELS[name][1] | DEFAULTS[name])
  Writer(tmp_path / "model.gguf", model.config).write(model, tokenizer)
  opened = GGUFModel(tmp_path / "model.gguf")
  for agreement in verify(model, opened, tokenizer.encode).values():
    assert agreement.largest_difference <= 1e-4 * agreement.scale
