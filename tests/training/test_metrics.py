import io
import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from gptjax.devices.chips import find_chip, flops_per_token, mfu
from gptjax.errors import UserError
from gptjax.training import metrics
from gptjax.training.metrics import Sums, Throughput, Writer


def make_writer(workdir, **changes):
  options = {
    "total_steps": 100,
    "resume_step": 0,
    "tensorboard": False,
    "wandb": False,
    "run_config": {"seed": 0},
  }
  return Writer(workdir, **(options | changes))


def read_lines(workdir):
  def refuse(constant):
    raise AssertionError(f"not JSON: {constant}")

  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_events(workdir):
  for path in sorted((workdir / "tensorboard").glob("events.*")):
    content = path.read_bytes()
    while content:
      size = int.from_bytes(content[:8], "little")
      yield Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]


# --- Means ------------------------------------------------------------------------------------


def test_the_mean_is_over_tokens_not_over_batches():
  sums = Sums()
  sums.add({"loss": (jnp.float32(8), jnp.float32(4)), "accuracy": (1.0, 4.0)})
  sums.add({"loss": (jnp.float32(1), jnp.float32(1)), "accuracy": (1.0, 1.0)})
  result = sums.finish(text_bytes=18)
  assert result["loss"] == 9 / 5
  assert result["accuracy"] == 2 / 5
  assert result["perplexity"] == math.exp(9 / 5)
  assert result["bits_per_byte"] == pytest.approx(9 / math.log(2) / 18, rel=1e-15)


def test_many_tokens_are_counted_exactly():
  sums = Sums()
  for _ in range(3):
    sums.add({"loss": (jnp.float32(2**24), jnp.float32(2**24))})
  sums.add({"loss": (jnp.float32(1), jnp.float32(1))})
  assert sums.finish()["loss"] == 1.0
  sums.add({"loss": (jnp.float32(0), jnp.float32(1))})
  assert sums.finish()["loss"] == (3 * 2**24 + 1) / (3 * 2**24 + 2)


def test_means_of_nothing_and_of_too_much():
  sums = Sums()
  sums.add({"loss": (0.0, 0.0)})
  assert math.isnan(sums.finish()["loss"])
  sums.add({"loss": (10_000.0, 1.0)})
  assert sums.finish()["perplexity"] == math.inf


# --- metrics.jsonl ----------------------------------------------------------------------------


def test_floats_come_back_to_the_last_bit(tmp_path):
  values = {"a": 0.1 + 0.2, "b": np.float32(1) / 3, "c": jnp.float32(1e-45), "d": 7, "e": None}
  with make_writer(tmp_path) as writer:
    writer.write(3, values)
  (line,) = read_lines(tmp_path)
  assert list(line) == ["step", "a", "b", "c", "d", "e"]
  assert line["step"] == 3
  assert line["a"] == values["a"]
  assert np.float32(line["b"]) == values["b"]
  assert jnp.float32(line["c"]) == values["c"]
  assert (line["d"], line["e"]) == (7, None)


def test_nan_is_null_and_named(tmp_path):
  with make_writer(tmp_path) as writer:
    writer.write(1, {"loss": math.nan, "norm": -math.inf, "lr": 0.5})
  assert read_lines(tmp_path) == [
    {"step": 1, "loss": None, "norm": None, "lr": 0.5, "nonfinite": {"loss": "nan", "norm": "-inf"}}
  ]


def test_a_line_is_on_disk_at_once(tmp_path):
  writer = make_writer(tmp_path)
  writer.write(1, {"loss": 2.0})
  assert read_lines(tmp_path) == [{"step": 1, "loss": 2.0}]
  writer.close()


def test_resuming_drops_later_steps_and_the_torn_line_only(tmp_path):
  with make_writer(tmp_path) as writer:
    for step in range(1, 7):
      writer.write(step, {"loss": 1 / step})
      if step % 2 == 0:
        writer.write(step, {"val/loss": 2 / step})
  before = read_lines(tmp_path)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "lo')
  with make_writer(tmp_path, resume_step=4) as writer:
    writer.write(5, {"loss": 0.5})
  assert read_lines(tmp_path) == before[:6] + [{"step": 5, "loss": 0.5}]


def test_a_line_that_is_nested_too_deep_is_dropped(tmp_path):
  whole = '{"step": 1, "loss": 2.0}\n'
  (tmp_path / "metrics.jsonl").write_text(whole + '{"step": ' + "[" * 100_000 + "\n")
  with make_writer(tmp_path, resume_step=1):
    pass
  assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_a_torn_line_that_happens_to_be_json_is_dropped(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
  with make_writer(tmp_path, resume_step=2) as writer:
    writer.write(2, {"loss": 1.0})
  assert read_lines(tmp_path) == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_a_resumption_killed_while_dropping_loses_nothing(tmp_path, monkeypatch):
  with make_writer(tmp_path) as writer:
    for step in range(1, 5):
      writer.write(step, {"loss": 1.0})

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    make_writer(tmp_path, resume_step=2)
  assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]


