"""Devices: the mesh, axis rules, hosts and hardware data."""
