"""Accuracy of the dense and of each reduced path, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergence.data import Batch, Lost, Skipped
from mergence.devices import stop_training
from mergence.distances import kl_divergence
from mergence.errors import DataError
from mergence.outputs import answer
from mergence.train.feed import Feed
from mergence.train.stream import StreamFeed


@dataclass(frozen=True)
class Score:
    """How one path does on the validation images.

    Attributes:
        top1: Percent of images whose label is the first guess.
        loss: Mean cross entropy, in nats.
        agreement: Percent of images with the first guess of what it is compared with.
        kl: Mean Kullback-Leibler divergence from that, in nats.
    """

    top1: float
    loss: float
    agreement: float
    kl: float


class Examiner:
    """What a fixed teacher says to the validation images: asked once, compared with every epoch.

    Args:
        teacher: The teacher.
        room: How many numbers to keep, 1 GiB of them; it is asked again about what has no room.
    """

    def __init__(self, teacher: nn.Module, room: int = 2**28) -> None:
        self._teacher, self._room = teacher, room
        self._said: dict[int, tuple[list[str], Tensor]] = {}

    def known(self, number: int, names: list[str], x: Tensor) -> Tensor:
        """The teacher's answers `[B, K]`, in float32.

        Args:
            number: The batch's place in the epoch, which is the same in every epoch.
            names: What its images are called: one that cannot be read now and then is left out.
            x: The images `[B, C, H, W]`.
        """
        before, answers = self._said.get(number, ([], None))
        if answers is None or before != names:
            answers = answer(self._teacher(x)).float()
            if answers.numel() <= self._room:
                self._room -= answers.numel()
                self._said[number] = (names, answers.cpu())
        return answers.to(x.device)


def tensors(batch: Batch, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch on a device.

    A batch of no images becomes one black image, so that every process runs its model as often as
    the others; its result must be left out.
    """
    if not batch or batch.labels is None:
        return torch.zeros(1, *shape, device=device), torch.zeros(1, device=device).long()
    # From pinned memory a GPU copies while it still computes the step before.
    images, labels = (t.to(device, non_blocking=True) for t in (batch.images, batch.labels))
    return images, labels


@torch.no_grad()
def validate(
    model: nn.Module,
    feed: Feed | StreamFeed,
    paths: Mapping[str, Callable[[], object]],
    *,
    examiner: Examiner | None = None,
    shape: tuple[int, ...],
    accelerator: Any,
    skipped: dict[str, str],
) -> dict[str, Score]:
    """Run every path over the same images, the dense one first.

    Args:
        model: The model, perhaps wrapped; its mode is the same afterwards.
        feed: Our part of the validation images.
        paths: What makes the model take each path, by name.
        examiner: Knows what they are compared with; None is the first path.
        shape: Shape of an image.
        accelerator: Adds up what the processes counted.
        skipped: Images that cannot be read are added to it, with the reason.

    Raises:
        DataError: No image could be read, or one could not be opened.
    """
    back_to_training = stop_training(model)
    sums = torch.zeros(len(paths), 4)
    images, bad = 0, list[Skipped]()
    for number, (batch,) in enumerate(feed.epoch(0)):
        bad += batch.skipped
        x, labels = tensors(batch, shape, accelerator.device)
        known = None
        if examiner is not None:
            with accelerator.autocast():
                known = examiner.known(number, batch.names, x)
        for row, select in zip(sums, paths.values(), strict=True):
            select()
            logits = answer(model(x)).float()
            known = logits if known is None else known
            guess = logits.argmax(dim=1)
            if batch:
                row[0] += (guess == labels).sum().cpu()
                row[1] += F.cross_entropy(logits, labels, reduction="sum").cpu()
                row[2] += (guess == known.argmax(dim=1)).sum().cpu()
                row[3] += kl_divergence(known, logits).sum().cpu()
        images += len(batch)
    back_to_training()
    skipped |= {item.name: item.reason for item in bad}
    total = count_read(images, bad, "the validation", accelerator)
    if total == 0:
        raise DataError(f"None of the validation images could be read. First: {first(skipped)}")
    rest = accelerator.reduce(sums.flatten().to(accelerator.device), "sum").tolist()
    rows = [rest[i : i + 4] for i in range(0, len(rest), 4)]
    return {
        name: Score(100 * hits / total, loss / total, 100 * agreed / total, kl / total)
        for name, (hits, loss, agreed, kl) in zip(paths, rows, strict=True)
    }


def count_read(images: int, skipped: Sequence[Skipped], what: str, accelerator: Any) -> int:
    """Count images over all processes; they stop together where the source of them is lost.

    A damaged image is damaged in every run: it is left out, and said to be. Whether a file can be
    opened depends on the hour, and so would what is learned. Several images of which none can be
    read are no accident either, whatever the reason; one alone may be, as in a small last step.

    Args:
        images: How many this process has read.
        skipped: What it could not read.
        what: What the images are for, in the error.
        accelerator: Adds up what the processes counted.

    Raises:
        DataError: One cannot be opened, or none of several can be read.
    """
    from accelerate.utils import gather_object

    lost = [item for item in skipped if isinstance(item, Lost)]
    counts = torch.tensor([images, len(skipped), len(lost)], device=accelerator.device)
    total, bad, gone = accelerator.reduce(counts, "sum").tolist()
    if gone or (bad > 1 and total == 0):
        problem = f"{gone} cannot be opened" if gone else "none can be read"
        named = {item.name: item.reason for item in gather_object(lost if gone else list(skipped))}
        raise DataError(
            f"Of the {total + bad} images of {what}, {problem}. First: {first(named)}. Make them "
            "readable, and go on with --resume."
        )
    return int(total)


def first(skipped: Mapping[str, str]) -> str:
    """The first few of the skipped images, for a message."""
    return "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
