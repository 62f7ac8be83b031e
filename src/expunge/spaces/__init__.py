"""Spaces: where a change may live, one file each."""
