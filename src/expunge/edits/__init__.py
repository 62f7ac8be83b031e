"""One-shot edits: one file each."""
