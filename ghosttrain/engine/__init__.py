"""Composes the floors below into runs: the training loop, evaluation, saving, processes,
metrics.
"""
