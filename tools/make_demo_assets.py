"""Write the embedded Fashion-MNIST images: the first images of each class of the test split.

Usage: python tools/make_demo_assets.py /usr/share/datasets/fashion-mnist
The data set comes from the Debian package dataset-fashion-mnist; the output is byte for byte
reproducible.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

CLASSES, SIDE = 10, 28
ASSETS = Path(__file__).parents[1] / "src" / "mergence" / "assets"


def main() -> None:
    """Read the test split, keep the first images of each class in test order, write idx files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "source", type=Path, help="folder with t10k-{images-idx3,labels-idx1}-ubyte.gz"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--per-class", type=int, default=200)
    args = parser.parse_args()

    # An idx file is a big-endian header (magic number, one length a dimension) and raw bytes.
    images = gzip.decompress((args.source / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((args.source / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    kept = [i for i, label in enumerate(labels) if labels[:i].count(label) < args.per_class]
    if len(kept) != CLASSES * args.per_class:
        parser.error(f"the split holds fewer than {args.per_class} images of some class")
    size = SIDE * SIDE
    outputs = {
        "fashion_mnist_test_images.idx3-ubyte.gz": struct.pack(">4i", 0x803, len(kept), SIDE, SIDE)
        + b"".join(images[i * size : (i + 1) * size] for i in kept),
        "fashion_mnist_test_labels.idx1-ubyte.gz": struct.pack(">2i", 0x801, len(kept))
        + bytes(labels[i] for i in kept),
    }
    for name, content in outputs.items():
        # Without a time stamp the same images always give the same file.
        packed = gzip.compress(content, compresslevel=9, mtime=0)
        (args.out / name).write_bytes(packed)
        print(f"{args.out / name}: {len(kept)} images, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
