"""Objectives: what makes the model forget, one file each."""
