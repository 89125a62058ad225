"""From files to batches: sources, tokenizers, the token cache, packing, mixtures, the pipeline."""
