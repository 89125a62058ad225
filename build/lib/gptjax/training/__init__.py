"""Training: setup, step, loop, validation and checkpoints."""
