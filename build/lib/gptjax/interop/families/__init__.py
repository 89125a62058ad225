"""Families of pretrained models, each a table of fields and a table of tensors."""
