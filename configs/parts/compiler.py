"""Compiler options on each platform, as "name=value,name=value".

xla_tpu_scoped_vmem_limit_kib: on-chip memory for one fused operation. Twice the default of 16 MiB
  lets matrix products take larger tiles: the cycles of gpt3-1.3b on v5e-16 fall by 3 %; 64 and 96
  MiB take less off or nothing (experiments/tpu).
xla_gpu_enable_latency_hiding_scheduler: computes while collectives run.
"""

DEFAULTS = {
  "options": {
    "tpu": "xla_tpu_scoped_vmem_limit_kib=32768",
    "gpu": "xla_gpu_enable_latency_hiding_scheduler=True",
    "cpu": "",
  }
}
