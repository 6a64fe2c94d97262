"""What is checked before an exported file is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import mergence
from mergence.errors import ExportError, OptionError
from mergence.exporting import agreement, checked, graph
from mergence.exporting.formats import FORMATS, Format

IMAGES = torch.linspace(-1, 1, 20 * 12).reshape(20, 3, 2, 2)
SCALE = torch.tensor(2.0)


class Sum(nn.Module):
    """Two values an image, and what libraries put beside: nothing, and a number of the model's."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = torch.stack((x.sum(dim=(1, 2, 3)), x[:, 0, 0, 0]), dim=1)
        return {"logits": logits, "text": None, "scale": torch.tensor(2.0)}


def logits(x: Tensor) -> Tensor:
    logits: Tensor = Sum()(x)["logits"]
    return logits


def changed(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The model, changed on some of the images."""
    return lambda images: change(logits(images), images)


def on_images(count: int, value: float) -> Callable[[Tensor], Tensor]:
    """The model, with another first output on so many of the images."""
    threshold = IMAGES[20 - count, 0, 0, 0]

    def change(y: Tensor, images: Tensor) -> Tensor:
        y = y.clone()
        y[images[:, 0, 0, 0] >= threshold, 0] += value
        return y

    return changed(change)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the format pt2 write one byte and run what it is given."""

    def install(runner: Callable[[Tensor], Tensor]) -> None:
        def write(model: nn.Module, images: Tensor, path: Path, opset: int) -> None:
            path.write_text("new")

        fake = Format(".pt2", write, lambda path: lambda images: [runner(images), SCALE])
        monkeypatch.setitem(FORMATS, "pt2", fake)

    return install


def test_what_agrees_is_kept_and_reported(fake: Any, tmp_path: Path) -> None:
    batches = []

    def run(images: Tensor) -> Tensor:
        batches.append(len(images))
        return on_images(20, 2e-6)(images)

    fake(run)
    (tmp_path / "m.pt2").write_text("old")
    done = mergence.export(Sum().eval(), tmp_path / "m.pt2", IMAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "new"
    assert len(set(batches)) > 1
    assert 1 in batches
    assert sum(batches) == 20
    found = done.to_dict()["agreement"]
    largest = float(logits(IMAGES).abs().max())
    assert found["worst"] == pytest.approx(2e-6 / largest, rel=0.2)
    assert (found["images"], found["off"], found["same_answer"]) == (20, 0, 20)
    assert (done.to, done.opset, done.image) == ("pt2", None, (3, 2, 2))


def test_one_image_of_twenty_may_be_a_near_tie_and_no_more(fake: Any, tmp_path: Path) -> None:
    fake(on_images(1, 1.0))
    found = mergence.export(Sum().eval(), tmp_path / "one.pt2", IMAGES).agreement
    assert found.off == 1
    assert found.worst > agreement.TOLERANCE
    fake(on_images(2, 1.0))
    with pytest.raises(ExportError, match="On 2 of 20 images"):
        mergence.export(Sum().eval(), tmp_path / "two.pt2", IMAGES)
    fake(on_images(1, 1.0))
    with pytest.raises(ExportError, match="On 1 of 10 images"):
        mergence.export(Sum().eval(), tmp_path / "two.pt2", IMAGES[10:])
    assert [file.name for file in tmp_path.iterdir()] == ["one.pt2"]


def test_an_output_of_zeros_is_right_where_the_models_is() -> None:
    class Zeros(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 2)

    found = agreement.compare(Zeros(), lambda x: [torch.zeros(len(x), 2)], IMAGES)
    assert (found.worst, found.off) == (0, 0)
    with pytest.raises(ExportError, match="On 20 of 20 images"):
        agreement.compare(Zeros(), lambda x: [torch.full((len(x), 2), 0.01)], IMAGES)


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [(torch.float32, 9e-4, 2e-3), (torch.float16, 3e-3, 6e-3), (torch.bfloat16, 2e-2, 5e-2)],
    ids=str,
)
def test_the_tolerance_is_that_of_the_type_of_the_answers(
    dtype: torch.dtype, within: float, beyond: float
) -> None:
    class Typed(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            # Numbers of a power of two, on which a factor is not rounded away.
            return {
                "logits": torch.ones(len(x), 2, dtype=dtype),
                "scale": SCALE,
                "index": SCALE.long(),
            }

    def off(by: float) -> Callable[[Tensor], list[Tensor]]:
        return lambda x: [torch.full((len(x), 2), 1 + by), SCALE, SCALE.long()]

    found = agreement.compare(Typed(), off(within), IMAGES)
    assert found.off == 0
    assert within < found.tolerance < beyond
    with pytest.raises(ExportError, match=f"On 20 of 20 images.* than {found.tolerance:g}"):
        agreement.compare(Typed(), off(beyond), IMAGES)


def test_a_model_that_answers_one_image_with_nan_is_never_taken_for_right() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits(x).where(x[:, :1, 0, 0] != IMAGES[0, 0, 0, 0], torch.nan)

    with pytest.raises(ExportError, match="On 20 of 20 images"):
        agreement.compare(Broken(), lambda x: [Broken()(x)], IMAGES)


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        (changed(lambda y, x: y * 1.01), "off by more than 0.001"),
        (changed(lambda y, x: y * float("nan")), "On 20 of 20 images"),
        (changed(lambda y, x: y.flip(1)), "off by more than"),
        (changed(lambda y, x: y[:, :1]), r"shapes \[\[20, 1\], .*model in \[\[20, 2\], "),
        (changed(lambda y, x: y / (len(x) == 1)), "off by more than"),  # one batch size only
        (changed(lambda y, x: [].pop()), "does not run .IndexError"),
    ],
)
def test_what_does_something_else_is_not_kept(
    runner: Any, message: str, fake: Any, tmp_path: Path
) -> None:
    fake(runner)
    (tmp_path / "m.pt2").write_text("old")
    with pytest.raises(ExportError, match=message):
        mergence.export(Sum().eval(), tmp_path / "m.pt2", IMAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "old"


def test_arguments_are_checked_before_any_work(tmp_path: Path) -> None:
    model, file = Sum().eval(), tmp_path / "m.onnx"
    for arguments, message in [
        ((model, tmp_path / "m.zip", IMAGES), r"m\.zip' names no format.*onnx, pt2, aoti"),
        ((model, tmp_path / "no" / "m.onnx", IMAGES), "there is no folder"),
        ((Sum(), file, IMAGES), r"model\.eval"),
        ((model, file, [IMAGES, None]), "are a list; give a tensor"),
        ((nn.Conv2d(3, 1, 2).eval(), file, IMAGES.double()), r"torch\.float64 and .*\.to\(dtype"),
        ((model, file, IMAGES[:1]), "at least 2"),
        ((model, file, IMAGES[0]), r"\[3, 2, 2\]; give \[B, C, H, W\]"),
    ]:
        with pytest.raises(OptionError, match=message):
            mergence.export(*arguments)
    with pytest.raises(OptionError, match="'tflite' names no format"):
        mergence.export(model, file, IMAGES, to="tflite")
    with pytest.raises(OptionError, match=r"aoti ends in \.pt2"):
        mergence.export(model, file, IMAGES, to="aoti")
    with pytest.raises(OptionError, match="opset 17 is too old"):
        mergence.export(model, file, IMAGES, opset=17)
    assert not list(tmp_path.iterdir())
    assert checked.format_of(tmp_path / "m.pt2", None)[0] == "pt2"


def test_an_error_of_the_models_own_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^Given .*expected input.* to have 5 channels"):
        mergence.export(nn.Conv2d(5, 1, 2).eval(), tmp_path / "m.pt2", IMAGES)


def saved(nodes: list[Any], path: Path) -> Path:
    """A graph file of these nodes, which need not fit together."""
    made = helper.make_graph(
        nodes, "g", [], [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])]
    )
    onnx.save(helper.make_model(made), path)
    return path


