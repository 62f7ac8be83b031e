"""Larger models that contain a CLIP tower: carrying a patch over to them, and asking them."""
