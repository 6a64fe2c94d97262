"""Fine-tune a model, or train it from scratch, with reduction on. `mergence train` in Python."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergence.train.config import Config
    from mergence.train.logs import Status
    from mergence.train.loop import Summary, fit

_HOME = {"Config": "config", "Status": "logs", "Summary": "loop", "fit": "loop"}

__all__ = ["Config", "Status", "Summary", "fit"]


def __getattr__(name: str) -> Any:
    # The command line reads Config for its flags and must not load torch for that.
    if name not in _HOME:
        raise AttributeError(f"module 'mergence.train' has no attribute '{name}'")
    return getattr(import_module(f"mergence.train.{_HOME[name]}"), name)
