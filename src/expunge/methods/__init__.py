"""Named recipes, one file per method."""
