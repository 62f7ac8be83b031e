"""Tours of what the library does, each from nothing but the package: digits (a classifier) and clip (two towers)."""
