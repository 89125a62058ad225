"""Decoding: how a token is chosen, and the compiled loop that chooses many."""
