"""Kernels for decoding on a CPU, compiled by numba and called by XLA."""
