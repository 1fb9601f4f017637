"""Words about a run: the first lines of its log, the sizes of its model, its card."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghosttrain.config.identity import run_name
from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset
from ghosttrain.distill.pretrained import networks
from ghosttrain.engine import distributed
from ghosttrain.engine.folder import result_lines
from ghosttrain.engine.plan import Plan
from ghosttrain.models.moments import compiled
from ghosttrain.models.profile import count_macs, count_params


def head(
    config: Config,
    plan: Plan,
    run: Path,
    train_set: Dataset,
    held_out: Dataset,
    student: nn.Module,
    about_teacher: str,
    device: torch.device,
    notes: list[str],
) -> list[str]:
    """Return the first lines of a run: what is trained on what, and what differs from the recipe as
    published.
    """
    data, optim, ranks = config.data, config.optim, distributed.world_size()
    lines = [f"run folder: {run}"]
    lines.append(f"data: {train_set.describe()}; held out {len(held_out)}")
    if data.name == "digits":
        lines.append(
            "  no other data was named, so this is the embedded set; ImageNet: type data=imagenet "
            "data.root=/path"
        )
    lines += [f"  {note}" for note in (*train_set.notes, *held_out.notes)]
    lines += notes
    lines.append(
        f"student: {config.model.name}, {count_params(student) / 1e6:.3f} M parameters in training "
        "form"
    )
    if config.model.weights:
        said = (getattr(student, "weights_dialect", "timm"), getattr(student, "weights_note", ""))
        lines.append(f"weights: {config.model.weights} ({'; '.join(filter(None, said))})")
    lines.append(f"teacher: {about_teacher}")
    seen = "seen by batch norm" + (", of all ranks together" if config.train.sync_bn else "")
    lines.append(
        f"batch: {config.train.global_batch} = {plan.micro_batch} ({seen}) x {plan.accumulation} "
        f"accumulated x {ranks} {'process' if ranks == 1 else 'processes'}, on "
        f"{device_name(device)}"
    )
    scaled = "as set"
    if optim.lr_batch is not None and optim.lr_batch != config.train.global_batch:
        rule = "linear" if optim.name == "sgd" else "square root"
        scaled = (
            f"{optim.lr:g} at batch {optim.lr_batch}, scaled by the {rule} rule; optim.lr=X sets it"
        )
    lines.append(f"optimizer: {optim.name}, learning rate {plan.lr:.3g} ({scaled})")
    lines.append(
        f"length: {plan.total_steps} steps, {plan.epochs} epochs of {plan.steps_per_epoch}; "
        f"warm-up {plan.warmup_steps} steps"
    )
    return [*lines, *filter(None, [plan.long_warmup()])]


def sizes(config: Config, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return parameters and MACs of the training form and of the fused form (of the same model, if
    it has none).
    """
    trained, size, chans = models["ema"], config.data.eval_size, config.data.in_chans
    fused = models.get("fused", trained)
    return {
        "name": config.model.name,
        "params_train": count_params(trained),
        "params_fused": count_params(fused),
        "macs_train": count_macs(trained, size, chans),
        "macs_fused": count_macs(fused, size, chans),
        "eval_size": size,
    }


def card(config: Config, result: dict[str, Any], held_out: Dataset, notes: list[str]) -> str:
    """Return the model card of a finished run, as Markdown."""
    table = "\n".join(result_lines(result))
    policy = config.augment.policy
    said = "\n".join(note.replace("  ", "- ", 1) if note[:2] == "  " else note for note in notes)
    asked = networks(config.teacher).values()
    teacher = " + ".join(str(network.name or network.weights or "none") for network in asked)
    mixed = " Mixup/CutMix were on." if policy == "with_mixup" else ""
    return f"""# {run_name(config)}

`{config.model.name}` trained with the recipe `{config.recipe}` on {config.data.name}, seed
{config.seed}, on {result["device"]}. The result is the final EMA weights on {len(held_out)}
held-out images.

```
{table}
```

![curves](curves.png)

{said}
Teacher: {teacher} ({config.distill.name}). Augmentation: `{policy}`.{mixed}

```python
import ghosttrain

model = ghosttrain.load_run("this/folder", weights="ema")  # or "raw", "fused"
```

All settings: `config.yaml`; versions, commit, command: `provenance.json`.
"""


def device_name(device: torch.device) -> str:
    """Return what computes: the GPU, or the processor's architecture, threads and kernels."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads, kernels = torch.get_num_threads(), "on" if compiled("cpu") else "off"
    plural = "s" * (threads > 1)
    return f"CPU ({platform.machine()}, {threads} thread{plural}, C++ kernels {kernels})"
