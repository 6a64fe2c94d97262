"""The core alone, without any extra: it imports and lists, and says which extra a model needs.

What `pip install mergence` would not install is hidden from a fresh process, as if it were missing.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mergence.family import registry as families
from mergence.method import registry as methods

pytestmark = pytest.mark.slow  # fresh processes, which import torch and much else

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Where models come from: what the message must say is missing, and the extra that has it.
NEEDS = {
    "timm:deit_small_patch16_224": ("timm", "timm"),
    "timm-random:deit_small_patch16_224": ("timm", "timm"),
    "local-dir:folder": ("timm", "timm"),
    "hf:facebook/deit-small-patch16-224": ("transformers", "transformers"),
    "torchvision:vit_b_16": ("torchvision", "torchvision"),
    "open_clip:ViT-B-32/openai": ("open_clip", "open-clip"),
    "demo": ("timm", "timm"),
}

HIDE = """
import json, sys
from importlib.machinery import PathFinder

hidden = set(json.loads(sys.argv[1]))

class WithoutThem(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        return None if top in hidden else super().find_spec(name, path, target)

sys.meta_path = [WithoutThem if finder is PathFinder else finder for finder in sys.meta_path]
"""


def needed(requirements: Iterable[str]) -> set[str]:
    """The names of all distributions that pip installs for some requirements."""
    found: set[str] = set()
    todo = list(requirements)
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if name in found or not (requirement.marker is None or requirement.marker.evaluate()):
            continue
        found.add(name)
        todo += requires(name) or []
    return found


def modules_beyond(requirements: Iterable[str]) -> list[str]:
    """The installed top-level modules that pip would not install for some requirements."""
    kept = needed(requirements) | {"mergence"}
    return sorted(
        module
        for module, owners in packages_distributions().items()
        if kept.isdisjoint(map(canonicalize_name, owners))
    )


def without(hidden: Iterable[str], code: str, *arguments: str) -> str:
    """What a fresh process without some modules prints."""
    words = [sys.executable, "-c", HIDE + code, json.dumps(sorted(hidden)), *arguments]
    done = run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ALONE = """
import contextlib, io
import mergence
from mergence.cli import app, main
from mergence.errors import MissingExtraError
from mergence.models import load_model

for name in mergence.__all__:
    getattr(mergence, name)
with contextlib.redirect_stdout(io.StringIO()):
    app(["list", "--json", sys.argv[3]], standalone_mode=False)
said = {}
for spec in json.loads(sys.argv[2]):
    try:
        load_model(spec)
    except MissingExtraError as error:
        said[spec] = str(error)
sys.argv = ["mergence", "bench", "timm-random:deit_small_patch16_224", "--macs", "0.67"]
with contextlib.redirect_stderr(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    main()
print(json.dumps({"said": said, "shown": shown.getvalue()}))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the core alone lists, and what it says when it is asked for models."""
    beyond = modules_beyond(PROJECT["dependencies"])
    assert {"timm", "transformers", "torchvision", "open_clip", "PIL", "onnx"} <= set(beyond)
    assert {"torch", "typer", "rich", "safetensors"}.isdisjoint(beyond)
    file = tmp_path_factory.mktemp("alone") / "list.json"
    found: dict[str, Any] = json.loads(without(beyond, ALONE, json.dumps(list(NEEDS)), str(file)))
    return found | {"listed": json.loads(file.read_text(encoding="utf-8"))}


def test_it_imports_and_lists(alone: dict[str, Any]) -> None:
    listed = alone["listed"]
    assert [row["name"] for row in listed["methods"]] == list(methods())
    assert [row["name"] for row in listed["families"]] == list(families())


def test_a_model_that_needs_an_extra_says_which(alone: dict[str, Any]) -> None:
    assert alone["said"] == {
        spec: f"Loading '{spec}' needs the package '{package}', which is not installed. "
        f"Install it, in a checkout of mergence, with: pip install -e '.[{extra}]'"
        for spec, (package, extra) in NEEDS.items()
    }
    assert {extra for _, extra in NEEDS.values()} <= PROJECT["optional-dependencies"].keys()


def test_the_command_line_says_it_in_one_paragraph(alone: dict[str, Any]) -> None:
    shown = " ".join(alone["shown"].split())
    assert "pip install -e '.[timm]'" in shown
    assert "Traceback" not in shown


def test_images_of_transformers_need_pillow() -> None:
    # transformers does not bring it, so the extra must.
    code = """
from mergence.errors import MissingExtraError
from mergence.models import load_model
try:
    load_model("hf:facebook/deit-small-patch16-224")
except MissingExtraError as error:
    print(error)
"""
    said = without(["PIL"], code)
    assert "the package 'pillow'" in said
    assert "'.[transformers]'" in said
    extra = PROJECT["optional-dependencies"]["transformers"]
    assert "pillow" in {Requirement(line).name for line in extra}
