"""Weights: where they come from, what a file holds, whether they fit, what others can load."""
