"""Parameter groups, optimizers, learning-rate schedule and weight averaging.

Empty on purpose: `schedule` is used while a configuration is composed, before torch is imported.
"""
