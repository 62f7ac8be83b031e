"""Metrics: pure functions from a model's outputs to estimates with intervals."""
