"""Models and tokenizers in the files of llama.cpp."""
