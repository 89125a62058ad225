"""Imports models from other libraries' files and exports to them."""
