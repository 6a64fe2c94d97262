"""Files that are there whole or not at all, and what is said where they cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import mergence
from mergence import visualize
from mergence.cli.output import write_json
from mergence.errors import OptionError
from mergence.files import staged, write_text
from mergence.frontier import draw_frontier
from mergence.recipe import make


def save_picture(path: Path) -> None:
    visualize.save(draw_frontier({"a": [(0.5, 1.0)]}, ylabel="y"), path)


def save_model(folder: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **size).eval()
    mergence.save(mergence.apply(model, macs=0.7), folder)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", make(macs=0.5).save),
        ("b.json", lambda path: write_json(path, {"found": list(range(100))})),
        ("c.png", save_picture),
        ("model", save_model),
    ],
)
def test_what_has_no_room_is_told_and_changes_nothing(
    name: str,
    write: Callable[[Path], None],
    tmp_path: Path,
    disk_with_room_for: Callable[[int], AbstractContextManager[None]],
) -> None:
    path = tmp_path / name
    if path.suffix:
        path.write_text("old")
    with (
        disk_with_room_for(100),
        pytest.raises(OptionError, match=f"{name}' cannot be written: .*Nothing was changed"),
    ):
        write(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == (
        {name: "old"} if path.suffix else {}
    )
    write(path)
    assert path.is_dir() or path.read_bytes() != b"old"


def test_a_device_is_written_to_and_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "there" / "file").read_text() == text
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OptionError, match=r"full' cannot be written: No space left on device\.$"):
        write_text(tmp_path / "full", "text")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "full", "link", "there"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "full").is_symlink()


def test_a_picture_is_what_its_own_name_says(tmp_path: Path) -> None:
    (tmp_path / "a.svg").touch()
    (tmp_path / "b.png").symlink_to(tmp_path / "a.svg")
    save_picture(tmp_path / "b.png")
    assert (tmp_path / "a.svg").read_bytes().startswith(b"\x89PNG")


def test_a_file_keeps_its_mode_and_its_other_name(tmp_path: Path) -> None:
    (tmp_path / "mine").touch(0o600)
    write_text(tmp_path / "mine", "new")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").hardlink_to(tmp_path / "mine")
    write_text(tmp_path / "mine", "newer")
    assert (tmp_path / "other").read_text() == "newer"
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(OptionError, match="lost' cannot be written: No such file"):
        write_text(tmp_path / "lost", "text")
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_a_folder_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `check_target` lets it pass, it is written where it is."""
    file, link = tmp_path / "file", tmp_path / "sub" / "link"
    file.touch()
    link.parent.mkdir()
    link.symlink_to(file)
    inode = file.stat().st_ino
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for path in (file, link):
        write_text(path, path.name)
        assert (file.read_text(), file.stat().st_ino) == (path.name, inode)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^no model$"), staged(tmp_path):
        raise OSError("no model")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"), staged(tmp_path):
        (tmp_path.parent / "nowhere" / "tokenizer.json").read_bytes()
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "new"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
