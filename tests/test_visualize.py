"""The pictures of a reduction: their pixels, their layout and what they refuse."""

from __future__ import annotations

import dataclasses
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergence import demo, regions, visualize
from mergence.errors import DataError, MissingExtraError, OptionError
from mergence.recipe import make
from mergence.tracing import ReductionPoint, Trace

RED, GREEN, BLUE, WHITE = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (1.0, 1.0, 1.0)


def paint(colours: list[list[tuple[float, float, float]]], patch: int = 2) -> Tensor:
    """An image of flat patches."""
    image = torch.tensor(colours).permute(2, 0, 1)
    return image.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def point(block: int, source: list[int], anchor: list[int], images: int = 1) -> ReductionPoint:
    rows = torch.tensor([source] * images)
    size = torch.tensor([[source.count(slot) for slot in range(len(anchor))]] * images)
    importance = torch.ones(rows.shape)
    return ReductionPoint(block, rows, size, torch.tensor([anchor] * images), importance)


def trace(grid: tuple[int, int], *points: ReductionPoint) -> Trace:
    return Trace(torch.zeros(1, 10), grid, points, "mergence")


def halving(grid: tuple[int, int], count: int, images: int) -> Trace:
    """One more pair of patches merged at each of `count` points."""
    patches = grid[0] * grid[1]
    maps = [[max(p - i - 1, 0) for p in range(patches)] for i in range(count)]
    anchors = [[0, *range(i + 2, patches)] for i in range(count)]
    points = [
        point(i + 1, m, a, images) for i, (m, a) in enumerate(zip(maps, anchors, strict=True))
    ]
    return trace(grid, *points)


# --- pixels -----------------------------------------------------------------------------------


def test_a_region_has_the_mean_colour_of_its_patches_wherever_they_lie() -> None:
    image = paint([[RED, GREEN], [WHITE, BLUE]])
    colours = regions.region_colours(image, torch.tensor([0, 1, 1, 0]), (2, 2))
    purple, pale = (0.5, 0, 0.5), (0.5, 1, 0.5)
    torch.testing.assert_close(colours, torch.tensor([[purple, pale], [pale, purple]]))


def test_dropped_patches_have_no_colour_and_lend_none() -> None:
    image = paint([[RED, GREEN], [WHITE, BLUE]])
    colours = regions.region_colours(image, torch.tensor([0, -1, -1, 1]), (2, 2))
    assert colours[0, 1].isnan().all()
    assert colours[1, 0].isnan().all()
    torch.testing.assert_close(colours[0, 0], torch.tensor(RED))
    torch.testing.assert_close(colours[1, 1], torch.tensor(BLUE))


def test_everything_dropped_is_all_nan() -> None:
    image = paint([[RED, GREEN], [WHITE, BLUE]])
    assert regions.region_colours(image, torch.full((4,), -1), (2, 2)).isnan().all()


def test_borders_lie_between_different_slots_only() -> None:
    source = torch.tensor([0, 0, 1, 2, 0, 1])  # a grid of two rows and three columns
    right, below = regions.region_borders(source, (2, 3))
    assert right.tolist() == [[False, True], [True, True]]
    assert below.tolist() == [[True, False, False]]


def test_crucial_patches_are_untouched_and_the_others_are_pale() -> None:
    image = paint([[(0, 0, 0), RED, WHITE], [GREEN, BLUE, (0.5, 0.5, 0.5)]], patch=4)
    shown = regions.crucial_only(image, torch.tensor([1, 3]), (2, 3))
    kept = torch.zeros(2, 3, dtype=torch.bool)
    kept[0, 1] = kept[1, 0] = True
    kept = kept.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(shown[:, kept], image[:, kept])
    assert (shown[:, ~kept] > 0.65).all()
    assert (shown[2, ~kept] > shown[0, ~kept]).all()  # tinted: grey images have no such colour


def test_parts_that_lie_apart_are_tied_to_the_anchor() -> None:
    # slot 0 has three parts: patches 0 and 4 (with the anchor), patches 2 and 3, and patch 15
    source = torch.arange(1, 17)
    source[torch.tensor([0, 4, 2, 3, 15])] = 0
    links = regions.stray_links(source, torch.tensor([0, *range(16)]), (4, 4))
    assert links == [(2, 0), (15, 0)]


def test_rows_do_not_wrap_round_and_dropped_patches_are_not_tied() -> None:
    # patches 2 and 3 follow each other in memory but lie at opposite ends of the grid
    source = torch.tensor([-1, 1, 0, 0, 2, -1])
    assert regions.stray_links(source, torch.tensor([2, 1, 4]), (2, 3)) == [(3, 2)]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (12, [2, 5, 8, 11]), (5, [0, 1, 3, 4])],
)
def test_at_most_four_points_are_shown_the_last_one_included(count: int, shown: list[int]) -> None:
    assert regions.spread(count, limit=visualize.MAX_POINTS) == shown


# --- figures ----------------------------------------------------------------------------------


