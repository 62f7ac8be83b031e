"""SLUG: gradients of two-tower models, scores of layers, the front of candidates, and the search of the step."""
