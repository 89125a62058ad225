"""Evaluation of models, by tasks of your own, by lm-eval and in a sandbox for code."""