def words(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize(("images", "count", "axes"), [(1, 1, 3), (3, 2, 15), (2, 12, 18)])
def test_one_row_an_image_and_two_pictures_a_point(images: int, count: int, axes: int) -> None:
    figure = visualize.draw(torch.rand(images, 3, 8, 8), halving((4, 4), count, images))
    assert len(figure.axes) == axes


def test_headings_count_tokens_and_say_what_is_left_out() -> None:
    found = words(visualize.draw(torch.rand(1, 1, 8, 8), halving((4, 4), 12, 1)))
    assert "blocks 1–3: 16 → 13 tokens" in found
    assert "blocks 10–12: 7 → 4 tokens" in found
    assert "4 of 12 steps" in found
    found = words(visualize.draw(torch.rand(1, 1, 8, 8), halving((4, 4), 2, 1)))
    assert "block 2: 15 → 14 tokens" in found
    assert not any("steps" in text for text in found)


def test_headings_say_where_patches_were_read_coarsely() -> None:
    coarse = halving((4, 4), 2, 1)
    points = tuple(dataclasses.replace(p, block=4 * i) for i, p in enumerate(coarse.points))
    found = words(
        visualize.draw(torch.rand(1, 1, 8, 8), dataclasses.replace(coarse, points=points))
    )
    assert "before block 1: 16 → 15 tokens" in found
    assert "block 4: 15 → 14 tokens" in found


@pytest.mark.parametrize("shape", [(8, 8), (4, 20), (20, 4)])
@pytest.mark.parametrize(("images", "count"), [(1, 1), (2, 12)])
def test_no_text_overlaps_or_leaves_the_figure(
    shape: tuple[int, int], images: int, count: int
) -> None:
    figure = visualize.draw(
        torch.rand(images, 3, *shape),
        halving((shape[0] // 2, shape[1] // 2), count, images),
        titles=["a rather long name of an image file.jpeg"] * images,
        captions=["African hunting dog 0.53\ndense: dhole 0.48, costs $5 or $6"] * images,
    )
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    for a, b in combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) < 3  # pixels of 160 an inch: the bounding box of a g may touch


def cell(figure: Any, axes: Any, row: int, column: int) -> Tensor:
    """The rendered pixels inside one patch, its edges left out."""
    figure.canvas.draw()
    drawn = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
    drawn = drawn.reshape(*figure.canvas.get_width_height()[::-1], 4)
    edges = [(column + 0.1, row + 0.1), (column + 0.9, row + 0.9)]
    (x0, y0), (x1, y1) = (map(round, axes.transData.transform(edge)) for edge in edges)
    return drawn[len(drawn) - y0 : len(drawn) - y1, x0:x1, :3].reshape(-1, 3)


def test_dropped_patches_look_different_from_merged_ones() -> None:
    image = paint([[RED, BLUE], [GREEN, WHITE]])[None]
    # patches 0 and 1 share a slot whose anchor is patch 0; patch 2 is dropped
    figure = visualize.draw(image, trace((2, 2), point(3, [0, 0, -1, 1], [0, 3])))
    regions = figure.axes[2]
    merged, dropped = cell(figure, regions, 0, 1), cell(figure, regions, 1, 0)
    assert merged.unique(dim=0).tolist() == [[127, 0, 127]]
    assert len(dropped.unique(dim=0)) > 1
    assert (dropped.float().mean(0) > 200).all()
    assert any("dropped" in text for text in words(figure))


def test_a_method_that_only_drops_is_explained_as_such() -> None:
    figure = visualize.draw(torch.rand(1, 3, 4, 4), trace((2, 2), point(3, [0, -1, -1, 1], [0, 3])))
    text = " ".join(words(figure))
    assert "kept and dropped" in text
    assert "merge" not in text.replace("mergence", "")


def test_grey_uint8_float_and_pil_images_give_the_same_picture() -> None:
    image = pytest.importorskip("PIL.Image")
    grey = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8) * 3
    pil = [image.frombytes("L", (8, 8), bytes(grey.flatten().tolist()))]
    inputs = [grey, grey.expand(-1, 3, -1, -1), grey.float() / 255, pil]
    figures = [visualize.draw(images, halving((4, 4), 1, 1)) for images in inputs]
    arrays = [torch.tensor(figure.axes[1].images[0].get_array()) for figure in figures]
    for first, second in pairwise(arrays):
        torch.testing.assert_close(first, second)


# --- saving and refusing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.SVG", b"<?xml")]
)
def test_saves_what_the_suffix_says(tmp_path: Path, name: str, start: bytes) -> None:
    figure = visualize.draw(torch.rand(1, 3, 4, 4), halving((2, 2), 1, 1))
    assert visualize.save(figure, tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.gif", r"\.png, \.pdf, \.svg"), ("a", "suffix"), ("no/a.png", "there is no folder")],
)
def test_refuses_paths_it_cannot_write(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        visualize.check_path(tmp_path / name)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 8, 8), "leading dimension"),
        (torch.zeros(1, 4, 8, 8), r"\[1, 4, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.randn(1, 3, 8, 8) * 9, "normalisation"),
        (torch.full((1, 3, 8, 8), torch.nan), "nan"),
        (torch.zeros(2, 3, 8, 8), "in order"),
        ([], "none"),
        (["a.png"], "not str"),
    ],
)
def test_refuses_images_that_cannot_be_drawn(images: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        visualize.draw(images, halving((4, 4), 1, 1))


def test_refuses_pil_images_of_different_sizes() -> None:
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(DataError, match="one size"):
        visualize.draw([image.new("L", (8, 8)), image.new("L", (9, 8))], halving((4, 4), 1, 2))


def test_refuses_a_trace_without_a_point_and_texts_that_do_not_fit() -> None:
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(OptionError, match="no reduction"):
        visualize.draw(images, trace((4, 4)))
    for texts in ({"titles": ["a", "b"]}, {"captions": []}):
        with pytest.raises(OptionError, match=next(iter(texts))):
            visualize.draw(images, halving((4, 4), 1, 1), **texts)


def test_a_model_of_a_single_value_is_quoted_with_it() -> None:
    loaded = demo.load()
    loaded.model.reset_classifier(1)  # type: ignore[operator]
    images = torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        value = float(loaded.model(images))
    figure = visualize.explain(loaded, images, make("mergence", macs=0.5), ["one"])
    assert f"dense: {value:.4g}" in [text.get_text() for text in figure.texts]


def test_says_how_to_install_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="viz"):
        visualize.draw(torch.zeros(1, 3, 8, 8), halving((4, 4), 1, 1))
