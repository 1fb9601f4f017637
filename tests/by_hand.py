"""A run that can be computed a second way: a network without batch statistics, and the training
loop written out from the definitions, in float64.

The command line runs it (`run`), `loop` repeats it. What both share is the order of the samples
(`train_batches`), the seed of the dropout of a step (`mix`) and autograd; learning rate, weight
decay, LAMB, averaging, label smoothing, normalisation and accuracy are written here once more.
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn import metrics
from torch import Tensor, nn

from ghosttrain.cli import main
from ghosttrain.data.order import mix, train_batches

CLASSES, TRAIN, HELD_OUT, SIDE = 7, 4, 3, 16
BATCH, EPOCHS, SEED = 12, 5, 1
STEPS_PER_EPOCH = CLASSES * TRAIN // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH
WARMUP, WARMUP_RATIO, MIN_RATIO = 2, 0.2, 0.05
LR, LR_BATCH, DECAY, BETA1, BETA2, EPS = 0.1, 48, 0.1, 0.8, 0.95, 1e-5
SMOOTHING, CLIP, EMA_DECAY = 0.2, 0.4, 0.35
LABEL_WEIGHTS = 0.5, 2.0  # at the start of the run and at its end
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Plain(nn.Module):
    """Images (B, 3, 16, 16) -> logits (B, K); without batch norm no image's answer depends on
    another image."""

    def __init__(
        self,
        num_classes: int,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float64,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(8, num_classes)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.to(self.conv.weight.dtype)))
        return self.classifier(self.dropout(x.tanh().amax((2, 3))))


def make_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", HELD_OUT)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8)
                for channel in range(3):  # the colour says the class
                    pixels[..., channel] += 55 * (label + 1 >> channel & 1)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def run(images: Path, root: Path, *settings: str) -> int:
    """Run the command line on these images; return its exit code."""
    with contextlib.redirect_stdout(io.StringIO()):
        return main(
            [
                "+recipe=compact_kd",
                "model=mobilenetv2_050",
                "teacher=none",
                "distill=none",
                "augment=none",
                "data=folder",
                "budget=full",
                f"data.root={images}",
                f"data.train_size={SIDE}",
                f"data.eval_size={SIDE}",
                "data.crop_pct=1.0",
                f"data.mean={list(MEAN)}".replace(" ", ""),
                f"data.std={list(STD)}".replace(" ", ""),
                "data.workers=0",
                f"train.global_batch={BATCH}",
                f"train.epochs={EPOCHS}",
                f"train.label_smoothing={SMOOTHING}",
                f"distill.label_weight=[[0,{LABEL_WEIGHTS[0]}],[1,{LABEL_WEIGHTS[1]}]]",
                f"optim.lr={LR}",
                f"optim.lr_batch={LR_BATCH}",
                f"optim.weight_decay={DECAY}",
                f"optim.beta1={BETA1}",
                f"optim.beta2={BETA2}",
                f"optim.eps={EPS}",
                f"optim.clip_grad={CLIP}",
                f"schedule.warmup_epochs={WARMUP / STEPS_PER_EPOCH}",
                f"schedule.warmup_lr_ratio={WARMUP_RATIO}",
                f"schedule.min_lr_ratio={MIN_RATIO}",
                f"ema.decay={EMA_DECAY}",
                "tracker.log_every=1",
                "launch.device=cpu",
                f"seed={SEED}",
                f"run.root={root}",
                *settings,
            ]
        )


def pixels(images: Path, split: str) -> tuple[Tensor, np.ndarray]:
    """Return images (N, 3, 16, 16), normalised float32 as the student's are, and labels (N,)."""
    arrays, labels = [], []
    for label, folder in enumerate(sorted((images / split).iterdir())):
        for file in sorted(folder.iterdir()):
            arrays.append(np.array(Image.open(file), np.float64) / 255)
            labels.append(label)
    normalised = (np.stack(arrays) - MEAN) / STD
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2)), np.array(labels)


def lr_of(step: int) -> float:
    peak = LR * math.sqrt(BATCH / LR_BATCH)
    if step < WARMUP:
        return peak * (WARMUP_RATIO + (1 - WARMUP_RATIO) * step / WARMUP)
    done = (step - WARMUP) / (STEPS - 1 - WARMUP)
    return peak * (MIN_RATIO + (1 - MIN_RATIO) * 0.5 * (1 + math.cos(math.pi * done)))


