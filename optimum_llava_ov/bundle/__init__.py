"""Stage 3: the folder that is the product: which files it has, what is in those that are not weights, how it gets to its place."""
