"""Numbers in few bits: formats, and the parts of a model that keep their weights in them."""
