"""One file a library: what its models and blocks look like.

What is imported here helps to write a family, in this folder or in a package of its own.
"""

from mergence.families._coarse import CoarseStem, CoarseTokens, can_read_coarsely
from mergence.families._common import (
    linear_macs,
    mean_by_size,
    randomised,
    reduced_forward,
    refuse_mask,
    require_class,
    same_library,
    unwatched,
)

__all__ = [
    "CoarseStem",
    "CoarseTokens",
    "can_read_coarsely",
    "linear_macs",
    "mean_by_size",
    "randomised",
    "reduced_forward",
    "refuse_mask",
    "require_class",
    "same_library",
    "unwatched",
]
