"""Shards and their index, dtypes, and files that cannot be used."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gptjax.errors import UserError
from gptjax.interop import safetensors_files
from gptjax.interop.safetensors_files import TensorFiles

TENSORS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.arange(4).astype(ml_dtypes.bfloat16),
  "c": np.linspace(0, 1, 5).astype(np.float16),
  "d": np.linspace(0, 1, 7),
}


def test_one_file_of_all_floats_comes_back_exactly(tmp_path):
  safetensors_files.write(tmp_path, TENSORS.items())
  assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
  with TensorFiles(tmp_path) as files:
    assert files.names == set(TENSORS)
    for name, expected in TENSORS.items():
      assert files.shape(name) == expected.shape
      assert files.read(name).dtype == expected.dtype
      np.testing.assert_array_equal(files.read(name), expected)


def test_shards_are_as_large_as_they_may_be_and_come_back_exactly(tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 32)
  safetensors_files.write(tmp_path, iter(TENSORS.items()))
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
  assert index["weight_map"] == {"a": first, "b": first, "c": second, "d": third}
  assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
  assert {path.name for path in tmp_path.iterdir()} == {
    "model.safetensors.index.json",
    first,
    second,
    third,
  }
  with TensorFiles(tmp_path) as files:
    for name, expected in TENSORS.items():
      np.testing.assert_array_equal(files.read(name), expected)


def test_what_is_written_can_be_read_by_whom_other_files_can(tmp_path):
  (tmp_path / "other").touch()
  safetensors_files.write(tmp_path, TENSORS.items())
  mode = os.stat(tmp_path / "model.safetensors").st_mode
  assert mode == os.stat(tmp_path / "other").st_mode


def write_index(folder, text):
  (folder / "model.safetensors.index.json").write_text(text)


def save(folder, name, **tensors):
  safetensors.numpy.save_file(tensors, folder / name)


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_a_file_that_was_cut_short_is_named(tmp_path, size):
  safetensors_files.write(tmp_path, TENSORS.items())
  path = tmp_path / "model.safetensors"
  os.truncate(path, path.stat().st_size - 1 if size < 0 else size)
  with pytest.raises(
    UserError, match=r"model\.safetensors: damaged or cut short .* fetch it again"
  ):
    TensorFiles(tmp_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_in_the_place_of_the_weights_is_named(tmp_path, make):
  make(tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=r"model\.safetensors: a folder or a pipe, not a file"):
    TensorFiles(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
  save(tmp_path, "1.safetensors", a=TENSORS["a"])
  write_index(tmp_path, '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
  with pytest.raises(UserError, match=r"2\.safetensors is missing; .*index\.json names it"):
    TensorFiles(tmp_path)


def test_an_index_names_files_of_its_own_folder_alone(tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  save(tmp_path, "outside.safetensors", a=np.zeros(3))
  write_index(folder, '{"weight_map": {"a": "../outside.safetensors"}}')
  with pytest.raises(UserError, match=r"'\.\./outside.*' is not the name of a file in the same"):
    TensorFiles(folder)


@pytest.mark.parametrize(
  "text", ["", "{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": [1]}}']
)
def test_an_index_that_is_none_is_named(tmp_path, text):
  write_index(tmp_path, text)
  with pytest.raises(UserError, match=r"index\.json: not (an index of safetensors|JSON)"):
    TensorFiles(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_refused_with_the_reason_and_the_way_out(tmp_path, name):
  (tmp_path / name).write_bytes(b"\x80\x04.")
  with pytest.raises(UserError, match=rf"{name} is a pickle, which runs code .*save_pretrained"):
    TensorFiles(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
  with pytest.raises(UserError, match=r"no model\.safetensors and no model\.safetensors\.index"):
    TensorFiles(tmp_path)


def test_integers_are_refused_when_they_are_read(tmp_path):
  save(tmp_path, "model.safetensors", a=np.zeros(3, np.int8))
  with TensorFiles(tmp_path) as files, pytest.raises(UserError, match="tensor 'a' is of dtype I8"):
    files.read("a")
