"""Tasks: one per model family."""
