"""Alignment: what people prefer, learnt from pairs of answers."""
