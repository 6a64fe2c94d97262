"""Collections that are read as streams: WebDataset shards and Hugging Face data sets."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

from mergence.data import IMAGE_SUFFIXES, Skipped, skip
from mergence.errors import DataError, MissingExtraError
from mergence.sources import read_file

PREFIXES = ("wds:", "hf:")


@dataclass(frozen=True)
class Encoded:
    """One image of a stream, as it is stored."""

    name: str
    image: bytes
    label: int


class Shards(Protocol):
    """A collection in parts that can be read one by one, each from its beginning.

    Attributes:
        name: What it is called in messages.
        class_names: Names of its labels, where it has some.
        size: Number of images, where it is known.
    """

    name: str
    class_names: tuple[str, ...] | None
    size: int | None

    def __len__(self) -> int: ...

    def read(self, shard: int) -> Iterator[Encoded | Skipped]:
        """The images of one part; one that cannot be used, and a part that breaks off, is named."""
        ...


def is_stream(path: str) -> bool:
    """Whether a path names a stream."""
    return path.startswith(PREFIXES)


def open_shards(path: str) -> Shards:
    """Open what a path names.

    * `wds:SHARDS`: tar files of WebDataset, local with wildcards or anything that the library
      reads, with braces as in `wds:train-{000000..001281}.tar`; images under their usual endings
      and the class index under `cls`.
    * `hf:NAME` or `hf:NAME@SPLIT`: a data set of the hub or a local folder that `datasets` reads,
      with an image and a class label column.

    Raises:
        DataError: There is no such collection, or it has no images with labels.
        MissingExtraError: The library for it is not installed.
    """
    kind, _, rest = path.partition(":")
    package = {"wds": "webdataset", "hf": "datasets"}[kind]
    if find_spec(package) is None:
        raise MissingExtraError(package, "streams", f"Reading '{path}'")
    return _webdataset(path, rest) if kind == "wds" else _hugging_face(path, rest)


@dataclass
class WebDatasetShards:
    """Tar files in which the files of one sample follow each other."""

    name: str
    urls: list[str]
    class_names: tuple[str, ...] | None = None
    size: int | None = None

    def __len__(self) -> int:
        return len(self.urls)

    def read(self, shard: int) -> Iterator[Encoded | Skipped]:
        from webdataset.cache import StreamingOpen
        from webdataset.tariterators import group_by_keys

        url = self.urls[shard]
        try:
            for sample in group_by_keys(_files(StreamingOpen()([url]))):
                name = f"{Path(url).name}/{sample['__key__']}"
                image = next((v for k, v in sample.items() if f".{k}" in IMAGE_SUFFIXES), None)
                label = sample.get("cls", b"").strip()
                # int() refuses numbers of thousands of digits.
                if image is None or not label.isdigit() or len(label) > 18:
                    yield Skipped(name, "it has no image, or no class index under 'cls'")
                else:
                    yield Encoded(name, image, int(label))
        except Exception as error:  # damaged bytes fail in as many ways as tar and its filters have
            yield skip(url, error, "the shard breaks off: ")


class _Header(tarfile.TarInfo):
    """A header that says when it is damaged: to tarfile that is the end, as zeros are."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a file or the end should begin") from error


def _files(opened: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The files of shards, as webdataset reads them.

    Raises:
        ReadError: A shard breaks off, or goes on after its end.
    """
    for shard in opened:
        archive: Any
        try:
            with tarfile.open(fileobj=shard["stream"], mode="r|*", tarinfo=_Header) as archive:
                while (entry := archive.next()) is not None:
                    folder = entry.name.partition("/")[0]
                    about_the_shard = folder.startswith("__") and folder.endswith("__")
                    if entry.isreg() and not about_the_shard:
                        content = archive.extractfile(entry).read()
                        yield {"fname": entry.name, "data": content, "__url__": shard["url"]}
                    archive.members.clear()  # which would be all of them in the end
                while rest := archive.fileobj.read(1 << 20):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("more follows the end of the archive")
        except Exception:
            yield {}  # the sample before it is whole
            raise


def _webdataset(path: str, pattern: str) -> Shards:
    from webdataset.shardlists import expand_urls

    urls = [
        found
        for url in expand_urls(pattern)
        for found in (sorted(glob.glob(url)) if "://" not in url and "*" in url else [url])  # noqa: PTH207
    ]
    local = [url for url in urls if "://" not in url and not url.startswith("pipe:")]
    missing = [url for url in local if not Path(url).is_file()]
    if missing or not urls:
        raise DataError(
            f"'{path}' names {len(urls)} shards, of which {len(missing)} do not exist "
            f"(first: {', '.join(missing[:3])}). Correct the pattern, as in "
            "wds:train-{000000..001281}.tar."
        )
    return WebDatasetShards(path, urls)


@dataclass
class HuggingFaceShards:
    """A streamed data set of `datasets`, whose files are its shards."""

    name: str
    data: Any
    image: str
    label: str
    class_names: tuple[str, ...] | None
    size: int | None

    def __len__(self) -> int:
        return int(self.data.num_shards)

    def read(self, shard: int) -> Iterator[Encoded | Skipped]:
        part = self.data.shard(num_shards=len(self), index=shard)
        try:
            # Not plain iteration: in a worker that reads its own choice of the shards once more.
            for number, row in enumerate(part.iter(batch_size=1)):
                image, label = row[self.image][0] or {}, row[self.label][0]
                name = image.get("path") or f"{shard}/{number}"
                encoded = image.get("bytes")
                if encoded is None and image.get("path"):
                    try:
                        encoded = read_file(Path(image["path"]))
                    except (OSError, ValueError) as error:  # no file has such a name
                        yield skip(name, error)
                        continue
                if not encoded or label is None:
                    yield Skipped(name, "it has no image, or no label")
                else:
                    yield Encoded(name, encoded, label)
        except Exception as error:  # damaged bytes fail in as many ways as pyarrow has
            yield skip(f"{self.name} shard {shard}", error, "it breaks off: ")


def _hugging_face(path: str, rest: str) -> Shards:
    import datasets

    name, _, split = rest.partition("@")
    try:
        data = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # whatever the library, the hub client and the network raise
        raise DataError(
            f"'{path}' cannot be opened: {type(error).__name__}: {error}. Give hf:NAME@SPLIT, with "
            "the name of a data set of the hub or the path of a local one. If that was written by "
            "save_to_disk, write it again with to_parquet."
        ) from error
    features = data.features or {}
    image = _column(features, datasets.Image)
    label = _column(features, datasets.ClassLabel)
    if image is None or label is None:
        raise DataError(
            f"'{path}' has no image column with a class label beside it. Its columns: {features}."
        )
    splits = data.info.splits or {}
    size = splits[split or "train"].num_examples if (split or "train") in splits else None
    data = data.cast_column(image, datasets.Image(decode=False))
    return HuggingFaceShards(path, data, image, label, tuple(features[label].names), size)


def _column(features: Any, kind: type) -> str | None:
    names: Sequence[str] = [name for name, value in features.items() if isinstance(value, kind)]
    return names[0] if names else None
