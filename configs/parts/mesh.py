"""Mesh presets: how many parts each axis splits into; -1 takes what is left."""

DEFAULTS = {
  **{"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1},
  # What gradients are added up in over devices. 'bfloat16' sends half the bytes, a quarter less a
  # step of a bfloat16 model under fsdp, and loses what is small beside the sum.
  "reduce_dtype": "float32",
}

MESHES = {
  "data": {"data": -1},
  "fsdp": {"fsdp": -1},
}
