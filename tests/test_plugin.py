"""The example plug-in, installed from its folder: found by entry point, and up to the contract."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mergence
from mergence.method import names

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "examples" / "plugin"

PAGES = [ROOT / "docs" / "extending" / f"add-a-{what}.md" for what in ("method", "family")]
BLOCK = re.compile(r"^```(?:python|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python(*arguments: str, path: str = "") -> str:
    """A fresh interpreter's output, of both streams; a failure shows it."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"python {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A search path with the plug-in on it, installed by pip without a network."""
    work = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PLUGIN, work / "source")  # setuptools writes beside its sources
    target = work / "installed"
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    python("-m", "pip", "install", *offline, "--target", str(target), str(source))
    return os.pathsep.join((str(target), str(Path(mergence.__file__).parents[1])))


@pytest.mark.slow
def test_both_are_listed(installed: str, tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    python("-m", "mergence", "list", "--json", str(file), path=installed)
    found = json.loads(file.read_text(encoding="utf-8"))
    methods = {row["name"]: row for row in found["methods"]}
    families = {row["name"]: row for row in found["families"]}
    assert methods["distinct"]["what it does"].startswith("Keep the tokens that are least like")
    assert families["plainvit"]["kinds tested"] == "vit"
    assert {"mergence", "tome"} <= methods.keys()  # beside the built-in ones
    assert {"timm", "transformers"} <= families.keys()


@pytest.mark.slow
def test_the_method_and_the_family_pass_the_contract_suite(installed: str) -> None:
    # The family with every method, and the method with the model on which all is asked of methods.
    chosen = "plainvit or timm-vit-distinct or [distinct]"
    options = ("-v", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", chosen)
    said = python("-m", "pytest", *options, "tests/contract", path=installed)
    found = re.findall(r"::(\w+)\[(.+)\] (\w+)", said)
    passed = {(test, case) for test, case, outcome in found if outcome == "PASSED"}
    skipped = [test for test, case, outcome in found if outcome == "SKIPPED"]
    promises = {test for test, case in passed if "timm-vit-distinct" in case}
    assert {
        "test_keep_all_is_bit_identical",
        "test_remove_gives_the_original_back",
        "test_each_block_leaves_as_many_tokens_as_the_schedule_says",
        "test_a_batch_equals_its_images_one_by_one",
    } <= promises
    of_the_family = {test for test, case in passed if case.startswith("plainvit")}
    without = {  # the family's library has no gradient checkpointing
        "test_checkpointing_gives_the_same_gradients",
        "test_checkpointing_gives_the_dense_gradients_of_a_forward_that_was_disabled",
    }
    assert promises - without <= of_the_family
    assert {
        "test_the_restated_block_is_bit_identical_when_it_reduces_nothing",
        "test_the_whole_forward_is_one_graph_and_compiles_once",
        "test_a_model_of_every_library_becomes_an_onnx_graph",
    } <= of_the_family
    assert set(skipped) <= without
    assert {case for _, case in passed} >= {f"plainvit-vit-{name}" for name in names()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_is_the_code_of_the_plugin(page: Path) -> None:
    files = {file: file.read_text(encoding="utf-8") for file in sources()}
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert any(block in text for text in files.values()), f"not in {PLUGIN.name}:\n{block}"


def test_the_pages_show_all_of_the_plugin() -> None:
    blocks = [b for page in PAGES for b in BLOCK.findall(page.read_text(encoding="utf-8"))]
    for file in sources():
        rest = file.read_text(encoding="utf-8")
        for block in blocks:
            rest = rest.replace(block, "")
        assert not rest.strip(), f"{file.relative_to(PLUGIN)} has what no page shows:\n{rest}"


def sources() -> list[Path]:
    return [PLUGIN / "pyproject.toml", *sorted((PLUGIN / "src").rglob("*.py"))]
