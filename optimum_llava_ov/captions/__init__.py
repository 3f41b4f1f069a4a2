"""Caption data sets of images."""
