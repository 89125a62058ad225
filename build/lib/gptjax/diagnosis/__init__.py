"""Measurements that explain a training run, one a file; gptjax.diagnose runs them."""
