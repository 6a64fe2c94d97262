"""What depends on the device that a measurement runs on."""

from __future__ import annotations

import copy
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


def best_device() -> str:
    """The type of device that this machine computes fastest on."""
    best = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if best is None else best.type


def described(device: torch.device) -> str:
    """What a device is called: the GPU's name, or `cpu` with the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")  # on Linux, Python's own function knows the architecture at most
    names = re.findall(r"^model name\s*: (.+)", about.read_text(), re.M) if about.exists() else []
    return f"{device} ({names[0] if names else platform.processor() or platform.machine()})"


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all of its work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def placed(
    model: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[nn.Module, torch.device, torch.dtype]:
    """A model on a device and in a type: itself where it is so already, and otherwise a copy.

    A model that is moved and moved back would not be the same: half precision rounds weights.

    Args:
        model: The model.
        device: Where to run; None is where it is.
        dtype: Type of weights and images; None is that of the weights that images meet.

    Returns:
        The model, its device and its type.
    """
    tensors = [*model.parameters(), *model.buffers()]
    floating = [x for x in tensors if x.is_floating_point()]
    # A patch embedding is a convolution; blocks may be of another type, or packed in integers.
    first = next((x for x in floating if x.ndim >= 4), floating[0])
    place = first.device if device is None else torch.empty(0, device=device).device
    type_ = dtype or first.dtype
    if (device is not None and any(x.device != place for x in tensors)) or (
        dtype is not None and any(x.dtype != dtype for x in floating)
    ):
        model = copy.deepcopy(model).to(device=device, dtype=dtype)
    return model, place, type_


def stop_training(model: nn.Module) -> Callable[[], None]:
    """Put a model into evaluation mode.

    Returns:
        A function that puts each module back into the mode that it was in.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()

    def back() -> None:
        for module, training in before:
            module.training = training

    return back


@contextmanager
def convolutions_tried() -> Iterator[None]:
    """Let cuDNN try its convolutions and take the fastest, as timm's own benchmark does.

    What it takes untried for the patch embedding of a DeiT-S in bfloat16 is a sixth of the dense
    forward on an H200, and no reduction of tokens makes that any shorter.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device computes in a type only by converting to another and back."""
    checks = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    check = getattr(torch.ops.mkldnn, checks.get(dtype, ""), None)
    return device.type == "cpu" and check is not None and not check()


def warn_of_slow_type(device: torch.device, dtype: torch.dtype) -> None:
    """Warn where a type is only emulated, which makes it slower than float32 instead of faster."""
    if emulated(device, dtype):
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"This CPU has no {name} arithmetic: {name} is emulated and several times slower than "
            "float32. Use float32 here unless you want to see the rounding.",
            stacklevel=3,
        )
