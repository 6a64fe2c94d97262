"""What several families share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds of a module's linear layers for one token.

    A linear layer has one for each weight; `nn.MultiheadAttention` keeps the weights of three in
    one parameter of its own.
    """
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def mean_by_size(x: Tensor, size: Tensor) -> Tensor:
    """The mean over tokens `[B, N, C]` in which each counts `size [B, N]` times."""
    share = (size / size.sum(dim=1, keepdim=True)).to(x.dtype)
    # Not a matrix product: autocast would take that to half precision, unlike the dense mean.
    return (share.unsqueeze(2) * x).sum(dim=1)


def randomised(model: ModelT) -> ModelT:
    """Add noise to every parameter, the same each time.

    Libraries initialise so small that tokens hardly differ; tests need tokens that do.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * scale)
    return model
