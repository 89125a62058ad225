"""Compression: quantised, pruned, distilled and averaged models, each an ordinary checkpoint."""
