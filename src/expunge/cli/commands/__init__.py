"""The commands, grouped by what they work on. Heavy imports happen inside the functions."""
