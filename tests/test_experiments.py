"""Every sweep of experiments/ can be started: all its configs are checked, none is run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import datasets
from experiments.bad_inputs import run as bad_inputs
from experiments.bad_inputs.files import DAMAGES
from experiments.compression import products
from experiments.decoding import compare, load, models, readme, speculation
from experiments.decoding.gptjax_engine import Engine as DecodingEngine
from experiments.finetune import run as finetune
from experiments.finetune import tasks
from experiments.gpu import parts as gpu_parts
from experiments.gpu import run as gpu
from gptjax import config as config_lib
from gptjax.compiler.topology import find_slice
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import UserError
from gptjax.inference import form
from gptjax.model.gpt import model_graph
from gptjax.sweeps import definition, study
from gptjax.training.pretrained import Labels, save_model

ROOT = Path(__file__).parents[1]
SWEEPS = [
  path
  for path in sorted(ROOT.glob("experiments/*/*.py"))
  if "\ndef sweep(" in path.read_text() or "\ndef search(" in path.read_text()
]


@pytest.mark.parametrize(
  "path",
  [
    pytest.param(path, marks=[] if path.parent.name == "learning_efficiency" else pytest.mark.slow)
    for path in SWEEPS
  ],
  ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_sweep_can_be_started(path, monkeypatch, tmp_path, tiny_config, random_params):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(datasets, "fetch", lambda name: tmp_path)
  for name in ("train", "validation"):
    labelled = [{"text": label, "label": label} for label in ("negative", "positive")]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, labelled)))
  # The runs that some of them start from.
  config = tiny_config(vocab_size=260, **{"position.max_positions": 256})
  model = nnx.merge(model_graph(config), random_params(config))
  for run in ("runs/demo", "runs/demo-shrunk"):
    save_model(run, model, tokenizers.load("bytes"), None)
  config = tiny_config(vocab_size=260, visibility="bidirectional", **{"label_head.num_labels": 2})
  model = nnx.merge(model_graph(config), random_params(config))
  labels = Labels("classification", ("negative", "positive"))
  save_model("runs/soups/0", model, tokenizers.load("bytes"), labels)
  sweep = definition.load(str(path), {}, study.sample_trial)
  assert len(sweep.trials) >= 2
  assert sweep.question.startswith(path.read_text().split('"""')[1][:40])
  assert (path.parent / "README.md").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler (libtpu)")
def test_the_tpu_compiler_expects_products_in_few_bits_to_be_faster_for_few_tokens():
  target = find_slice("v5e-1")
  seconds = [products.compiled_seconds(*way, 8, target) for way in products.WAYS.values()]
  ratios = dict(zip(products.WAYS, np.array(seconds) / seconds[0], strict=True))
  assert ratios["int8"] < 0.6
  assert ratios["int8, inputs too"] < 0.6
  assert ratios["int4, groups of 128"] < 0.45
  assert ratios["nf4, groups of 64"] < 1.1


def test_there_are_sweeps():
  assert len(SWEEPS) >= 3


def test_an_unknown_data_set_is_answered_with_the_nearest():
  with pytest.raises(UserError, match=r"no data set 'pros'\. Did you mean 'prose'\?"):
    datasets.fetch("pros")


FINETUNING = [(name, method) for name, task in tasks.TASKS.items() for method in task.methods]


@pytest.mark.parametrize(("name", "method"), FINETUNING)
def test_a_run_of_the_fine_tuning_experiment_can_be_started(name, method, monkeypatch, tmp_path):
  monkeypatch.chdir(ROOT)
  for module in (datasets, finetune):
    monkeypatch.setattr(module, "fetch", lambda name: tmp_path)
  monkeypatch.setattr(finetune, "checkpoint_of", lambda model: "hf:model")
  monkeypatch.setattr(finetune, "both_languages", lambda *names: {})
  _, _, spec, *arguments = finetune.training_command(tasks.TASKS[name], method, 0, tmp_path)
  flags = [argument.removeprefix("--config.").partition("=") for argument in arguments[:-1]]
  config = config_lib.load(spec.removeprefix("--config="), {key: text for key, _, text in flags})
  assert config.seed == 0
  assert (config.peft.method == "none") == (method == "full")


# --- One NVIDIA GPU ----------------------------------------------------------------------------


