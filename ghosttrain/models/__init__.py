"""Students: structure, re-parameterization, weights, size. Importing it needs no torch."""
