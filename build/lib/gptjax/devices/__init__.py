"""Devices: the mesh, axis rules, hosts and hardware figures."""
