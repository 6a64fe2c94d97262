"""Make a trained Vision Transformer do less work per image and keep its answer."""

from mergence._version import __version__ as __version__
from mergence.api import applied as applied
from mergence.api import apply as apply
from mergence.api import describe as describe
from mergence.api import disabled as disabled
from mergence.api import recipe_of as recipe_of
from mergence.api import remove as remove
from mergence.errors import MergenceError as MergenceError
from mergence.method import Method as Method
from mergence.method import register as register
from mergence.plan import MergePlan as MergePlan
from mergence.plan import TokenView as TokenView
from mergence.recipe import Recipe as Recipe
from mergence.schedule import Constant as Constant
from mergence.schedule import Counts as Counts
from mergence.schedule import KeepRate as KeepRate
from mergence.schedule import Macs as Macs
from mergence.trace import trace as trace

__all__ = [
    "Constant",
    "Counts",
    "KeepRate",
    "Macs",
    "MergePlan",
    "MergenceError",
    "Method",
    "Recipe",
    "TokenView",
    "__version__",
    "applied",
    "apply",
    "describe",
    "disabled",
    "recipe_of",
    "register",
    "remove",
    "trace",
]
