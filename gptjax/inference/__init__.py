"""Text generation and scoring: sampling of tokens, and compiled loops around the model."""
