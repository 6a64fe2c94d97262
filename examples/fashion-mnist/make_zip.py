"""Turn a pair of Fashion-MNIST's idx files into a zip archive with a folder for each class.

The files come from the Debian package dataset-fashion-mnist, or from torchvision's FashionMNIST
(download=True; they lie in FashionMNIST/raw). Folders are numbered, because "T-shirt/top" cannot be
the name of one, and their order is that of the classes.

    python make_zip.py train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz train.zip
"""

from __future__ import annotations

import gzip
import io
import sys
import zipfile
from pathlib import Path

from PIL import Image

CLASSES = (
    *("0-T-shirt-top", "1-Trouser", "2-Pullover", "3-Dress", "4-Coat"),
    *("5-Sandal", "6-Shirt", "7-Sneaker", "8-Bag", "9-Ankle-boot"),
)


def read(path: Path) -> bytes:
    """The bytes of a file, unpacked if it is packed."""
    content = path.read_bytes()
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def main(images: str, labels: str, out: str) -> None:
    """Write the archive."""
    pixels, classes = read(Path(images))[16:], read(Path(labels))[8:]
    if len(pixels) != 784 * len(classes):
        sys.exit(f"{images} holds {len(pixels) / 784:g} images and {labels} {len(classes)} labels.")
    with zipfile.ZipFile(out, "w") as archive:
        for number, label in enumerate(classes):
            image = Image.frombytes("L", (28, 28), pixels[784 * number : 784 * (number + 1)])
            file = io.BytesIO()
            image.save(file, "png")
            archive.writestr(f"{CLASSES[label]}/{number:05d}.png", file.getvalue())


if __name__ == "__main__":
    main(*sys.argv[1:])
