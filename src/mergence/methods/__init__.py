"""One file a method; the files of this folder are found by walking it.

Every registered method's class can be imported from here: `from mergence.methods import ToMe`.
"""

from mergence.method import Method


def __getattr__(name: str) -> type[Method]:
    if not name.startswith("_"):
        from mergence.method import registry

        for cls in registry().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'mergence.methods' has no attribute '{name}'")