def loop(
    images: Path,
    dropout: float = 0.0,
    micro_batch: int = BATCH,
    ranks: int = 1,
    batch_norm: bool = False,
    ema_warmup: bool = True,
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Return the loss of every step, the weights after the last, and their average.

    The statistics of a batch norm are each rank's own within an epoch, and their mean after it.
    """
    x, labels = pixels(images, "train")
    targets = torch.from_numpy(np.eye(CLASSES)[labels]) * (1 - SMOOTHING) + SMOOTHING / CLASSES
    torch.manual_seed(SEED)
    model = Plain(CLASSES, dropout, batch_norm=batch_norm).train()
    names, weights = zip(*model.named_parameters(), strict=True)
    decayed = {name: name in ("conv.weight", "classifier.weight") for name in names}
    first = [torch.zeros_like(p) for p in weights]
    second = [torch.zeros_like(p) for p in weights]
    average = [p.detach().clone() for p in weights]
    buffers = {k: b for k, b in model.named_buffers() if b.is_floating_point()}
    per_rank = [{k: b.clone() for k, b in buffers.items()} for _ in range(ranks)]
    own_average = [{k: b.clone() for k, b in buffers.items()} for _ in range(ranks)]
    losses = []
    for step in range(STEPS):
        epoch, done = divmod(step, STEPS_PER_EPOCH)
        t = step + 1
        d = min(EMA_DECAY, t / (9 + t)) if ema_warmup else EMA_DECAY
        start, end = LABEL_WEIGHTS
        weight = start + (end - start) * step / STEPS
        total = 0.0
        model.zero_grad()
        for rank in range(ranks):
            numbers = train_batches(
                len(x), SEED, epoch, BATCH, micro_batch, rank, ranks, start_step=done
            )
            torch.manual_seed(mix(SEED, step, rank))
            for k, b in buffers.items():
                b.copy_(per_rank[rank][k])
            for _ in range(BATCH // (micro_batch * ranks)):
                batch = next(numbers)
                log_q = model(x[batch]).log_softmax(1)
                loss = -weight * (targets[batch] * log_q).sum() / BATCH
                loss.backward()
                total += loss.item()
            for k, b in buffers.items():
                per_rank[rank][k] = b.clone()
                own_average[rank][k] = d * own_average[rank][k] + (1 - d) * b
        losses.append(total)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in weights))
        scale = min(1.0, CLIP / (norm + 1e-6))
        with torch.no_grad():
            for i, (name, p) in enumerate(zip(names, weights, strict=True)):
                g = p.grad * scale
                first[i] = BETA1 * first[i] + (1 - BETA1) * g
                second[i] = BETA2 * second[i] + (1 - BETA2) * g * g
                u = first[i] / (1 - BETA1**t) / ((second[i] / (1 - BETA2**t)).sqrt() + EPS)
                ratio = 1.0
                if decayed[name]:
                    u = u + DECAY * p
                    ratio = float(p.norm() / u.norm())
                p -= lr_of(step) * ratio * u
                average[i] = d * average[i] + (1 - d) * p
        if done + 1 == STEPS_PER_EPOCH:
            per_rank = [mean_of(per_rank) for _ in range(ranks)]
            own_average = [mean_of(own_average) for _ in range(ranks)]
    raw = {name: p.detach() for name, p in zip(names, weights, strict=True)}
    return losses, raw | per_rank[0], dict(zip(names, average, strict=True)) | own_average[0]


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([state[k] for state in states]).mean(0) for k in states[0]}


def accuracy(images: Path, weights: dict[str, Tensor]) -> dict[str, float]:
    """Return what a result holds of the held-out images, in scikit-learn's numbers."""
    x, labels = pixels(images, "val")
    model = Plain(CLASSES).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(x)
    best = np.argsort(-logits.numpy(), axis=1, kind="stable")
    hits, guess = best == labels[:, None], best[:, 0]
    chances = logits.double().softmax(1).numpy()
    top1, top5 = int(hits[:, 0].sum()), int(hits[:, :5].sum())
    edges = np.digitize(chances.max(1), np.linspace(0, 1, 16)[1:-1])
    gaps = [abs((hits[:, 0] - chances.max(1))[edges == b].sum()) for b in range(15)]
    return {
        "top1": 100 * top1 / len(x),
        "top5": 100 * top5 / len(x),
        "n": len(x),
        "balanced": 100 * metrics.balanced_accuracy_score(labels, guess),
        "macro_f1": 100 * metrics.f1_score(labels, guess, average="macro"),
        "ece": 100 * sum(gaps) / len(x),
        "loss": metrics.log_loss(labels, chances, labels=range(CLASSES)),
    }


def difference(first: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest relative difference of a tensor; counters are left out."""
    first = {name: value.double() for name, value in first.items() if value.is_floating_point()}
    assert first.keys() == {name for name, value in other.items() if value.is_floating_point()}
    return max(float((first[k] - other[k]).norm() / other[k].double().norm()) for k in first)
