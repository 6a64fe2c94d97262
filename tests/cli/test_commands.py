"""The commands, run as a user runs them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import mergence
from mergence import demo, family
from mergence.cli import app, main
from mergence.cli.calibrate import _short
from mergence.cli.options import recipes_of
from mergence.errors import MergenceError
from mergence.recipe import make

# "T-shirt/top" cannot be the name of a folder, so the folders are not called as the classes.
pytestmark = pytest.mark.filterwarnings("ignore:The class folders of")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten embedded images as an image folder, one of a class."""
    loaded = demo.load()
    data = demo.images(loaded, limit=10)
    for name, label in zip(data.names, data.labels or (), strict=True):
        folder = tmp_path / "val" / loaded.label(label).replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        data.source.open(name).save(folder / f"{Path(name).name}.png")
    return tmp_path / "val"


def test_eval_writes_the_documented_json(images: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out.json", tmp_path / "mine.json"
    make("mergence", macs=0.5, alpha=0.5).save(recipe)
    command = ("eval", "demo", "--data", images, "--method", "tome", "--method", "topk")
    result = run(*command, "--macs", "0.67", "--recipe", recipe, "--json", out)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert (data["model"], data["data"], data["images"]) == ("demo", str(images), 10)
    assert data["skipped"] == []
    assert [row["name"] for row in data["results"]] == ["dense", "tome", "topk", "mine"]
    keys = {"name", "recipe", "gmacs", "macs_ratio", "top1", "top5", "agreement", "kl"}
    for row in data["results"]:
        assert keys <= row.keys()
    assert data["results"][3]["recipe"]["method"]["alpha"] == 0.5
    assert data["results"][1]["macs_ratio"] == pytest.approx(0.67, abs=0.005)
    assert "tome" in result.output


def test_settings_may_say_how_much_to_reduce() -> None:
    recipes = recipes_of(["tome"], None, None, None, ["r=8"], None)
    assert recipes == {"tome": make("tome", r=8)}


def test_eval_measures_every_method_at_every_budget(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ("eval", "demo", "--data", images, "--method", "tome", "--method", "topk")
    assert run(*command, "--macs", "0.67", "--macs", "0.5", "--json", out).exit_code == 0
    rows = {row["name"]: row["macs_ratio"] for row in json.loads(out.read_text())["results"]}
    assert list(rows) == ["dense", "tome@0.67", "tome@0.5", "topk@0.67", "topk@0.5"]
    for name, share in rows.items():
        assert share == pytest.approx(float(name.partition("@")[2] or 1), abs=0.01)


def test_eval_names_and_skips_an_unreadable_image(images: Path, tmp_path: Path) -> None:
    broken = next(images.glob("*/*.png"))
    broken.write_bytes(broken.read_bytes()[:60])
    out = tmp_path / "out.json"
    result = run("eval", "demo", "--data", images, "--macs", "0.67", "--json", out)
    assert result.exit_code == 0
    data = json.loads(out.read_text())
    assert data["images"] == 9
    assert [item["name"] for item in data["skipped"]] == [str(broken.relative_to(images))]
    assert broken.name in result.output


def test_visualize_draws_a_picture(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    files = sorted(images.glob("*/*.png"))[:2]
    assert run("visualize", "demo", *files, "--macs", "0.5", "--out", out).exit_code == 0
    with Image.open(out) as picture:
        assert picture.width > 800


def test_bench_prints_a_verdict_and_writes_the_documented_json(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = ("bench", "demo", "--method", "evit", "--macs", "0.5", "--batch-size", "1,2")
    result = run(*command, "--seconds", "0", "--json", out)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert data.keys() >= {"device", "torch", "rows"}
    keys = {"name", "batch", "dtype", "mode", "ms", "images_per_s", "speedup", "macs_ratio"}
    assert data["rows"][0].keys() >= keys | {"of_ideal", "peak_mib"}
    assert [row["batch"] for row in data["rows"]] == [1, 1, 2, 2]
    assert data["profiles"] == []
    assert "verdict" in result.output


def test_bench_says_where_the_time_goes(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = ("bench", "demo", "--macs", "0.5", "--batch-size", "1", "--profile")
    result = run(*command, "--seconds", "0", "--json", out)
    assert result.exit_code == 0, result.output
    assert "where the time goes: float32, eager, batch 1" in result.output
    dense, reduced = json.loads(out.read_text())["profiles"]
    assert dense.keys() == {"name", "batch", "dtype", "ms", "share"}
    assert (dense["name"], reduced["name"]) == ("dense", "mergence")
    assert reduced["ms"]["planning"] > dense["ms"]["planning"] == 0


def test_bench_takes_weights_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(MergenceError, match=r"missing: there is no file .*none\.pth"):
        run("bench", "demo", "--macs", "0.5", "--checkpoint", tmp_path / "none.pth")


@pytest.mark.parametrize("option", ["--batch-size", "--dtype", "--mode"])
def test_bench_asks_for_a_setting(option: str) -> None:
    with pytest.raises(MergenceError, match=f"{option} ', ' names nothing"):
        run("bench", "demo", "--macs", "0.5", option, ", ")


def test_the_version_is_told() -> None:
    result = run("--version")
    assert (result.exit_code, result.output.strip()) == (0, mergence.__version__)


def test_list_shows_every_method_and_family(tmp_path: Path) -> None:
    out = tmp_path / "list.json"
    result = run("list", "--json", out)
    data = json.loads(out.read_text())
    assert {row["name"] for row in data["methods"]} >= {"mergence", "mstm", "tome", "evit", "topk"}
    assert {row["name"] for row in data["families"]} == set(family.registry())
    assert "mergence" in result.output


@pytest.mark.slow
def test_demo_compares_and_draws(tmp_path: Path) -> None:
    picture, table = tmp_path / "demo.png", tmp_path / "demo.json"
    result = run("demo", "--limit", "10", "--out", picture, "--json", table)
    assert result.exit_code == 0
    assert picture.stat().st_size > 10_000
    data = json.loads(table.read_text())
    assert len(data["results"]) == 1 + len(demo.METHODS) * len(demo.BUDGETS)


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown method": (("--method", "tomme", "--macs", "0.67"), "Did you mean 'tome'?"),
    "macs 0": (("--macs", "0"), "above 0 and at most 1"),
    "macs 1.5": (("--macs", "1.5"), "above 0 and at most 1"),
    "no budget": ((), "how much to reduce. Give --macs 0.67"),
    "two budgets": (("--macs", "0.67", "--keep-rate", "0.7"), "only one of them"),
    "unknown option": (("--macs", "0.67", "--set", "beta=1"), "no option 'beta'"),
    "option of no form": (("--macs", "0.67", "--set", "alpha"), "KEY=VALUE"),
    "option out of range": (("--macs", "0.67", "--set", "alpha=-1"), "at least 0"),
    "missing recipe": (("--recipe", "nowhere.json"), "nowhere.json"),
    "unknown dtype": (("--macs", "0.67", "--dtype", "int4"), "float32, bfloat16 or float16"),
    "unknown device": (("--macs", "0.67", "--device", "tpu"), "This machine has cpu"),
    "no folder for json": (("--macs", "0.67", "--json", "no/where.json"), "no folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_one_paragraph_and_no_traceback(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = WRONG[case]
    monkeypatch.setattr("sys.argv", ["mergence", "eval", "demo", "--data", "demo", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    text = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 1
    assert text.startswith("Error:")
    assert says in text
    assert "Traceback" not in text


def test_a_class_count_that_does_not_match_stops_before_any_work(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in next(images.iterdir()).iterdir():
        image.unlink()
    command = ["mergence", "eval", "demo", "--data", str(images), "--macs", "0.67"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        main()
    assert "has 9 class folders" in " ".join(capsys.readouterr().err.split())


def test_a_single_value_is_refused_before_the_folders_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = dataclasses.replace(demo.load(), label_names=None)
    loaded.model.reset_classifier(1)  # type: ignore[operator]
    monkeypatch.setattr("mergence.cli.options.load", lambda *_: loaded)
    with pytest.raises(MergenceError, match="a single value"):
        run("eval", "demo", "--data", "demo", "--macs", "0.5")


@pytest.mark.parametrize("command", ["export", "visualize"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--macs", "0.7", "--macs", "0.5"), r"mergence@0\.7, mergence@0\.5.*takes one"),
        (("--macs", "0.7", "--method", "tome", "--method", "topk"), "tome, topk.*takes one"),
        (("--recipe", "a.json", "--recipe", "b.json"), "a, b.*takes one"),
        (("--recipe", "a.json", "--method", "tome"), "Give only one"),
    ],
)
def test_a_command_of_one_reduction_drops_no_other(
    command: str,
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        make(macs=0.5).save(f"{name}.json")
    out = {"export": ["--out", "m.onnx"], "visualize": ["x.png", "--out", "m.png"]}[command]
    with pytest.raises(MergenceError, match=message):
        run(command, "demo", *out, *options)


def test_calibrate_takes_a_budget_once_and_none_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def asked(*_: object, budgets: list[float], **__: object) -> None:
        raise Asked(*budgets)

    monkeypatch.setattr("mergence.calibration.calibrate", asked)
    monkeypatch.chdir(tmp_path)
    for options, budgets in [
        (("--macs", "0.7", "--macs", "0.5"), (0.7, 0.5)),
        (("--macs", "0.7", "--macs", "0.7"), (0.7,)),
        (("--budgets", "0.7,0.50,0.7,0.5"), (0.7, 0.5)),
    ]:
        with pytest.raises(Asked) as found:
            run("calibrate", "demo", "--data", "demo", "--images", "2", *options)
        assert found.value.args == budgets


@pytest.mark.slow
def test_calibrate_writes_a_family_of_recipes_and_their_frontier(
    images: Path, tmp_path: Path
) -> None:
    out, result_file = tmp_path / "mine.json", tmp_path / "result.json"
    command = ("calibrate", "demo", "--data", images, "--budgets", "0.7,0.5", "--out", out)
    small = ("--images", "4", "--trials", "2", "--points", "2", "--batch-size", "4")
    result = run(*command, *small, "--json", result_file)
    assert result.exit_code == 0, result.output
    data = json.loads(result_file.read_text())
    assert [row["budget"] for row in data["found"]] == [0.7, 0.5]
    assert (data["model"], data["images"], data["objective"]) == ("demo", 4, "kl")
    assert (tmp_path / "mine-frontier.png").read_bytes().startswith(b"\x89PNG")
    recipe = tmp_path / "mine-0.5.json"
    assert json.loads(recipe.read_text())["notes"]["model"] == "demo"
    assert run("eval", "demo", "--data", images, "--recipe", recipe).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Nothing says how much work may be left"),
        (("--macs", "0.7", "--latency", "0.7"), "--macs and --latency says"),
        (("--macs", "0.7", "--budgets", "0.5"), "--macs and --budgets says"),
        (("--budgets", "0.7;0.5"), "no list of numbers"),
        (("--macs", "1.7"), "budgets holds 1.7"),
        (("--macs", "0.7", "--out", "no/such/folder/r.json"), "there is no folder"),
        (("--macs", "0.7", "--method", "tom"), "Did you mean 'tome'"),
        (("--macs", "0.7", "--method", "tome", "--method", "evit"), "tome, evit.*takes one"),
        (("--macs", "0.7", "--set", "beta=1"), "no option 'beta'"),
    ],
)
def test_calibrate_refuses_before_any_work(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(MergenceError, match=message):
        run("calibrate", "demo", "--data", "demo", *options)


def test_an_option_that_calibration_left_alone_is_shown_whatever_it_is() -> None:
    assert [_short(value) for value in (0.25, 1.0, None)] == ["0.25", "1", "None"]
