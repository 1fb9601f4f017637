"""THE loop. `train()` reads top to bottom: set up, build, resume, train, finish.

Legend: B images of one micro-batch, C channels, H W pixels, K classes. A *step* is one optimizer
step; it sums the gradients of `plan.accumulation` micro-batches on each of the ranks.

All randomness is a function of (seed, step, rank) or (augment.seed, draw, sample), so that a run
that was stopped and resumed computes what an uninterrupted one computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghosttrain.config.errors import UserError
from ghosttrain.config.schema import Config
from ghosttrain.data.augment import View, mix_batch
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import Batch, eval_loader, train_loader
from ghosttrain.data.order import mix, train_batches
from ghosttrain.distill.features import WithFeatures, pooled_width
from ghosttrain.distill.losses import LOSSES, agreement, at, features
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.engine import distributed, folder, same_data, summary, track
from ghosttrain.engine.checkpoint import (
    build_student,
    can_fuse,
    describe_weights,
    load_into,
    load_state,
    save_state,
    save_weights,
)
from ghosttrain.engine.evaluate import evaluate, held_out_batches, try_first_batch
from ghosttrain.engine.plan import make_plan
from ghosttrain.engine.teacher_source import build_teacher_source
from ghosttrain.models.collapse import synchronize
from ghosttrain.models.reparam import fuse
from ghosttrain.models.timm_sides import check_timm_sides
from ghosttrain.optim.build import build_optimizer
from ghosttrain.optim.ema import Ema
from ghosttrain.optim.schedule import lr_at, set_lr

NO_BEST = {"top1": -1.0, "epoch": 0}


def train(config: Config | None, notes: list[str]) -> None:
    """Train one student as `config` says; everything it leaves behind is in the run folder.

    On rank 0 the caller has opened the run folder (`folder.opened`).

    Args:
        config: all settings on rank 0; None on the other ranks, which receive rank 0's.
        notes: lines for the head of the log.

    Raises:
        UserError: data, teacher, weights or run folder are not as the settings say; training
            diverged.
    """
    # ---------------------------------------------------------------- Set up
    distributed.start()
    config = distributed.broadcast(config)
    if config is None:  # rank 0 found a finished run
        return distributed.stop()
    device = distributed.pick_device(config.launch.device)
    rank, ranks = distributed.rank(), distributed.world_size()
    run = folder.run_folder(config)

    # ---------------------------------------------------------------- Data, teacher
    train_set, held_out = build_datasets(config.data)
    classes, n = train_set.classes, len(train_set)
    last = run / "checkpoints" / "last.pt"
    saved = load_state(last) if last.is_file() else None
    data = same_data.check_same_data(
        saved, same_data.listings(train_set, held_out), config.data.changed
    )
    plan = make_plan(config, n, ranks)
    teacher = build_teacher_source(config, train_set, device)
    train_images = train_loader(
        train_set,
        config.data,
        config.augment,
        device,
        config.train.channels_last,
        teacher.views,
        teacher.cached,
    )
    held_images = eval_loader(held_out, config.data, device, config.train.channels_last)
    eval_batch = config.train.eval_batch or plan.micro_batch

    # ---------------------------------------------------------------- Student, optimizer
    torch.manual_seed(config.seed)
    student = build_student(config, classes)
    if config.model.source == "timm":
        check_timm_sides(student, config.model.name, len(classes), config.data, plan.micro_batch)
    student = student.to(device)
    if config.train.channels_last:
        student = student.to(memory_format=torch.channels_last)
    if config.train.sync_bn:
        student = synchronize(student)
    learner: nn.Module = student
    projection = nn.Module()  # nothing to train or to save
    if config.distill.features_weight:
        learner = with_features(config, student, teacher.num_features).to(device)
        projection = learner.project
    optimizer = build_optimizer(config.optim, learner)
    ema = Ema(student, config.ema.decay, config.ema.warmup)

    # ---------------------------------------------------------------- Resume
    step, seconds, best = 0, 0.0, NO_BEST
    if saved is not None:
        step, seconds, best = saved["step"], saved["seconds"], saved["best"]
        if saved["data"]["held_out"] != data["held_out"]:
            best = NO_BEST  # it was measured on other images
        load_into(student, saved["student"], last)
        projection.load_state_dict(saved["projection"])
        ema.load_state_dict(saved["ema"])
        if step < plan.total_steps:
            optimizer.load_state_dict(saved["optimizer"])
        teacher = teacher.resumed(saved["teacher"])
        notes.append(f"resumed after epoch {plan.epochs_after(step)}, step {step}")
        notes += data["accepted"]
        saved = None  # its memory

    # ---------------------------------------------------------------- Loop
    every = config.train.eval_every
    tracker = track.Tracker(
        config,
        run if rank == 0 else None,
        step,
        plan.total_steps,
        evaluates_first=plan.is_evaluated(step, every),
    )
    if config.train.compile:
        learner.compile()
    forward = distributed.parallel(learner, device)
    autocast = mixed_precision(config.train.precision, device)
    started, meter = time.perf_counter() - seconds, track.Meter()
    student.train()
    with train_images, held_images, tracker:
        if rank == 0:
            head = summary.head(
                config, plan, run, train_set, held_out, student, teacher.about, device, notes
            )
            for line in [*head, *tracker.about()]:
                tracker.say(line)
        try_first_batch(student, held_images, len(held_out), eval_batch)
        row: track.Row = {}
        while True:
            # -------------------------------------------------------- Evaluate what was saved
            words = [track.describe(row), f"ETA {tracker.eta(step)}"] if row else []
            if plan.is_evaluated(step, every):
                batches = held_out_batches(held_images, len(held_out), eval_batch)
                table, _ = evaluate({"raw": student, "ema": ema.model}, batches, device)
                top1 = {name: table[name]["top1"] for name in table}
                tracker.log("eval", step, {f"{name}_top1": value for name, value in top1.items()})
                words.append(f"held-out top-1: EMA {top1['ema']:.2f} %, raw {top1['raw']:.2f} %")
                if top1["ema"] > best["top1"]:
                    best = {"top1": top1["ema"], "epoch": plan.epochs_after(step)}
                    if rank == 0:
                        about = describe_weights(config, classes, "ema")
                        save_weights(run / "checkpoints" / "best.safetensors", ema.model, about)
            if words:
                tracker.say("  ".join([f"epoch {plan.epochs_after(step)}/{plan.epochs}", *words]))
            if step >= plan.total_steps:
                break

            # -------------------------------------------------------- Train one epoch
            epoch, done = divmod(step, plan.steps_per_epoch)
            end = min(step - done + plan.steps_per_epoch, plan.total_steps)
            batches = train_images.batches(
                train_batches(
                    n,
                    config.seed,
                    epoch,
                    config.train.global_batch,
                    plan.micro_batch,
                    rank,
                    ranks,
                    start_step=done,
                ),
                draw_number=teacher.draw_number(epoch),
            )
            meter.start()
            while step < end:
                lr = lr_at(step, plan.total_steps, plan.warmup_steps, plan.lr, config.schedule)
                set_lr(optimizer, lr)
                torch.manual_seed(mix(config.seed, step, rank))
                for part in range(plan.accumulation):
                    batch = next(batches)
                    images, views, targets = mixed(batch, len(classes), config, epoch)
                    teacher_output = teacher(images, views, batch.cached)
                    with distributed.no_sync(forward, part + 1 < plan.accumulation):
                        with autocast():
                            losses = objective(
                                config,
                                step / plan.total_steps,
                                forward,
                                teacher_output,
                                images,
                                targets,
                            )
                        (losses["loss"] / plan.accumulation).backward()
                    meter.add(losses, len(images) * ranks)
                if config.optim.clip_grad is not None:
                    nn.utils.clip_grad_norm_(learner.parameters(), config.optim.clip_grad)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                ema.update(student)
                step += 1
                if step % config.tracker.log_every == 0 or step == end:
                    row = meter.read() | {"lr": lr}
                    check_finite(row, step, last)
                    tracker.log("train", step, row)

            # -------------------------------------------------------- Save
            # Before the evaluation, which a resumed run repeats: it may fail.
            distributed.average_buffers(student, ema.model)
            check_weights(student, ema.model, step, last)
            seconds = time.perf_counter() - started
            if rank == 0:
                state: dict[str, Any] = {
                    "student": student.state_dict(),
                    "ema": ema.state_dict(),
                    "projection": projection.state_dict(),
                    "optimizer": optimizer.state_dict() if step < plan.total_steps else {},
                    "step": step,
                    "seconds": seconds,
                    "best": best,
                    "classes": classes,
                    "data": data,
                    "teacher": teacher.state(),
                }
                save_state(last, state)

        # ------------------------------------------------------------ Finish
        models: dict[str, nn.Module] = {"raw": student, "ema": ema.model}
        if can_fuse(config):
            models["fused"] = fuse(ema.model)
        batches = held_out_batches(held_images, len(held_out), eval_batch)
        weights, difference = evaluate(models, batches, device)
        if rank == 0:
            result = {
                "headline": "ema",
                "weights": weights,
                "best": best,
                "fuse_max_diff": difference,
                "model": summary.sizes(config, models),
                "seconds": time.perf_counter() - started,
                "images_per_second": step * config.train.global_batch / seconds,
                "steps": step,
                "data": same_data.without_classes(data),
                "device": summary.device_name(device),
            }
            save_weights(
                run / "model.safetensors", ema.model, describe_weights(config, classes, "ema")
            )
            tracker.draw_curves(folder.run_name(config))
            folder.write_text(run / "card.md", summary.card(config, result, held_out, notes))
            folder.write_json(run / "result.json", result)
            for line in ["", *folder.result_lines(result), f"run folder: {run}"]:
                tracker.say(line)
    distributed.stop()


def objective(
    config: Config,
    progress: float,
    forward: nn.Module,
    teacher_output: TeacherOutput | None,
    images: Tensor,
    targets: Tensor,
) -> dict[str, Tensor]:
    """Return every term of the loss by name, weighted, and their sum as "loss".

    With a teacher there is "agreement" too: the share of images on which the student's best class
    is the teacher's.

    Args:
        config: which terms, their weights and temperature.
        progress: share of the run that is done, in [0, 1]: weights and temperature may follow it.
        forward: returns logits (B, K), or those and projected features (B, F) (`WithFeatures`).
        teacher_output: for these images, or None.
        images: (B, C, H, W) as the student sees them.
        targets: (B, K) class probabilities of the labels.
    """
    distill = config.distill
    output = forward(images)
    logits, projected = output if isinstance(output, tuple) else (output, None)
    # At least float32, whatever autocast says; a network in float64 keeps its precision.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype)
    label = F.cross_entropy(logits, targets, label_smoothing=config.train.label_smoothing)
    losses = {"label": at(distill.label_weight, progress) * label}
    if teacher_output is None:
        return losses | {"loss": losses["label"]}
    term = LOSSES[distill.name](
        logits,
        teacher_output.logits,
        targets.argmax(dim=1),
        at(distill.temperature, progress),
        distill,
    )
    losses[distill.name] = at(distill.weight, progress) * term
    if projected is not None and teacher_output.features is not None:
        term = features(projected, teacher_output.features)
        losses["features"] = at(distill.features_weight, progress) * term
    total = torch.stack(list(losses.values())).sum()
    return losses | {"loss": total, "agreement": agreement(logits, teacher_output.logits)}


def mixed(
    batch: Batch, num_classes: int, config: Config, epoch: int
) -> tuple[Tensor, dict[View, Tensor], Tensor]:
    """Return images, the teacher's views and targets (B, K), after Mixup or CutMix where it is on.

    Views are mixed by the same draw as the images; the targets are those of the images.
    """
    indices = batch.indices.tolist()

    def mix_one(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return mix_batch(pixels, batch.labels, num_classes, config.augment, epoch, indices)

    images, targets = mix_one(batch.images)
    if not (config.augment.mixup_alpha or config.augment.cutmix_alpha):
        return images, batch.views, targets
    return images, {k: mix_one(view.float() / 255)[0] for k, view in batch.views.items()}, targets


def with_features(config: Config, student: nn.Module, teacher_features: int) -> WithFeatures:
    """Return the student with a projection of its pooled features onto the teacher's.

    Raises:
        UserError: the student's classifier is not one linear layer of pooled features.
    """
    data = config.data
    num_features = pooled_width(student, data.in_chans, data.train_size)
    if not num_features:
        raise UserError(
            f"{config.model.name} has no pooled features below one linear layer: type "
            "distill.features_weight=0"
        )
    return WithFeatures(student, num_features, teacher_features)


def mixed_precision(setting: str, device: torch.device) -> Callable[[], torch.autocast]:
    """Return the autocast context of `train.precision` (auto: bf16 on CUDA, off on the CPU)."""
    enabled = setting == "bf16" or (setting == "auto" and device.type == "cuda")
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def check_finite(row: track.Row, step: int, last: Path) -> None:
    """Stop a run whose loss is NaN or infinite, while its `last` checkpoint, if any, is good."""
    bad = [k for k, v in row.items() if v != v or abs(v) == float("inf")]
    if bad:
        raise UserError(f"{bad[0]} is {row[bad[0]]} at step {step}: {_diverged(last)}")


def check_weights(student: nn.Module, averaged: nn.Module, step: int, last: Path) -> None:
    """Never save weights that are NaN or infinite: a run could not go on from them."""
    tensors = [t.detach() for m in (student, averaged) for t in m.state_dict().values()]
    norm = nn.utils.get_total_norm([t.float() for t in tensors])
    if not norm.isfinite():
        raise UserError(f"the weights are not finite at step {step}: {_diverged(last)}")


def _diverged(last: Path) -> str:
    kept = " the checkpoint of the last epoch is kept;" if last.is_file() else ""
    return (
        f"training diverged;{kept} try a lower optim.lr, optim.clip_grad=1 or train.precision=fp32"
    )