def test_only_process_0_writes(tmp_path):
  with make_writer(tmp_path / "run", tensorboard=True, process_index=1) as writer:
    writer.write(1, {"loss": 1.0})
    writer.write_text(1, "sample", "text")
    writer.message("text")
  assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=f"^{tmp_path}/file/run: cannot write metrics"):
    make_writer(tmp_path / "file" / "run")


def test_a_workdir_on_an_object_store_gets_copies(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, "_is_remote", lambda path: True)
  with make_writer(tmp_path, tensorboard=True) as writer:
    writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()
    monkeypatch.setattr(metrics, "_UPLOAD_SECONDS", 0)
    writer.write(2, {"loss": 0.5})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]
    monkeypatch.setattr(metrics, "_UPLOAD_SECONDS", math.inf)
    writer.write(3, {"loss": 0.2})
  assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]
  assert [e.step for e in read_events(tmp_path) if e.summary.value][-1] == 3
  with make_writer(tmp_path, resume_step=2) as writer:
    writer.write(3, {"loss": 0.1})
  assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]


# --- TensorBoard, Weights & Biases --------------------------------------------------------------


def test_event_files_are_written_without_torch(tmp_path):
  program = textwrap.dedent("""
    import sys
    from gptjax.training.metrics import Writer
    options = {"total_steps": 1, "resume_step": 0, "wandb": False, "run_config": {}}
    with Writer(sys.argv[1], tensorboard=True, **options) as writer:
      writer.write(1, {"loss": 2.0})
      writer.write_text(1, "sample", "text")
    assert "torch" not in sys.modules
  """)
  subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
  assert [*(tmp_path / "tensorboard").glob("events.*")]


def test_tensorboard_gets_scalars_texts_and_the_purge_of_later_steps(tmp_path):
  for resume_step in 0, 5:
    with make_writer(tmp_path, tensorboard=True, resume_step=resume_step) as writer:
      writer.write(resume_step + 1, {"train/loss": 2.5, "mfu": None})
      writer.write_text(resume_step + 1, "sample", "Once upon a time")
  events = list(read_events(tmp_path))
  scalars = [
    (event.step, value.tag, value.simple_value)
    for event in events
    for value in event.summary.value
    if value.HasField("simple_value")
  ]
  assert scalars == [(1, "train/loss", 2.5), (6, "train/loss", 2.5)]
  texts = [
    v.tensor.string_val[0].decode() for e in events for v in e.summary.value if v.HasField("tensor")
  ]
  assert sum("Once upon a time" in text for text in texts) == 2
  assert any('"seed": 0' in text for text in texts)
  starts = [e.step for e in events if e.session_log.status == e.session_log.START]
  assert starts == [1, 6]


def test_wandb_that_is_not_installed_is_an_error_with_the_command(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="pip install wandb"):
    make_writer(tmp_path, wandb=True)


def test_wandb_is_one_run_over_resumptions(tmp_path, monkeypatch):
  started, logged = [], []
  run = types.SimpleNamespace(
    log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finish")
  )
  module = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
  monkeypatch.setitem(sys.modules, "wandb", module)
  for resume_step in 0, 5:
    with make_writer(tmp_path, wandb=True, resume_step=resume_step) as writer:
      writer.write(resume_step + 1, {"loss": 1.0, "mfu": None})
  assert started[0]["id"] == started[1]["id"]
  assert started[0]["config"] == {"seed": 0}
  assert logged == [(1, {"loss": 1.0}), "finish", (6, {"loss": 1.0}), "finish"]


# --- Terminal -----------------------------------------------------------------------------------


def test_a_log_file_gets_plain_lines_now_and_then(tmp_path, monkeypatch, capsys):
  clock = iter(range(0, 1000, 10))
  monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
  with make_writer(tmp_path, total_steps=5) as writer:
    for step in range(1, 6):
      writer.write(step, {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.4321})
  lines = capsys.readouterr().err.splitlines()
  assert lines == [
    "step 1/5, loss 2.0000, 12,346 tokens/s, mfu 43.2%, ? left",
    "step 3/5, loss 2.0000, 12,346 tokens/s, mfu 43.2%, 00:20 left",
    "step 5/5, loss 2.0000, 12,346 tokens/s, mfu 43.2%, 00:00 left",
  ]


