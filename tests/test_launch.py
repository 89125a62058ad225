"""The launch recipes parse, ask for hardware that fits together, and start a run that is accepted.

Nothing here has a cloud: what is checked is what this repository can know.
"""

import functools
import math
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from absl import flags

from gptjax import config as config_lib
from gptjax import train
from gptjax.devices import sharding
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import describe_parameters
from gptjax.training.setup import length_without_data

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "launch"
RECIPES = sorted(path for path in FOLDER.iterdir() if path.name != "README.md")
SHELL = [path for path in RECIPES if path.suffix in (".sh", ".sbatch")]
SLURM = FOLDER / "slurm_gpu.sbatch"
YAML = [path for path in RECIPES if path.suffix == ".yaml"]

# By GKE's name: dimensions of a topology, and chips of one of its hosts in a slice of several.
TPU_SLICES = {
  "tpu-v4-podslice": (3, 4),
  "tpu-v5-lite-podslice": (2, 4),
  "tpu-v5p-slice": (3, 4),
  "tpu-v6e-slice": (2, 4),
}
# What the number in an accelerator type counts for each chip.
CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}


def name(path: Path) -> str:
  return path.name


def documents(path: Path) -> dict[str, dict]:
  """The documents of a YAML file, by kind ('' where it has none)."""
  loaded = [document for document in yaml.safe_load_all(path.read_text()) if document]
  return {document.get("kind", ""): document for document in loaded}


def variables(path: Path) -> dict[str, str]:
  if path in YAML:
    found = documents(path)
    return found[""]["envs"] if "" in found else found["ConfigMap"]["data"]
  return dict(re.findall(r"^([A-Z_]+)=(\S+)", path.read_text(), re.MULTILINE))


def command(path: Path) -> list[str]:
  """The arguments of the recipe's one training command, with its variables filled in."""
  text = re.sub(r"\\\n\s*", "", path.read_text())
  (arguments,) = re.findall(r'python -m gptjax\.train ([^\n">&]*)', text)
  values = variables(path)
  return shlex.split(re.sub(r"\$(\w+)", lambda match: values[match[1]], arguments))


def overrides(path: Path) -> dict[str, str]:
  matches = (re.fullmatch(r"--config\.([\w.]+)=(.*)", argument) for argument in command(path))
  return {match[1]: match[2] for match in matches if match}


def num_devices(path: Path) -> int:
  """The number of devices of the hardware that a recipe asks for."""
  text = path.read_text()
  if path.suffix == ".sbatch":
    return math.prod(int(n) for n in re.findall(r"--(?:nodes|gpus-per-node)=(\d+)", text))
  if "JobSet" in text:
    job = documents(path)["JobSet"]["spec"]["replicatedJobs"][0]
    selector = job["template"]["spec"]["template"]["spec"]["nodeSelector"]
    topology = selector["cloud.google.com/gke-tpu-topology"]
    return job["replicas"] * math.prod(map(int, topology.split("x")))
  if path.suffix == ".yaml":
    accelerator = documents(path)[""]["resources"]["accelerators"].removeprefix("tpu-")
  else:
    accelerator = variables(path)["ACCELERATOR"]
  kind, number = accelerator.split("-")
  return int(number) // CORES_PER_CHIP[kind]


def test_readme_lists_the_recipes():
  readme = (FOLDER / "README.md").read_text()
  assert sorted(re.findall(r"^\| \[(\S+)\]\(\1\) \|", readme, re.MULTILINE)) == [
    *map(name, RECIPES)
  ]
  assert sorted(SHELL + YAML) == RECIPES


@pytest.mark.parametrize("path", SHELL, ids=name)
def test_shell_recipe_parses(path):
  done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (0, "")
  lines = path.read_text().splitlines()
  first_command = next(i for i, line in enumerate(lines) if line and line[0] not in "#")
  # Slurm reads its options only before the first command.
  assert all(i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH"))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_training_command_is_accepted(path, monkeypatch):
  known = flags.FlagValues()
  for kind in ("DEFINE_string", "DEFINE_bool", "DEFINE_integer"):
    define = functools.partial(getattr(flags, kind), flag_values=known)
    monkeypatch.setattr(flags, kind, define)
  train._define_flags()
  arguments = [argument for argument in command(path) if not argument.startswith("--config.")]
  assert known(["gptjax.train", *arguments]) == ["gptjax.train"]
  assert known.distributed
  assert known.workdir
  monkeypatch.chdir(ROOT)
  config = config_lib.load(known.config, overrides(path))
  model = ModelConfig.from_config(config.model)
  assert config.sequence_length <= model.position.max_positions
  assert length_without_data(config).total_steps > 1000


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_run_fits_the_hardware_that_the_recipe_asks_for(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  (spec,) = [a.removeprefix("--config=") for a in command(path) if a.startswith("--config=")]
  config = config_lib.load(spec, overrides(path))
  (axis,) = [axis for axis, size in config.mesh.items() if size == -1]
  mesh = SimpleNamespace(shape=dict(config.mesh.items()) | {axis: num_devices(path)})
  sharding.check_batch(config.batch_size, config.sequence_length, config.grad_accumulation, mesh)
  for info in describe_parameters(ModelConfig.from_config(config.model)).values():
    for size, names in zip(info.shape, sharding.mesh_axes(info.axes), strict=True):
      assert size % math.prod(mesh.shape[name] for name in names) == 0


def test_jobset_has_a_host_for_all_chips_of_its_topology():
  found = documents(FOLDER / "gke_jobset.yaml")
  jobset = found["JobSet"]
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  (job,) = jobset["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  accelerator = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  dimensions, chips = TPU_SLICES[accelerator]
  assert len(topology) == dimensions
  assert container["resources"]["limits"] == container["resources"]["requests"]
  assert container["resources"]["limits"] == {"google.com/tpu": chips}
  assert job["parallelism"] == job["completions"]
  assert job["parallelism"] * chips == math.prod(map(int, topology))
  # JAX numbers the processes by the index of the pod.
  assert job["completionMode"] == "Indexed"
  (source,) = container["envFrom"]
  assert source["configMapRef"]["name"] == found["ConfigMap"]["metadata"]["name"]


def test_slurm_starts_a_process_for_each_gpu():
  options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SLURM.read_text(), re.MULTILINE))
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  # It would hide from a process the GPU whose number JAX gives it.
  assert "gpus-per-task" not in options
