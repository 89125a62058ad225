import importlib.util

import pytest

from gptjax.compiler import topology
from gptjax.compiler.topology import GENERATIONS, Slice, default_shape, find_slice, parse_name
from gptjax.errors import UserError


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    # These count cores, two a chip ...
    ("v4-8", ("v4", (2, 2, 1))),
    ("v5p-8", ("v5p", (2, 2, 1))),
    ("v5p-16", ("v5p", (2, 2, 2))),
    ("v5p-128", ("v5p", (4, 4, 4))),
    ("v5p-256", ("v5p", (4, 4, 8))),
    ("tpu7x-16", ("tpu7x", (2, 2, 2))),
    ("tpu7x-128", ("tpu7x", (4, 4, 4))),
    # ... these count chips.
    ("v5e-1", ("v5e", (1, 1))),
    ("v5e-4", ("v5e", (2, 2))),
    ("v5e-8", ("v5e", (2, 4))),
    ("v5litepod-16", ("v5e", (4, 4))),
    ("v6e-256", ("v6e", (16, 16))),
    ("v5p:4x4x8", ("v5p", (4, 4, 8))),
    ("v5e:4x8", ("v5e", (4, 8))),
  ],
)
def test_names_as_cloud_says_them(name, expected):
  assert parse_name(name) == expected


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5x-16", r"^--topology=v5x-16: no such slice\. .*v5p"),
    ("v5e", "^--topology=v5e: no such slice"),
    ("v5e-12", "v5e counts chips, a power of 2 up to 256"),
    ("v5e-512", "v5e counts chips, a power of 2 up to 256"),
    ("v5e-0", "v5e counts chips, a power of 2 up to 256"),
    ("v4-12", "v4 counts cores, 8 for 4 chips, 16 for 8"),
    ("v4-0", "v4 counts cores, 8 for 4 chips, 16 for 8"),
    ("v5p-4", "v5p counts cores, 8 for 4 chips, 16 for 8"),
    ("v5e:2x2x2", "a slice of v5e has 2 dimensions"),
    ("v5p:4x4", "a slice of v5p has 3 dimensions"),
    ("v5p:0x4x4", "a slice of v5p has 3 dimensions"),
  ],
)
def test_a_name_of_nothing_is_refused_in_a_line(name, message):
  with pytest.raises(UserError, match=message) as caught:
    parse_name(name)
  assert "\n" not in str(caught.value)


def test_without_the_compiler_one_is_told_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"the TPU compiler is not installed\. Run: pip install 'jax"):
    find_slice("v5e-4")


@pytest.mark.parametrize("chips", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_default_shape_has_all_the_chips(chips, dimensions):
  shape = default_shape(chips, dimensions)
  product = 1
  for side in shape:
    product *= side
  assert len(shape) == dimensions
  assert product == chips


def test_links_are_counted_along_the_dimensions_that_hold_a_group():
  def bandwidth(generation, shape, group):
    row = GENERATIONS[generation]
    return Slice("", shape, 1, [], None, row).link_bandwidth(group) / row.link_bytes_per_second

  # 4 is a ring on v5p, two links; 16 is one on v5e, 8 is not.
  assert bandwidth("v5p", (4, 4, 4), 4) == 2
  assert bandwidth("v5p", (4, 4, 4), 64) == 6
  assert bandwidth("v5p", (2, 2, 1), 4) == 2
  assert bandwidth("v5e", (4, 4), 16) == 2
  assert bandwidth("v5e", (16, 16), 16) == 2
  assert bandwidth("v5e", (1, 1), 1) == 1


def test_the_environment_is_only_set_where_it_is_not(monkeypatch):
  environment = {"TPU_WORKER_HOSTNAMES": "mine"}
  monkeypatch.setattr(topology.os, "environ", environment)
  topology.prepare_environment()
  assert environment["TPU_WORKER_HOSTNAMES"] == "mine"
  assert environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
