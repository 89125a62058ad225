"""GPT models in JAX: one Flax NNX model, one training loop, any mesh."""
