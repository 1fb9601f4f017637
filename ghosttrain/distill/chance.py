"""Whether a network knows the classes: its hits on a sample of images, and what guesses would hit.

Shapes: n images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ghosttrain.errors import UserError

LEAST_P = 0.01
"""A teacher is refused where guesses are as good with a higher probability."""


class Score(NamedTuple):
    """How often a network is right on a sample of images, and how often guesses are."""

    hits: int
    """Images whose label is its best class."""
    n: int
    """Images asked."""
    majority: int
    """Images of the class that has most of them: who always names it is right so often."""
    chance: float
    """Share of hits if its outputs, each class as often as it gave it, had nothing to do with the
    images (Cohen's expected agreement, https://doi.org/10.1177/001316446002000104)."""
    best_chance: float
    """`chance` of outputs that are all right."""

    @property
    def top1(self) -> float:
        """Share of images whose label is its best class."""
        return self.hits / max(self.n, 1)


def score(outputs: Tensor, labels: Tensor) -> Score:
    """Return the score of answered classes (n,) against labels (n,)."""
    size = int(torch.cat([outputs, labels, outputs.new_zeros(1)]).max()) + 1
    given, true = (torch.bincount(x, minlength=size).double() for x in (outputs, labels))
    n = max(len(labels), 1)
    chances = [float((x / n) @ (true / n)) for x in (given, true)]
    return Score(int((outputs == labels).sum()), len(labels), int(true.max()), *chances)


def validate_above_chance(found: Score, num_classes: int, subject: str = "the teacher") -> None:
    """Raise UserError unless a network is right more often than guesses are.

    It must be right on more images than one that always names the most frequent class, and more
    often than its own outputs would be if they had nothing to do with the images: one-sided
    binomial p <= .01 at `found.chance`, at least 1 / `num_classes`. Where classes are few or nearly
    all images are of one, that is less strict than the binomial test at the share of that class,
    which even a perfect network may not pass. A constant output passes neither.
    """
    hits, n, majority = found.hits, found.n, found.majority
    take = "or teacher.trust=true to take it all the same"
    if binomial_tail(n, n, max(found.best_chance, 1 / num_classes)) > LEAST_P:
        raise UserError(
            f"{subject} was asked about {n} training images, {majority} of them of one class: too"
            " few images to tell knowing the classes from guessing, even if all outputs were right;"
            f" type teacher.check_samples=NUMBER for more (as far as there are more), {take}"
        )
    p = binomial_tail(hits, n, max(found.chance, 1 / num_classes))
    if hits > majority and p <= LEAST_P:
        return
    constant = f"no better than always naming the most frequent class ({majority} right)"
    cause = ": its classes, their order or its normalisation are not the data's"
    if p <= LEAST_P:  # then it knows the classes
        why = f"more than guesses are, but it is {constant}"
    elif hits <= majority:
        why = constant + cause
    else:
        why = f"no better than guessing one of {num_classes} classes (p = {p:.2g}){cause}"
    raise UserError(
        f"{subject} is right on {hits} of {n} training images, {why}; give another teacher, type"
        f" teacher=none distill=none, {take}"
    )


def binomial_tail(hits: int, n: int, p: float) -> float:
    """Return P(X >= hits) of n trials with probability p each, summed exactly in log space."""
    if hits <= 0 or p >= 1:
        return 1.0
    log_p, log_q = math.log(p), math.log1p(-p)

    def term(k: int) -> float:
        log_ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(log_ways + k * log_p + (n - k) * log_q)

    return min(1.0, math.fsum(term(k) for k in range(hits, n + 1)))
