"""Parameter groups, optimizers, learning-rate schedule and weight averaging."""