def node(kind: str, **attributes: Any) -> Any:
    return helper.make_node(kind, ["x"], ["y"], name=f"the_{kind}", **attributes)


def test_a_graph_of_plain_operators_passes(tmp_path: Path) -> None:
    nodes = [node("Add"), node("ScatterElements"), node("ScatterND", reduction="none"), node("Add")]
    path = saved(nodes, tmp_path / "g.onnx")
    graph.check(path)
    assert graph.operators(path) == {"Add": 2, "ScatterElements": 1, "ScatterND": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        node("NonZero"),
        node("Loop"),
        node("ScatterElements", reduction="add"),
        node("ScatterND", reduction="max"),
    ],
    ids=lambda wrong: wrong.op_type,
)
@pytest.mark.parametrize("nested", [False, True])
def test_operators_that_runtimes_stumble_over_are_refused(
    wrong: Any, nested: bool, tmp_path: Path
) -> None:
    if nested:
        body = helper.make_graph([wrong], "b", [], [helper.make_empty_tensor_value_info("y")])
        wrong, name = node("SequenceMap", body=body), wrong.name
    else:
        name = wrong.name
    path = saved([node("Add"), wrong], tmp_path / "g.onnx")
    with pytest.raises(ExportError, match=rf"1 operators.*'{name}'.*top-k"):
        graph.check(path)


def test_operators_inside_of_functions_are_seen(tmp_path: Path) -> None:
    model = onnx.load(saved([node("Add")], tmp_path / "g.onnx"))
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("d", "f", ["x"], ["y"], [node("NonZero")], opset))
    onnx.save(model, tmp_path / "f.onnx")
    with pytest.raises(ExportError, match="NonZero 'the_NonZero'"):
        graph.check(tmp_path / "f.onnx")


def test_a_compiled_model_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    compiled: Any = torch.compile(Sum().eval(), backend="eager")
    with pytest.raises(OptionError, match="_orig_mod"):
        mergence.export(compiled, tmp_path / "m.pt2", IMAGES)
