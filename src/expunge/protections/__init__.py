"""Protections: what must not move, one file each."""
