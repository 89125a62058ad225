"""Estimates the cost of a training or decoding step on accelerators that are not here."""
