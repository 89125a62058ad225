"""From files to batches: sources, chats, tokenizers, the token cache, packing, mixtures."""
