"""Configs: each file has `get_config(arg)`, composed of the named parts in `configs/parts`."""
