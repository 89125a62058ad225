"""Optimizers, schedules and per-parameter rates."""
