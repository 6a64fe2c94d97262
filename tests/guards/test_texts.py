"""No file of the repository names a folder of somebody's own machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Put together from pieces, so that this file does not match itself. A name before the slash makes
# it a part of a longer, harmless path, such as a relative one or an address.
FOLDERS = "|".join(["work", "root", r"home/\w+", r"Users/\w+"])
MACHINE_PATH = re.compile(rf"(?<![\w.~$}}-])/(?:{FOLDERS})/".encode())


def tracked() -> list[Path]:
    """Files that git tracks, and new ones that it would."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this is no git checkout, or git is not installed: {error}")
    names = {name.decode() for name in done.stdout.split(b"\0") if name}
    return [ROOT / name for name in sorted(names) if (ROOT / name).is_file()]


def test_no_path_of_a_developers_machine() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match.group().decode()}"
        for file in tracked()
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1)
        for match in MACHINE_PATH.finditer(line)
    ]
    assert not found, "write a relative path, or one that a user gives:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("/{}/main/x.py", True),
        ("open('/{}/x')", True),
        ("file:///{}/x", True),
        (".{}/x", False),
        ("docs/{}/x", False),
        ("https://example.org/{}/x", False),
    ],
)
def test_the_pattern_tells_machine_paths_from_others(text: str, matches: bool) -> None:
    assert bool(MACHINE_PATH.search(text.format("root").encode())) is matches