def test_a_terminal_gets_a_bar_with_messages_above_it(tmp_path, monkeypatch, capsys):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  with make_writer(tmp_path, total_steps=10, resume_step=4) as writer:
    writer.write(5, {"loss": 2.0, "tokens_per_second": 1000.0})
    writer.message("a sample")
    writer.write(10, {"loss": 1.5})
  last = terminal.getvalue().split("\r")[-1]
  assert "10/10" in last
  assert "loss 1.5000, 1,000 tokens/s" in last
  assert capsys.readouterr().out == "a sample\n"


# --- Throughput and MFU -------------------------------------------------------------------------


def test_throughput_leaves_out_compilation_and_pauses(monkeypatch):
  now = 0.0
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
  throughput = Throughput()
  now = 60.0  # The first step compiles.
  throughput.tick(1000)
  assert throughput.rate() is None
  for now in 61.0, 62.0:  # noqa: B007 - read by the clock.
    throughput.tick(1000)
  throughput.restart()
  now = 100.0  # An evaluation ends, and the step before it has long arrived.
  throughput.tick(1000)
  now = 102.0
  throughput.tick(1000)
  assert throughput.rate() == 3000 / 4
  assert throughput.rate() is None


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}'])
def test_a_damaged_line_is_named_and_one_that_is_not_whole_is_not_read(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "lo')
  assert metrics.read_metrics(tmp_path) == [{"step": 1}]
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  with pytest.raises(UserError, match=r"metrics\.jsonl:2: not "):
    metrics.read_metrics(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "metrics.jsonl")
  with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(a pipe"):
    metrics.read_metrics(tmp_path)


def test_seconds_count_every_step_and_go_on_after_a_resume(monkeypatch, tmp_path):
  now = 0.0
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
  with make_writer(tmp_path) as writer:
    log = metrics.StepLog(
      writer,
      every_steps=1,
      tokens_per_step=10,
      flops_per_token=2.0,
      first_step=4,
      first_seconds=8.0,
    )
    assert log.spent(4) == {"tokens": 40, "flops": 80, "seconds": 8}
    for step, now in ((5, 60.0), (6, 63.0), (7, 66.0)):  # noqa: B007 - read by the clock.
      log.step(step, {})
      log.flush()
    assert log.spent(7)["seconds"] == 8 + 3 * 3  # the step that compiled counts as the others
  assert metrics.read_metrics(tmp_path)[0]["seconds"] is None


@pytest.mark.parametrize(
  ("device_kind", "name", "tflops"),
  [
    ("TPU v2", "TPU v2", 45 / 2),
    ("TPU v3", "TPU v3", 123 / 2),
    ("TPU v4", "TPU v4", 275),
    ("TPU v5 lite", "TPU v5e", 197),
    ("TPU v5", "TPU v5p", 459),
    ("TPU v5p", "TPU v5p", 459),
    ("TPU v6 lite", "TPU v6e", 918),
    ("TPU7x", "TPU v7x", 2307 / 2),
    ("Tesla V100-SXM2-16GB", "V100 SXM 16GB", 125),
    ("Tesla V100-PCIE-32GB", "V100 PCIe 32GB", 112),
    ("Tesla T4", "T4", 65),
    ("NVIDIA A100-SXM4-40GB", "A100 40GB", 312),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB", 312),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB", 312),
    ("NVIDIA L4", "L4", 121),
    ("NVIDIA H100 80GB HBM3", "H100 SXM", 989),
    ("NVIDIA H100 PCIe", "H100 PCIe", 756),
    ("NVIDIA H200", "H200 SXM", 989),
    ("NVIDIA B200", "B200", 2250),
  ],
)
def test_peaks_are_the_published_ones(device_kind, name, tflops):
  chip = find_chip(device_kind)
  assert chip.name == name
  assert chip.peak_flops == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
  "device_kind", ["cpu", "TPU v9", "NVIDIA L40S", "NVIDIA T400", "interpreter"]
)
def test_an_unknown_chip_has_no_mfu(device_kind):
  assert find_chip(device_kind) is None
  assert mfu(1e6, 1e9, device_kind=device_kind, devices=8) is None


def brute_force_keys(length, window):
  q, k = np.arange(length)[:, None], np.arange(length)[None, :]
  seen = (k <= q) & (q - k < (window or length))
  return seen.sum() / length


