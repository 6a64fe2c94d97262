"""Streams that are damaged, or were made to do harm."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mergence import sources
from mergence.data import Lost, Skipped
from mergence.train.shards import Encoded, open_shards

pytest.importorskip("webdataset", reason="webdataset is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

PNG = io.BytesIO()
Image.new("RGB", (8, 8), (200, 10, 10)).save(PNG, "PNG")
BLOCK = 512
SAMPLE = 4 * BLOCK  # a header and a block of content, of the image and of the label


def shard(path: Path, labels: list[str]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            for ending, content in (("png", PNG.getvalue()), ("cls", label.encode())):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path.read_bytes()


def read(path: str) -> tuple[list[str], list[Skipped]]:
    """Names of the images of a stream, and what was skipped."""
    shards = open_shards(path)
    items = [item for number in range(len(shards)) for item in shards.read(number)]
    good = [item.name for item in items if isinstance(item, Encoded)]
    return good, [item for item in items if isinstance(item, Skipped)]


def a_bit_of_a_header(whole: bytes) -> bytes:
    place = 2 * SAMPLE + 150
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (a_bit_of_a_header, 2),
        (lambda whole: whole[: 2 * SAMPLE] + bytes(SAMPLE) + whole[3 * SAMPLE :], 2),
        (lambda whole: whole[: 2 * SAMPLE + 300], 2),  # cut inside of a header,
        (lambda whole: whole[: 2 * SAMPLE], 2),  # before one,
        (lambda whole: whole[: 2 * SAMPLE + BLOCK + 20], 2),  # and inside of an image
        (lambda whole: whole + whole, 5),
    ],
)
def test_a_shard_that_breaks_off_is_named(
    damage: Callable[[bytes], bytes], left: int, packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """For tarfile a header that it cannot read is the end of the archive."""
    file = tmp_path / "a.tar"
    whole = shard(file, list("01234"))
    names = [f"a.tar/{number}" for number in range(5)]
    file.write_bytes(packed(whole))
    assert read(f"wds:{file}") == (names, [])
    file.write_bytes(packed(damage(whole)))
    good, (bad,) = read(f"wds:{file}")
    assert good == names[:left]
    assert (type(bad), bad.name) == (Skipped, str(file))
    assert bad.reason.startswith("the shard breaks off: ReadError: ")


def test_a_label_without_end_is_that_of_one_sample(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", ["0", "9" * 5000, "2"])
    good, (bad,) = read(f"wds:{tmp_path}/a.tar")
    assert good == ["a.tar/0", "a.tar/2"]
    assert (bad.name, "no class index" in bad.reason) == ("a.tar/1", True)


def rows(folder: Path, images: list[dict[str, Any] | None]) -> str:
    """A data set of one parquet file, which names a file where it does not hold one."""
    import pyarrow
    from pyarrow import parquet

    kinds = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": kinds})
    columns = {"image": images, "label": [0] * len(images)}
    folder.mkdir()
    parquet.write_table(
        pyarrow.table(columns, schema=features.arrow_schema), folder / "train.parquet"
    )
    return f"hf:{folder}"


def test_rows_that_cannot_be_used_are_named_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"bytes": PNG.getvalue(), "path": "0.png"}
    (tmp_path / "good.png").write_bytes(PNG.getvalue())
    (tmp_path / "large.png").write_bytes(bytes(5000))
    monkeypatch.setattr(sources, "LARGEST", 4000)
    paths = ["good.png", "large.png", "nowhere.png", "a\0b.png"]
    named = [str(tmp_path / path) for path in paths] + ["/dev/zero"]
    files = [{"bytes": None, "path": path} for path in named]
    good, bad = read(rows(tmp_path / "set", [whole, None, *files, whole]))
    assert good == ["0.png", named[0], "0.png"]
    reasons = {item.name: item.reason for item in bad}
    assert list(reasons) == ["0/1", *named[1:]]
    assert reasons["0/1"] == "it has no image, or no label"
    assert "5,000 bytes" in reasons[named[1]]
    assert "no regular file" in reasons["/dev/zero"]
    assert [item.name for item in bad if isinstance(item, Lost)] == [named[2]]
