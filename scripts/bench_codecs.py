"""What a stored teacher output keeps: every codec on crops of photos, in ImageNet's 1000 classes.

python scripts/bench_codecs.py            # needs the extra "teachers"; about 2 minutes on a CPU

The photos are those that ship with scikit-learn and, where it is installed, scikit-image; the crops
are augmented as the recipe does (RandAugment, RandomErasing).
"""

import importlib.util
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.imagenet_info import ImageNetInfo

from ghosttrain.config.schema import AugmentConfig, DataConfig, TeacherConfig
from ghosttrain.data.augment import normalise, train_transform
from ghosttrain.distill.codecs import candidates, make_codec, measure
from ghosttrain.distill.losses import soft_ce
from ghosttrain.distill.teacher import build_teacher
from ghosttrain.distill.teacher_output import TeacherOutput, concatenated

PHOTOS = ("chelsea.png", "coffee.png", "camera.png", "motorcycle_left.png", "rocket.jpg")
SAMPLES, TEMPERATURES = 360, (1.0, 2.0, 4.0)

torch.set_num_threads(1)
photos = [Image.fromarray(photo) for photo in load_sample_images().images]
if spec := importlib.util.find_spec("skimage"):
    folder = Path(str(spec.origin)).parent / "data"
    photos += [Image.open(folder / name).convert("RGB") for name in PHOTOS]
data = DataConfig()
cfg = TeacherConfig(name="tf_efficientnet_lite2", weights="efficientnet-lite")
teacher = build_teacher(cfg, ImageNetInfo("imagenet-1k").label_names(), data, "cpu")
assert teacher is not None
(view,) = teacher.views
transform = train_transform(data, AugmentConfig(), [view])
mean, std = torch.tensor(data.mean), torch.tensor(data.std)


def ask(draw: int) -> TeacherOutput:
    """Return the output for one draw of every sample."""
    outputs = []
    for index in range(SAMPLES):
        photo = photos[index % len(photos)]
        image, larger = transform(photo.copy, draw, index)
        outputs.append(teacher(normalise(image[None], mean, std), {view: larger[None]}))
    return concatenated(outputs)


output, other = ask(0), ask(1)
students = {"uniform": torch.zeros_like(output.logits), "another draw": other.logits}
weight, bias = teacher.classifier()
tables = {"weight": weight, "bias": bias, "mean": output.logits.softmax(1).mean(0)}
print(
    f"{SAMPLES} crops of {len(photos)} photos, EfficientNet-Lite2, soft cross-entropy; the worse of"
)
print("a uniform student and of the teacher on another draw\n")
print(
    "| codec | bytes | "
    + " | ".join(f"loss error, cosine at T = {t:g}" for t in TEMPERATURES)
    + " |"
)
print("|---" * (2 + len(TEMPERATURES)) + "|")
for name in candidates(1000, teacher.widths):
    codec = make_codec(name, 1000, teacher.widths, tables)
    cells = []
    for temperature in TEMPERATURES:

        def loss(student, target, part, temperature=temperature):
            return soft_ce(student, target, temperature)

        quality = measure(codec, output, students, [loss])
        cells.append(f"{100 * quality.loss_error:.1f} %, {quality.cosine:.4f}")
    print(f"| `{name}` | {codec.bytes_per_image} | " + " | ".join(cells) + " |")