def run_gpu(*arguments, platform="cpu"):
  return subprocess.run(
    [sys.executable, "-m", "experiments.gpu.run", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": platform},
    capture_output=True,
    text=True,
    check=False,
  )


def test_without_a_cuda_device_one_sentence_says_so():
  process = run_gpu()
  assert process.returncode == 1
  assert process.stderr == (
    "error: experiments.gpu needs a CUDA device, and JAX finds only 'cpu'.\n"
  )
  assert process.stdout == ""


def test_tiny_models_are_not_written_into_the_results():
  process = run_gpu("--smoke")
  assert process.returncode == 1
  assert process.stderr == "error: --smoke measures nothing to keep: give --output=FILE.\n"


@pytest.mark.slow
def test_all_parts_of_the_gpu_experiment_run(tmp_path):
  kept = {name: (gpu.HERE / name).read_bytes() for name in ("results.json", "README.md")}
  output = tmp_path / "gpu.json"
  process = run_gpu("--smoke", f"--output={output}")
  assert process.returncode == 0, process.stdout + process.stderr
  results = json.loads(output.read_text())
  assert gpu.is_good(results)
  assert [*results["parts"]] == [name for name in gpu.LIMITS if name != "device"]
  assert (
    results["parts"]["losses"]["bfloat16"]["card"][0]
    > results["parts"]["losses"]["bfloat16"]["card"][-1]
  )
  assert gpu.NOT_MEASURED not in gpu.table(results)
  assert kept == {name: (gpu.HERE / name).read_bytes() for name in kept}


def test_the_table_of_the_gpu_is_that_of_its_results():
  results = json.loads((gpu.HERE / "results.json").read_text())
  assert gpu.table(results) in (gpu.HERE / "README.md").read_text()
  assert gpu.table({}).count(gpu.NOT_MEASURED) == 6  # five parts, and the line of date and card


def test_a_part_that_fails_or_hangs_is_not_measured(monkeypatch):
  monkeypatch.setitem(gpu.LIMITS, "nothing", 60)
  assert gpu.run_part("nothing", smoke=True) == {gpu.NOT_MEASURED: "KeyError: 'nothing'"}
  monkeypatch.setitem(gpu.LIMITS, "decoding", 0.1)
  assert gpu.run_part("decoding", smoke=True) == {gpu.NOT_MEASURED: "it took more than 0.1 s"}


def test_twenty_minutes_are_enough():
  assert sum(gpu.LIMITS.values()) <= 20 * 60
  assert {*gpu.LIMITS} == {*gpu_parts.PARTS}


@pytest.mark.parametrize("documents", [1, 4, 40])
def test_a_row_of_the_gpu_experiment_has_so_many_documents(documents):
  setup = gpu_parts.make("gpt2-124m", gpu_parts.SMOKE, jax.devices()[0])
  batch = gpu_parts.make_batch(setup, documents, seed=0)
  starts = batch.positions == 0
  np.testing.assert_array_equal(starts.sum(1), documents)
  np.testing.assert_array_equal(np.cumsum(starts, axis=1), batch.segment_ids)


# --- Bad inputs --------------------------------------------------------------------------------


def test_the_bad_inputs_can_be_given_and_their_table_is_that_of_the_results():
  cases = bad_inputs.read_cases()
  assert len({*map(str, cases)}) >= 300
  assert {case.command.split()[0] for case in cases} == {"gptjax", *bad_inputs.COMMANDS}
  assert {damage.partition("=")[2] for case in cases for damage in case.damages} == {*DAMAGES}
  counts = json.loads((bad_inputs.HERE / "results.json").read_text())["cases"]
  assert bad_inputs.table(counts) in (bad_inputs.HERE / "README.md").read_text()


# --- Decoding ----------------------------------------------------------------------------------


def test_the_tables_of_decoding_are_those_of_their_results():
  text = (readme.HERE / "README.md").read_text()
  assert compare.table(*compare.read(readme.HERE)) in text
  assert load.table(load.read(readme.HERE / "load.json")) in text
  assert speculation.table(load.read(readme.HERE / "speculation.json")) in text


def test_ratios_of_decoding_are_taken_round_by_round():
  def rows(engine, format, *rates):
    shared = {"model": "tiny", "batch": 8, "engine": engine, "format": format, "others": 0.1}
    return [shared | {"round": i, "tokens_per_second": rate} for i, rate in enumerate(rates)]

  found = rows("llama.cpp", "float32", 10.0, 20.0, 30.0) + rows("llama.cpp", "int8", 40.0)
  found += rows("gptjax", "int8", 20.0, 60.0, 300.0) + rows("memory", "int8", 1000.0)
  about = {"failures": {"gptjax float32": "no room"}, "settings": {"llama.cpp int8": "plain"}}
  conditions = {
    **{"date": "2026-01-01", "cpu": "a CPU", "threads": 2, "load_before": 0.0, "python": "3.11"},
    **{"prompt": 64, "tokens": 64, "rounds": 3, "batches": [8], "versions": {"gptjax": "jax 1"}},
    "models": {"tiny": about | {"agreement": {"gptjax": 32, "llama.cpp": 31}}},
  }
  table = compare.table(found, conditions)
  assert "| gptjax | float32 | not measured: no room |" in table
  assert "| gptjax | int8 | 60.0 (3.00, 0.50) |" in table
  assert "| llama.cpp | F32 | 20.0 (1.00) |" in table
  assert "| reading the weights once a step | int8 | 1,000 |" in table
  assert "those of gptjax, of the first 32: llama.cpp 31." in table
  assert "- llama.cpp int8: plain." in table


def test_ratios_of_guesses_are_taken_round_by_round():
  def rows(draft, same, *seconds):
    shared = {"weights": "int8", "kind": "chat", "draft": draft, "timed": 100, "others": 0.1}
    shared |= {"written": 100, "steps": 50, "drafted": 200, "accepted": 50}
    shared |= {"answers": 2, "same_answers": same}
    return [shared | {"round": i, "seconds": one} for i, one in enumerate(seconds)]

  found = rows("none", 2, 1.0, 2.0, 3.0) + rows("none, again", 2, 1.25, 2.0, 3.0)
  conditions = {
    **{"date": "2026-01-01", "cpu": "a CPU", "threads": 2, "load_before": 0.0, "model": "tiny"},
    **{"texts": 2, "tokens": 64, "rounds": 3, "drafts": ["lookup"]},
  }
  table = speculation.table(conditions | {"rows": found + rows("lookup", 1, 0.5, 0.5, 4.0)})
  assert "| int8 | chat | lookup | 200.0 | 25% of 600 | 2.00 | 2.00 | 0.75 |" in table
  assert "those of plain decoding: 9 of 12." in table
  assert "guesses: 0.75 (lookup, chat, int8); without, of an engine to its like: 0.80." in table
  assert "Never below 0.95: does not hold." in table
  table = speculation.table(conditions | {"rows": found + rows("lookup", 2, 0.5, 0.5, 3.1)})
  assert "Never below 0.95: holds." in table


FAKE = """
import os

class Engine:
  def __init__(self, format, folder, rows, length):
    self.format, self.version, self.setting = format, "fake 1", ""

  def warm_up(self, rows, prompt, tokens):
    print("not an answer")
    if self.format == "int8":
      os._exit(3)

  def measure(self, rows, prompt, tokens, seed):
    if self.format == "bfloat16" and seed == 2:
      raise ValueError("no more")
    return tokens / 100

  def write(self, prompt, tokens):
    return [*range(tokens)]
"""


def test_an_engine_that_fails_leaves_the_others_measured(monkeypatch, tmp_path):
  (tmp_path / "fake_engine.py").write_text(FAKE)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  monkeypatch.setattr(
    compare, "PEERS", {"gptjax": compare.Peer("fake_engine", models.FORMATS, "fake")}
  )
  monkeypatch.setattr(compare, "_prompt", lambda folder: [1, 2])
  conditions = {"versions": {}, "models": {}}
  plan = compare.Plan(batches=[4], rounds=2, tokens=10, prompt=5)
  rows = compare.measure_model("tiny", tmp_path, ["gptjax"], plan, conditions)
  measured = sorted((row["format"], row["round"], row["tokens_per_second"]) for row in rows)
  assert measured == [("bfloat16", 0, 400.0), ("float32", 0, 400.0), ("float32", 1, 400.0)]
  about = conditions["models"]["tiny"]
  assert about["failures"] == {
    "gptjax int8": "exit status 3: not an answer",
    "gptjax bfloat16": "ValueError: no more",
  }
  assert about["agreement"] == {"gptjax": 32}
  assert conditions["versions"] == {"gptjax": "fake 1"}


def test_tokens_agree_until_they_part():
  written = {"a": [1, 2, 3], "b": [1, 2, 4], "c": None, "d": [1, 2, 3]}
  assert compare.agreement(written) == {"a": 3, "b": 2, "d": 3}


def test_the_engine_of_the_decoding_experiment_runs_with_a_tiny_model(monkeypatch, tmp_path):
  monkeypatch.setattr(models, "cache_root", lambda: tmp_path)
  monkeypatch.setattr(form, "kernels", None)  # They take longer to compile.
  monkeypatch.setitem(models.SHAPES, "tiny", models.Shape(1, 32, 1, 300, 64))
  folder = models.prepare("tiny")
  assert models.bytes_of_step(folder, "int8") == 32 * 300 + 12 * 32 * 32
  engine = DecodingEngine("float32", folder, 2, 32)
  assert engine.measure(2, 8, 4, seed=1) > 0
  assert len(engine.write([1, 2, 3], 5)) == 5
  requests = load.draw(5, 300, (1, 8), (2, 6))
  timings, seconds = load.serve(engine.engine, requests, np.linspace(0, 0.1, 5))
  assert [len(timing.tokens) for timing in timings] == [r.max_tokens for r in requests]
  assert all(timing.first > 0 and min(timing.gaps) >= 0 for timing in timings)
  alone, _ = load.serve_alone(engine.engine, requests)
  assert [t.answer.tokens for t in alone] == [t.answer.tokens for t in timings]
  plain, other = (speculation.write(engine.engine, [1, 2, 3], 6) for _ in range(2))
  assert plain.tokens == other.tokens
  assert (other.written, other.steps, other.timed, other.compiled) == (5, 5, 5, 0)
  described = load.describe(timings, seconds)
  assert described["tokens_per_second"] == sum(r.max_tokens for r in requests) / seconds
