"""Sweeps: experiments of several arms and seeds, run on shared hosts and judged by statistics."""
