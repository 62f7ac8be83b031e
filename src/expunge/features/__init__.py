"""What a classifier's features are like per class, how far a feature is from a class, and how outputs are kept."""
