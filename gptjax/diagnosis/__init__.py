"""Measurements that explain a training run, one per file; gptjax.diagnose runs them."""
