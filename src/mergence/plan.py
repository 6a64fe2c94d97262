"""The plan: which slot each token goes to, and with what weight.

Everything mergence does follows from this one map. The merge is a weighted mean per slot; pruning
is slot -1; plans compose into the source map that says where every original patch ended up.

Plans speak of *patch* tokens only. Prefix tokens (class, distillation, registers) are set aside
before a method is asked and put back in front afterwards, so that no method can touch them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.errors import MergenceError

DROPPED = -1


@dataclass(frozen=True)
class MergePlan:
    """Where each token goes.

    Attributes:
        slot: `[B, N]` int64. The slot of each token, or -1 where it is dropped. Slots keep raster
            order: a slot's index grows with the position of the token that represents it.
        weight: `[B, N]`, positive. The share of each token in the mean of its slot, not normalised.
        slots: The number of slots. A plain number, so that shapes stay static.
        keep_norm: Scale the mean of each slot to the largest norm among its tokens. A mean is
            shorter than what it is made of; this undoes it.
    """

    slot: Tensor
    weight: Tensor
    slots: int
    keep_norm: bool = False


@dataclass(frozen=True)
class TokenView:
    """What a method may see of the tokens that it plans for, prefix tokens left out.

    `importance`, `keys` and `received` are computed only for methods that list them in `needs`.

    Attributes:
        x: `[B, N, C]` the residual stream between attention and MLP.
        size: `[B, N]` float32, how many patches each token stands for.
        block: The block that the tokens are in, counted from 1.
        depth: The number of blocks of the model.
    """

    x: Tensor
    size: Tensor
    block: int
    depth: int
    _importance: Tensor | None = None
    _keys: Tensor | None = None
    _received: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """`[B, N]` float32, positive: attention of the class token, mean over heads."""
        return self._declared(self._importance, "importance")

    @property
    def keys(self) -> Tensor:
        """`[B, N, D]` the block's attention keys, mean over heads."""
        return self._declared(self._keys, "keys")

    @property
    def received(self) -> Tensor:
        """`[B, N]` float32, positive: attention of all tokens, mean over heads and queries.

        The only score that costs an N x N map, the block's query-key product once more.
        """
        return self._declared(self._received, "received")

    def _declared(self, value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise MergenceError(
                f"A method read tokens.{name} without declaring it. "
                f'Add "{name}" to the class attribute `needs` of the method.'
            )
        return value


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Pick tokens: `x [B, N, C]`, `index [B, K]` -> `[B, K, C]`."""
    batch, tokens, _ = x.shape
    first = tokens * torch.arange(batch, device=x.device).unsqueeze(1)
    # Whole rows: gather would look every element up, which takes a CPU several times as long.
    return F.embedding(first + index, x.flatten(0, 1))


def spread(x: Tensor, slot: Tensor) -> Tensor:
    """Give every token what is in its slot: `x [B, slots, C]`, `slot [B, N]` -> `[B, N, C]`.

    Zeros where it was dropped.
    """
    return rows(x, slot.clamp(min=0)).masked_fill_((slot < 0).unsqueeze(2), 0)


def without_nan(x: Tensor, value: float) -> Tensor:
    """The tensor with a value in place of NaN."""
    # Not by torch.nan_to_num, which OpenVINO's converter does not know.
    return torch.where(x.isnan(), value, x)


def nan_last(score: Tensor) -> Tensor:
    """The score, float32 or more, with NaN below everything else, minus infinity included."""
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    return without_nan(score.clamp(min=torch.finfo(score.dtype).min), -torch.inf)


def ascending(x: Tensor) -> Tensor:
    """The indices `[B, N]` of values `[B, N]` in ascending order. Equal ones in any."""
    # Not by a sort, which ExecuTorch does not have, nor ONNX a stable one.
    return x.topk(x.shape[1], dim=1, largest=False).indices


def compose(source: Tensor, slot: Tensor) -> Tensor:
    """Follow patches through one more plan.

    Args:
        source: `[B, P]` slot of each original patch so far, -1 where dropped.
        slot: `[B, N]` the next plan's map.

    Returns:
        `[B, P]` slot of each original patch afterwards.
    """
    gone = source < 0
    return torch.where(gone, DROPPED, slot.gather(1, torch.where(gone, 0, source)))
