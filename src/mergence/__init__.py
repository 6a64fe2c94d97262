"""Make a trained Vision Transformer do less work per image and keep its answer."""

from mergence._version import __version__ as __version__
from mergence.api import apply as apply
from mergence.api import applied as applied
from mergence.api import describe as describe
from mergence.api import disabled as disabled
from mergence.api import recipe_of as recipe_of
from mergence.api import remove as remove
