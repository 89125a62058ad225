"""The model: attention, feed-forward, norms and positions, composed by configuration."""
