"""Randomness that follows from a seed and a place, so that a run can go on anywhere.

Every draw of a training run (which image comes next, how it is cropped, which layers are dropped)
depends on the seed and on its place in the run alone: the epoch and the image, or the step and the
process. Nothing has to be remembered to continue bit for bit, and an image is augmented in the same
way whatever process or worker reads it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_at(seed: int, *place: int | str) -> int:
    """A 63-bit seed for one place in a run."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def seed_all(seed: int, *place: int | str) -> None:
    """Seed Python, NumPy and torch, on every device, for one place in a run.

    timm's mixup and augmentations draw from NumPy's old global generator.
    """
    import numpy as np

    value = seed_at(seed, *place)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.manual_seed(value)


@contextmanager
def seeded(seed: int, *place: int | str) -> Iterator[None]:
    """Seed the generators that transforms draw from, and put them back afterwards."""
    import numpy as np

    # Not torch.manual_seed and fork_rng: they would reach for the device of the training process.
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    value = seed_at(seed, *place)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
