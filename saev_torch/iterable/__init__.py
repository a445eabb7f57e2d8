"""The data sets of batches: of one directory in file order or in a seeded random order, and mixtures of several."""
