"""Mesh presets: how many parts each axis splits into; -1 takes what is left."""

DEFAULTS = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1}

MESHES = {
  "data": {"data": -1},
  "fsdp": {"fsdp": -1},
}
