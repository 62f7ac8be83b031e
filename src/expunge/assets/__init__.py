"""Files that come with the package: weights of small models on drawn data, each folder with a README of its making."""
