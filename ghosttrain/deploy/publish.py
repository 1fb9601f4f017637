"""A run as a folder that another library loads: timm's `local-dir:` and `hf-hub:`, or a state dict
for torchvision.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ghosttrain.deploy.network import Deployed
from ghosttrain.engine.fuse import in_library
from ghosttrain.engine.load import load_run
from ghosttrain.engine.run_files import read_result
from ghosttrain.engine.student import has_fused_form
from ghosttrain.errors import UserError
from ghosttrain.files import PACKAGE, write_bytes, write_text
from ghosttrain.models.weights.files import State
from ghosttrain.models.weights.packing import packed
from ghosttrain.text import one_line

LIBRARIES = ("timm", "torchvision")


def publish(source: Deployed, folder: Path, library: str | None) -> str:
    """Write the network of a run into a new or empty folder; return which library loads it.

    With timm: `config.json`, `model.safetensors`, `README.md` (card with metrics in the hub's
    format), `LICENSE`. With torchvision a state dict in place of the first two.

    Args:
        source: the network, of a finished run.
        folder: where to; it may not hold anything.
        library: timm or torchvision; None: timm, and torchvision where timm has no such network.

    Raises:
        UserError: the folder holds something; no library has this network.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to-folder {folder}: give a new or empty folder")
    library, name, state, form = _counterpart(source, library)
    folder.mkdir(parents=True, exist_ok=True)
    if library == "timm":
        _write_timm(folder, source, name, state)
    else:
        write_bytes(folder / "model.safetensors", packed(state, {"format": "pt"}))
    write_text(folder / "README.md", readme(source, library, name, form))
    license_file = PACKAGE.parent / "LICENSE"
    if license_file.is_file():
        shutil.copy(license_file, folder / "LICENSE")
    return library


def _counterpart(source: Deployed, library: str | None) -> tuple[str, str, State, str]:
    """Return library, name there, state dict, and the form it is in.

    Fused where the library has the plain network, else in the training form; a timm model is what
    it is.
    """
    if not has_fused_form(source.config):
        if library == "torchvision":
            raise UserError(f"{source.config.model.name} is a network of timm's, not torchvision's")
        state = load_run(source.folder, "ema").state_dict()
        return "timm", source.config.model.name, {k: v.cpu() for k, v in state.items()}, "trained"
    model = load_run(source.folder, "ema")
    refusals: list[UserError] = []
    for wanted in [library] if library else LIBRARIES:
        try:
            form, name, state = in_library(model, source.alone, wanted)
            return wanted, name, state, form
        except UserError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _write_timm(folder: Path, source: Deployed, name: str, state: State) -> None:
    """Write what timm's own loader reads, by timm's own writer."""
    import timm
    from timm.models import save_for_hf

    data, classes = source.config.data, source.classes
    model = timm.create_model(name, num_classes=len(classes), in_chans=data.in_chans)
    model.load_state_dict(state, strict=True)
    about = {
        "input_size": [data.in_chans, data.eval_size, data.eval_size],
        "fixed_input_size": False,
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
        "mean": list(data.mean),
        "std": list(data.std),
        "num_classes": len(classes),
        "label_names": classes,
    }
    save_for_hf(model, str(folder), model_config={"pretrained_cfg": about}, safe_serialization=True)


def readme(source: Deployed, library: str, name: str, form: str) -> str:
    """Return the card of a published folder: what the hub reads first, then what a person does."""
    config, data = source.config, source.config.data
    result = read_result(source.folder)
    assert result is not None
    row = result["weights"]["fused" if form == "fused" else result["headline"]]
    top1, top5 = (round(float(row[key]), 2) for key in ("top1", "top5"))
    head = {
        "library_name": "timm" if library == "timm" else "pytorch",
        "license": "apache-2.0",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", library, "ghosttrain", "knowledge-distillation"],
        "model-index": [
            {
                "name": folder_name(source),
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": f"{data.name} (held out)", "type": data.name},
                        "metrics": [
                            {"type": "accuracy", "name": "Top-1 Accuracy", "value": top1},
                            {"type": "accuracy", "name": "Top-5 Accuracy", "value": top5},
                        ],
                    }
                ],
            }
        ],
    }
    import yaml

    if library == "timm":
        use = (
            "import timm\n\n"
            'model = timm.create_model("local-dir:THIS/FOLDER", pretrained=True).eval()\n'
            "data = timm.data.resolve_model_data_config(model)\n"
            "transform = timm.data.create_transform(**data, is_training=False)"
        )
    else:
        use = (
            "import safetensors.torch, torchvision\n\n"
            f"model = torchvision.models.get_model({name!r}, num_classes={len(source.classes)})\n"
            'state = safetensors.torch.load_file("THIS/FOLDER/model.safetensors")\n'
            "model.load_state_dict(state)"
        )
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"""---
{front}---

# {folder_name(source)}

`{name}` of {library}, {form}: trained by ghosttrain with the recipe `{config.recipe}` on
{data.name}. Top-1 {top1:.2f} %, top-5 {top5:.2f} % on {result["data"]["held_out"]["images"]:,}
held-out images at {data.eval_size} px ({row["n"]:,} counted).

```python
{use}
```

An image is resized to {int(data.eval_size / data.crop_pct)} px (shorter side,
{data.interpolation}), cropped to {data.eval_size} x {data.eval_size} px, and normalised: mean
{json.dumps(list(data.mean))}, std {json.dumps(list(data.std))}, of pixels in [0, 1].

The licence file is that of the code that trained it; the data may have terms of their own.
"""


def folder_name(source: Deployed) -> str:
    """Return what a published network is called: model and recipe."""
    return f"{source.config.model.name}.{str(source.config.recipe).replace('/', '_')}"


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder to the hub as the model `name`, which is made where it is missing; return its
    address.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"--to-hub {name}: the hub could not be reached or refuses "
            f"({one_line(error)[:200]}): type huggingface-cli login; the folder is "
            f"{folder}"
        ) from None
    return str(address)


def listed_files(folder: Path) -> list[str]:
    """Return the files of a folder with their sizes, for a dry run."""
    return [f"  {path.name}  {path.stat().st_size:,} bytes" for path in sorted(folder.iterdir())]
