"""What the settings of a run ask for: to classify, or to detect."""

from __future__ import annotations

from ghosttrain.config.schema import Config
from ghosttrain.engine.train import Task


def task_of(config: Config) -> Task:
    """Return what a run of these settings learns. Only its own modules are imported."""
    if config.detects:
        from ghosttrain.engine import detection
        from ghosttrain.engine.pyramid_teacher import build_pyramid_source

        return Task(
            detection.build_data,
            build_pyramid_source,
            detection.build_network,
            detection.loss_terms,
            detection.evaluate,
        )
    from ghosttrain.engine.classification import CLASSIFICATION

    return CLASSIFICATION
