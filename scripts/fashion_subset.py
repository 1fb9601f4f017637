"""Write 5,000 training images of Fashion-MNIST, the first 500 of each class, and its test images.

    apt install dataset-fashion-mnist
    python scripts/fashion_subset.py /usr/share/datasets/fashion-mnist data/fashion5000

The data of the studies in docs/results: small enough for runs of a few minutes on one thread.
"""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import numpy as np

EACH = 500
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def main() -> None:
    """Read one folder, write the other."""
    if len(sys.argv) != 3:
        sys.exit("python scripts/fashion_subset.py FOLDER_OF_FASHION_MNIST NEW_FOLDER")
    source, target = map(Path, sys.argv[1:])
    images = np.frombuffer(gzip.open(source / IMAGES).read(), np.uint8, offset=16)
    labels = np.frombuffer(gzip.open(source / LABELS).read(), np.uint8, offset=8)
    images = images.reshape(len(labels), 28, 28)
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == k)[:EACH] for k in range(10)]))
    target.mkdir(parents=True, exist_ok=True)
    sizes = np.array([0x803, len(chosen), 28, 28], ">u4"), np.array([0x801, len(chosen)], ">u4")
    for name, size, part in zip((IMAGES, LABELS), sizes, (images, labels), strict=True):
        with gzip.GzipFile(target / name, "wb", mtime=0) as file:
            file.write(size.tobytes() + part[chosen].tobytes())
    for path in source.glob("t10k-*"):
        shutil.copyfile(path, target / path.name)
    print(f"{len(chosen):,} training images in {target}")


if __name__ == "__main__":
    main()
