"""Evaluation, and the simple methods that a model has to beat."""
