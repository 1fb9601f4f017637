"""THE loop. `train()` reads top to bottom: set up, build, resume, train, finish.

Legend: a *step* is one optimizer step; it sums the gradients of `plan.accumulation` micro-batches
on each of the ranks. `network` is what is trained: the `student`, and beside it, where a loss
compares features, a projection that is thrown away. `ema.model` is the average of the student.

All randomness is a function of (seed, step, rank) or (augment.seed, draw, sample), so that a run
that was stopped and resumed computes what an uninterrupted one computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ghosttrain.config.identity import run_settings
from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import train_loader
from ghosttrain.data.order import mix
from ghosttrain.distill.features import Network
from ghosttrain.engine import distributed, folder, same_data, skipped, summary, track
from ghosttrain.engine.advice import advice
from ghosttrain.engine.checkpoint import newest_checkpoint, set_damaged_aside
from ghosttrain.engine.conditions import changed_conditions, conditions, settle_threads
from ghosttrain.engine.cuda_graph import record
from ghosttrain.engine.evaluate import Evaluation, HeldOutImages, try_first_batch
from ghosttrain.engine.freeze import freeze_at, freeze_network
from ghosttrain.engine.guard import Guard, skip_note, skipped_steps_note
from ghosttrain.engine.label_loss import class_weights
from ghosttrain.engine.plan import make_plan
from ghosttrain.engine.rows import read_metrics
from ghosttrain.engine.run_files import write_result
from ghosttrain.engine.saving import Saver, validate_room
from ghosttrain.engine.state import TrainState
from ghosttrain.engine.stop import Stop
from ghosttrain.engine.student import has_fused_form, trained_depths
from ghosttrain.engine.teacher_source import TeacherSource
from ghosttrain.engine.watchdog import Watchdog
from ghosttrain.engine.weights_file import describe_weights, weights_bytes, write_weights
from ghosttrain.errors import UserError
from ghosttrain.files import write_text
from ghosttrain.models.ops import computes_in_bf16
from ghosttrain.models.reparam import fuse
from ghosttrain.optim.build import build_optimizer
from ghosttrain.optim.clip import clip_gradients
from ghosttrain.optim.ema import Ema
from ghosttrain.optim.schedule import set_lr, set_weight_decay
from ghosttrain.threads import Neighbours


@dataclass(frozen=True)
class Task:
    """What a run learns: five plain functions, chosen by its settings."""

    build_data: Callable[[DataConfig], tuple[Dataset, Dataset]]
    """Settings -> the training set and the held-out set."""
    build_teacher: Callable[[Config, Dataset, torch.device], TeacherSource]
    """(config, training set, device) -> who teaches, checked on images of that set."""
    build_network: Callable[..., Network]
    """(config, classes, pooled features of the teacher, micro-batch, device) -> what is trained."""
    loss_terms: Callable[..., dict[str, Tensor]]
    """(config, network, teacher, batch, classes=, epoch=, progress=) -> every term of the loss by
    name, weighted, and "loss", their sum. `progress` is the share of the run that is done."""
    evaluate: Callable[..., Evaluation]
    """(models by name, held-out batches, device, number of classes) -> a row of numbers for each
    model, in it the choices of `train.best_by` for this task (higher is better), and more."""


def train(choose: Callable[[Config], Task], config: Config | None, notes: list[str]) -> None:
    """Train one student as `config` says; everything it leaves behind is in the run folder.

    On rank 0 the caller has opened the run folder (`folder.opened`).

    Args:
        choose: settings -> what is learnt.
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
    task = choose(config)
    device = distributed.pick_device(config.launch.device)
    rank, ranks = distributed.rank(), distributed.world_size()
    run = folder.run_folder(config)
    checkpoints = run / "checkpoints"

    # ---------------------------------------------------------------- Data, teacher
    train_set, held_out = task.build_data(config.data)
    classes = train_set.classes
    saved, found, damaged = newest_checkpoint(checkpoints) or (None, None, [])
    if saved is not None:
        folder.validate_settings(run, saved["settings"], config)
    threads, few = settle_threads(device, saved and saved["conditions"])
    notes += few
    neighbours = Neighbours(threads)
    data_record = same_data.validate_same_data(
        saved, same_data.describe_data(train_set, held_out), config.data.changed
    )
    distributed.validate_same(
        "data", same_data.short(data_record), "every machine needs the same images in data.root"
    )
    distributed.validate_same(
        "last checkpoint",
        "none" if saved is None else f"step {saved['step']}",
        "run.root must be a folder that all machines share",
    )
    plan = make_plan(config, len(train_set), ranks, train_set.labels)
    weights_K = class_weights(config.train, train_set.labels, len(classes))
    teacher = task.build_teacher(config, train_set, device)
    watchdog = Watchdog(run, config.train.stall_minutes)
    train_images = train_loader(
        train_set,
        config.data,
        config.augment,
        device,
        channels_last=config.train.channels_last,
        views=teacher.views,
        cached=teacher.cached,
        patience=None,  # the watchdog's
    )
    stop = Stop(device, config.tracker.log_every, watchdog.beat)
    held_images = HeldOutImages(
        held_out, config, device, config.train.eval_batch or plan.micro_batch, stop
    )

    # ---------------------------------------------------------------- Network, optimizer
    torch.manual_seed(config.seed)
    network = task.build_network(config, classes, teacher.num_features, plan.micro_batch, device)
    student = network.student
    trained = trained_depths(student, config)
    optimizer = build_optimizer(config.optim, network, trained)
    ema = Ema(student, config.ema.decay, config.ema.warmup)
    state = TrainState(
        network, optimizer, ema, classes, data_record, settings=run_settings(config),
        total_steps=plan.total_steps, conditions=conditions(plan, device),
        guard=Guard(network, optimizer, ema, on_host=device.type != "cuda"),
    )  # fmt: skip
    if saved is not None and found is not None:
        state.restore(saved, found)
        teacher = teacher.resumed(saved["teacher"])
        notes += [*damaged, f"resumed {plan.place_of(state.step)}"]
        notes += filter(None, [changed_conditions(saved["conditions"], state.conditions)])
        notes += data_record["accepted"]
        saved = None  # its memory

    # ---------------------------------------------------------------- Loop
    tracker = track.Tracker(config, plan, state.step, run if rank == 0 else None)
    about = summary.Description(config, plan, train_set, held_out, data_record, teacher.about)
    kind = describe_weights(config, classes, "ema")
    network.train()
    frozen = freeze_at(config.model.freeze, state.step / plan.total_steps)
    freeze_network(student, frozen)
    autocast = mixed_precision(config.train.precision, device)
    if config.train.compile:
        network.compile()
    replica = distributed.parallel(network, device)
    if config.train.cuda_graph:
        replica = record(network, config, plan.micro_batch, autocast)
    if rank == 0:
        validate_room(checkpoints, state.bytes())
        set_damaged_aside(checkpoints, found)
        same_data.write_split(run, config.data, train_set, held_out)
    saver = Saver(config.train, checkpoints, state.step, device, tracker.sync, tracker.say)
    seen = {"train": (train_set, train_images), "held_out": (held_out, held_images.loader)}
    started, meter = time.perf_counter() - state.seconds, state.meter

    def save() -> None:
        if saver.is_over:
            return  # the last state is copied, and the other ranks are gone
        say_skips()
        validate_weights()
        state.seconds = time.perf_counter() - started
        saver.save(state.step, lambda: state.snapshot(teacher.state()))

    def validate_weights() -> None:
        # No sum of squares that fits into float32: also weights that are about to overflow.
        norm = nn.utils.get_total_norm([t.float() for t in state.tensors()])
        if distributed.any_of(not norm.isfinite()):
            roll_back(f"the weights are not finite at step {state.step:,}")

    def say_skips() -> None:
        if skips := state.guard.read():
            tracker.say(skip_note(skips))
        for skip in skips:
            tracker.note("skipped", skip.step, skip.facts())

    def roll_back(why: str) -> None:
        saver.wait()
        distributed.barrier()
        # Of two with the same weights as now, the older one would change nothing either.
        older = newest_checkpoint(checkpoints, taken_before=state.guard.last_taken)
        newest, path, _ = older or newest_checkpoint(checkpoints) or (None, None, [])
        distributed.validate_same(
            "checkpoint to go back to",
            str(newest and newest["step"]),
            "is run.root a shared folder?",
        )
        # Since the last time a step must have been taken and saved.
        if newest is None or path is None or not state.guard.has_gone_on(newest.get("guard", {})):
            raise UserError(f"{why}: {_diverged(run)}")
        state.roll_back(newest, path)
        tracker.say(
            f"note: {why}: the run goes back to the weights of step {newest['step']:,}; it goes on "
            "with the images that follow"
        )

    with train_images, held_images, tracker, saver, watchdog, stop.saving(save):
        distributed.wait_at_most(config.train.stall_minutes + 1)  # the watchdog is first
        if rank == 0:
            tracker.say(*summary.head(about, student, notes), *tracker.about())
        try_first_batch(student, held_images)
        row: track.Row = {}
        by = config.train.best_by
        while True:
            # -------------------------------------------------------- Evaluate what was saved
            words = [track.describe(row), f"ETA {tracker.eta(state.step)}"] if row else []
            if plan.is_evaluated(state.step):
                both = {"raw": student, "ema": ema.model}
                table = task.evaluate(both, held_images, device, len(classes)).table
                tracker.log("eval", state.step, track.eval_row(table))
                words.append(track.describe_eval(table, by))
                if table["ema"][by] > state.best.get(by, -1):
                    state.best = {by: table["ema"][by], "epoch": plan.epochs_after(state.step)}
                    if rank == 0:
                        saver.add(checkpoints / "best.safetensors", weights_bytes(ema.model, kind))
            if words:
                tracker.say("  ".join([plan.epoch_label(state.step), *words]))
            if config.data.on_error == "skip":
                tracker.say(*skipped.list_skipped(run, seen))
            if state.step >= plan.total_steps:
                break

            # -------------------------------------------------------- Train one epoch
            epoch = plan.epoch_of(state.step)
            batches = train_images.batches(
                plan.batches(state.step, rank),
                draw_number=teacher.draw_number(epoch),
                size=config.data.train_size_at(plan.begin_of(epoch) / plan.total_steps),
            )
            meter.start()
            while state.step < plan.end_of(epoch):
                lr = plan.lr_at(state.step)
                set_lr(optimizer, lr)
                set_weight_decay(optimizer, plan.weight_decay_at(state.step))
                torch.manual_seed(mix(config.seed, state.step, rank))
                progress = state.step / plan.total_steps
                if (now := freeze_at(config.model.freeze, progress)) != frozen:
                    frozen = now
                    freeze_network(student, frozen)
                    replica = distributed.parallel(network, device)
                state.guard.begin()
                for part in range(plan.accumulation):
                    batch = next(batches)
                    with distributed.no_sync(replica, part + 1 < plan.accumulation):
                        with autocast():
                            terms = task.loss_terms(
                                config, replica, teacher, batch,
                                classes=classes, epoch=epoch, progress=progress,
                                class_weights=weights_K,
                            )  # fmt: skip
                        state.guard.backward(terms, batch.indices, plan.accumulation)
                    meter.add(terms, len(batch.images) * ranks)
                if state.guard.passes(state.step + 1):
                    clip_gradients(config.optim, network, student)
                    optimizer.step()
                    ema.update(student)
                meter.end_step(state.guard.end())
                optimizer.zero_grad(set_to_none=not config.train.cuda_graph)
                state.step += 1
                if state.step % config.tracker.log_every == 0 or state.step == plan.end_of(epoch):
                    say_skips()
                    if state.guard.longest > config.train.max_skips:
                        roll_back(
                            f"{state.guard.longest} steps in a row were skipped before step "
                            f"{state.step + 1:,} (train.max_skips={config.train.max_skips})"
                        )
                    if read := meter.read():
                        row = read | {"lr": lr}
                        tracker.log("train", state.step, row)
                    if state.step < plan.end_of(epoch) and saver.is_due(state.step):
                        save()
                if state.step < plan.end_of(epoch):
                    stop.poll(state.step)

            tracker.say(*train_images.slow_note(), *neighbours.note())

            # -------------------------------------------------------- Save
            # Before the evaluation, which a resumed run repeats: it may fail.
            validate_weights()
            distributed.average_buffers(student, ema.model)
            stop.poll(state.step)
            if state.step >= plan.total_steps or saver.is_due(state.step, epoch + 1):
                save()

        # ------------------------------------------------------------ Finish
        models: dict[str, nn.Module] = {"raw": student, "ema": ema.model}
        if has_fused_form(config):
            models["fused"] = fuse(ema.model)
        found_last = task.evaluate(models, held_images, device, len(classes))
        if rank == 0:
            measured = summary.Measured(found_last, models, time.perf_counter() - started)
            result = summary.result(about, state, measured)
            result["notes"] = advice(config, read_metrics(run), result, plan.steps_per_epoch)
            result["skipped"] = skipped.count_skipped(run)
            result["notes"] += skipped.skipped_note(**result["skipped"])
            result["skipped_steps"] = state.guard.skipped
            result["notes"] += skipped_steps_note(state.guard.skipped)
            saver.finish(stop.poll_alone)
            tracker.say(f"checkpoints: training waited {saver.waited:.2f} s for them")
            write_weights(run / "model.safetensors", ema.model, kind)
            tracker.draw_curves(folder.run_name(config))
            tracker.draw_confusion(result["classes"], folder.run_name(config))
            tracker.summarize(result)
            write_text(run / "card.md", summary.card(about, result, notes))
            tracker.sync()
            write_result(run, result)
            tracker.say("", *folder.result_lines(result), f"run folder: {run}")
    distributed.stop()


def mixed_precision(setting: str, device: torch.device) -> Callable[[], torch.autocast]:
    """Return the autocast context of `train.precision` (auto: bf16 on CUDA, off on the CPU).

    It keeps no copies of weights: a forward uses each once, and a recorded one may keep none.
    """
    enabled = computes_in_bf16(setting, device.type == "cuda")
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=False)


def _diverged(run: Path) -> str:
    kept = " the last good checkpoint is kept;" if folder.has_checkpoint(run) else ""
    return (
        f"training diverged;{kept} try a lower optim.lr, optim.clip_grad=1 or train.precision=fp32"
    )