@pytest.mark.parametrize("window", [None, 1, 7, 64, 1000])
def test_attention_flops_count_the_keys_that_are_seen(window):
  flops = flops_per_token(
    matmul_params=0, heads=3, head_dim=5, sequence_length=64, windows=[window, None]
  )
  keys = brute_force_keys(64, window) + brute_force_keys(64, None)
  assert flops == pytest.approx(12 * 3 * 5 * keys, rel=1e-12)


def test_mfu_of_a_published_run():
  # MaxText's table: Llama 2 70B on v5p-512 reaches 65.4 %, 300 model TFLOP/s a chip.
  assert mfu(300e12 / 1e9, 1e9, device_kind="TPU v5p", devices=1) == pytest.approx(0.654, abs=1e-3)
  # Two devices of a v3 make one chip.
  assert mfu(123e3, 1e9, device_kind="TPU v3", devices=2) == pytest.approx(1.0)


def test_flops_of_gpt2_small():
  # 12 layers of 12 * 768**2 weights and the head of 50,257 x 768, at 1,024 tokens.
  matmul_params = 12 * 12 * 768**2 + 50257 * 768
  flops = flops_per_token(
    matmul_params=matmul_params, heads=12, head_dim=64, sequence_length=1024, windows=[None] * 12
  )
  assert flops == 6 * 123_532_032 + 12 * 12 * 768 * 512.5


def test_writing_survives_kill_9(tmp_path):
  code = """
import os, sys
from gptjax.training.metrics import Writer
writer = Writer(
  sys.argv[1], total_steps=9, resume_step=0, tensorboard=False, wandb=False, run_config={}
)
for step in 1, 2, 3:
  writer.write(step, {"loss": 1.5})
os.kill(os.getpid(), 9)
"""
  root = pathlib.Path(__file__).parents[2]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, env=environment, check=False)
  assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]


# --- One step late -----------------------------------------------------------------------------


def test_step_log_writes_a_step_when_the_next_one_is_dispatched(tmp_path):
  with metrics.Writer(
    tmp_path, total_steps=4, resume_step=0, tensorboard=False, wandb=False, run_config={}
  ) as writer:
    log = metrics.StepLog(writer, every_steps=2, tokens_per_step=10, flops_per_token=7.0)
    assert log.step(1, {"loss": jnp.float32(1)}) == {}
    assert log.step(2, {"loss": jnp.float32(2)}) == {"loss": 1}
    assert metrics.read_metrics(tmp_path) == []
    assert log.step(3, {"loss": jnp.float32(3)}) == {"loss": 2}
    (line,) = metrics.read_metrics(tmp_path)
    assert (line["step"], line["tokens"], line["flops"], line["loss"]) == (2, 20, 140, 2)
    assert line["tokens_per_second"] > 0
    assert line["mfu"] is None
    log.step(4, {"loss": jnp.float32(4)})
    assert log.interrupt() == {"loss": 4}
    assert log.flush() == {}
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [2, 4]


def test_a_step_that_arrives_with_the_one_before_does_not_seem_to_take_no_time(
  tmp_path, monkeypatch
):
  now = 0.0
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
  with metrics.Writer(
    tmp_path, total_steps=4, resume_step=0, tensorboard=False, wandb=False, run_config={}
  ) as writer:
    log = metrics.StepLog(writer, every_steps=1, tokens_per_step=10, flops_per_token=7.0)
    for step in range(1, 5):
      now = 5.0 * step  # The dispatch waited for the step.
      log.step(step, {"loss": jnp.float32(1)})
    log.interrupt()
    assert log.spent(4)["seconds"] == 20
  rates = [line["tokens_per_second"] for line in metrics.read_metrics(tmp_path)]
  assert rates == [None, 2, 2, None]


def test_step_log_counts_tokens_of_all_devices_in_the_mfu(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.chips, "mfu", lambda rate, flops, **_: rate * flops)
  with metrics.Writer(
    tmp_path, total_steps=4, resume_step=0, tensorboard=False, wandb=False, run_config={}
  ) as writer:
    log = metrics.StepLog(writer, every_steps=1, tokens_per_step=10, flops_per_token=7.0)
    for step in (1, 2):
      log.step(step, {"loss": jnp.float32(1)})
    log.flush()
  first, second = metrics.read_metrics(tmp_path)
  assert first["tokens_per_second"] is None  # nothing but compilation was timed
  assert second["mfu"] == pytest.approx(7 * second["tokens_per_second"])


def test_full_disk_is_one_sentence(tmp_path):
  with metrics.Writer(
    tmp_path, total_steps=4, resume_step=0, tensorboard=False, wandb=False, run_config={}
  ) as writer:
    lines, writer._lines = writer._lines, open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot write metrics here: No space left on device"):
      writer.write(1, {"loss": 1.0})
    writer._lines = lines
