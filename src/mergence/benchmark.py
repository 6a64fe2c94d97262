"""Time reductions against the dense model: same machine, type, batch and mode, interleaved."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from mergence.api import apply, remove
from mergence.arguments import check_several
from mergence.devices import convolutions_tried, described, synchronise, warn_of_slow_type
from mergence.errors import OptionError
from mergence.evaluation import DENSE, patches_in, runs_of
from mergence.profiling import PARTS, Profile, parts_of
from mergence.program import program_of, require_images_alone
from mergence.recipe import Recipe, make

MODES: dict[str, str | None] = {
    "eager": None,
    "compile": "default",
    "cudagraphs": "reduce-overhead",
}
"""How a model is run, and the `torch.compile` mode that stands for it."""
PAYS, SLOWER = 1.05, 0.97
"""Speed-ups from which on a reduction pays, and below which it makes things worse."""
TURN = 50.0
"""Milliseconds that a turn lasts, where a device works on what it was given while calls go on."""


@dataclass(frozen=True)
class Row:
    """One model in one setting.

    Attributes:
        name: `dense`, or the name that the recipe was given.
        batch: Images in a batch.
        dtype: Type of weights and images.
        mode: `eager`, `compile` or `cudagraphs`.
        ms: Median milliseconds of one forward; on an accelerator, of one in an unbroken row.
        ms_low: First quartile of the same.
        ms_high: Third quartile of the same.
        images_per_s: Images per second at the median.
        speedup: Dense median over this median, in the same setting.
        macs_ratio: MACs as a share of the dense model's, for images of the size that was timed.
        of_ideal: `speedup * macs_ratio`: 1 where the time fell as much as the MACs.
        peak_mib: Peak memory of the device in MiB during a forward; None where it is not counted.
        verdict: What this means, in words; empty for the dense model.
    """

    name: str
    batch: int
    dtype: str
    mode: str
    ms: float
    ms_low: float
    ms_high: float
    images_per_s: float
    speedup: float
    macs_ratio: float
    of_ideal: float
    peak_mib: float | None
    verdict: str = ""


@dataclass(frozen=True)
class Benchmark:
    """The rows of one run and the machine they come from; profiles where they were asked for."""

    model: str
    device: str
    torch: str
    threads: int
    rows: tuple[Row, ...]
    profiles: tuple[Profile, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The benchmark as plain JSON values."""
        return asdict(self)


@torch.inference_mode()
def bench(
    model: nn.Module,
    recipes: Mapping[str, Recipe],
    *,
    input_size: tuple[int, int, int],
    batches: Sequence[int] = (1, 8, 32),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    modes: Sequence[str] = ("eager",),
    device: str | torch.device = "cpu",
    seconds: float = 5.0,
    rounds: int = 7,
    profile: bool = False,
    model_name: str = "",
    progress: Callable[[int], None] = lambda settings: None,
) -> Benchmark:
    """Time a model and its reductions in every setting.

    In each setting all of them take turns, so that a machine that drifts drifts for all. The first
    turn warms up and does not count. Quote the ratios of one run, not the times of two.

    On an accelerator a turn is a row of forwards that nobody waits for in between, 50 ms or longer,
    as in `torch.utils.benchmark`: so it is the device that is timed, as long as it is behind, and
    not how quickly a forward begins after an idle one.

    Args:
        model: A model of a known family; it is copied and left as it was.
        recipes: What to compare with the dense model, by name.
        input_size: Channels, height and width of the images, which are random.
        batches: Batch sizes.
        dtypes: Types of weights and images.
        modes: `eager`, `compile`, `cudagraphs`.
        device: Where to run.
        seconds: Keep taking turns for so long in each setting ...
        rounds: ... but take at least so many, two or more.
        profile: Say for each type and batch size also where the time goes, part by part. This is
            measured apart, in as many turns, and in eager mode: a compiled forward has no parts.
        model_name: Goes into the result.
        progress: Called after each setting with 1, and after each profile.

    Raises:
        OptionError: A mode is unknown, or not to be had on this device; a recipe is called `dense`;
            or an argument is of another form.
        MergenceError: A recipe does not fit the model.
    """
    device = torch.device(device)
    check_several(batches=batches, dtypes=dtypes, modes=modes)
    _check(modes, device, input_size, rounds)
    runs = runs_of(recipes)
    require_images_alone(model)
    rows: list[Row] = []
    profiles: list[Profile] = []
    for dtype in dtypes:
        warn_of_slow_type(device, dtype)
        type_ = str(dtype).removeprefix("torch.")
        models = {name: _prepared(model, recipe, device, dtype) for name, recipe in runs.items()}
        layout = _layout(models[DENSE], input_size, device, dtype)
        patches = patches_in(models[DENSE], _images(1, input_size, device, dtype, layout))
        ratios = {
            name: 1.0 if name == DENSE else program_of(one).share(patches)
            for name, one in models.items()
        }
        for mode in modes:
            for batch in batches:
                calls = {name: call_in(one, mode) for name, one in models.items()}
                images = _images(batch, input_size, device, dtype, layout)
                times = take_turns(calls, images, seconds, rounds)
                dense = statistics.median(times[DENSE])
                for name, call in calls.items():
                    peak = _peak_mib(call, images)
                    rows.append(
                        row_of(name, batch, type_, mode, times[name], dense, ratios[name], peak)
                    )
                progress(1)
        if profile:
            models[DENSE] = _prepared(model, make(keep_rate=1.0), device, dtype)
            for batch in batches:
                images = _images(batch, input_size, device, dtype, layout)
                profiles += _profiles(models, images, type_, seconds, rounds)
                progress(1)
    return Benchmark(
        model=model_name,
        device=described(device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        rows=tuple(judged(rows)),
        profiles=tuple(profiles),
    )


def judged(rows: Iterable[Row]) -> list[Row]:
    """Add to each reduced row what it means, with a look at the other batches and reductions."""
    rows = list(rows)

    def verdict(row: Row) -> str:
        if row.name == DENSE:
            return ""
        same = (row.name, row.dtype, row.mode)
        series = [r for r in rows if (r.name, r.dtype, r.mode) == same]
        paying = sorted(r.batch for r in series if r.speedup >= PAYS)
        if row.speedup >= PAYS:
            return "pays"
        text = "slower" if row.speedup < SLOWER else "no gain"
        last = max(r.batch for r in series if r.speedup < PAYS)
        larger = [batch for batch in paying if batch > last]
        here = (row.batch, row.dtype, row.mode)
        stronger = [
            r
            for r in rows
            if (r.batch, r.dtype, r.mode) == here
            and r.name != DENSE
            and r.macs_ratio < row.macs_ratio
            and r.speedup >= PAYS
        ]
        if larger:
            text += f"; pays from batch {larger[0]}"
        elif paying:
            text += f"; pays at batch {', '.join(map(str, paying))}"
        if stronger:
            text += f"; use {max(stronger, key=lambda r: r.macs_ratio).name} instead"
        return text

    return [replace(row, verdict=verdict(row)) for row in rows]


def _check(modes: Sequence[str], device: torch.device, size: object, rounds: int) -> None:
    if not isinstance(size, Sequence) or len(size) != 3:
        raise OptionError(
            f"input_size is {size!r}; give channels, height and width, for example (3, 224, 224)."
        )
    if rounds < 2:
        raise OptionError(f"rounds is {rounds}; give at least 2, which is what quartiles need.")
    for mode in modes:
        if mode not in MODES:
            raise OptionError(f"mode '{mode}' is unknown; choose from {', '.join(MODES)}.")
        if mode == "cudagraphs" and device.type != "cuda":
            raise OptionError(f"mode 'cudagraphs' needs a CUDA device; this run is on {device}.")


def _images(
    batch: int,
    size: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Tensor:
    images = torch.randn(batch, *size, device=device, dtype=dtype)
    return images.to(memory_format=layout)


def _layout(
    model: nn.Module, size: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> torch.memory_format:
    """The layout of images in memory that the dense model is faster with.

    For some patch embeddings cuDNN has fast kernels only with channels last, and no reduction of
    tokens makes that part of the forward shorter. On CPUs images stay as they are loaded.
    """
    if device.type == "cpu":
        return torch.contiguous_format
    plain, last = (
        _images(32, size, device, dtype, layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    times = take_turns({DENSE: model, "last": lambda _: model(last)}, plain, 0.0, 9)
    as_before = statistics.median(times[DENSE]) <= statistics.median(times["last"])
    return torch.contiguous_format if as_before else torch.channels_last


def _prepared(
    model: nn.Module, recipe: Recipe | None, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    one = remove(copy.deepcopy(model)).to(device=device, dtype=dtype).eval()
    return one if recipe is None else apply(one, recipe)


def call_in(model: nn.Module, mode: str) -> Callable[[Tensor], Any]:
    """What to call for one forward in a mode, one of `MODES`."""
    compiled = MODES[mode]
    if compiled is None:
        return model

    def forward(images: Tensor) -> Any:
        return model(images)

    # dynamo keeps what it compiled by code object, looks through it at every call and allows for
    # eight. The models share one, that of their class's forward, so each gets another around it.
    code = forward.__code__.replace(co_name=f"forward_of_{id(model)}")
    own = FunctionType(code, forward.__globals__, closure=forward.__closure__)
    call: Callable[[Tensor], Any] = torch.compile(own, fullgraph=True, dynamic=False, mode=compiled)
    return call


@convolutions_tried()
def take_turns(
    calls: Mapping[str, Callable[[Tensor], Any]], images: Tensor, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Time calls in turns, a warm-up first: milliseconds of each, at least `rounds` of them.

    With `torch.backends.cudnn.benchmark`; see `mergence.devices.convolutions_tried`.
    """
    number = {name: _warmed_up(call, images) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(times[DENSE]) < rounds or time.perf_counter() < end:
        for name, call in calls.items():
            times[name].append(_elapsed(call, images, number[name]) / number[name])
    return times


def _warmed_up(call: Callable[[Tensor], Any], images: Tensor) -> int:
    """Call until everything is compiled; how many calls make a turn."""
    call(images)
    if images.device.type == "cpu":  # a call has ended when it returns
        return 1
    call(images)  # when a CUDA graph is recorded
    call(images)
    return math.ceil(TURN / _elapsed(call, images, 1))


def _elapsed(call: Callable[[Tensor], Any], images: Tensor, number: int) -> float:
    """Milliseconds of so many calls one after the other."""
    synchronise(images.device)
    start = time.perf_counter()
    for _ in range(number):
        call(images)
    synchronise(images.device)
    return 1000 * (time.perf_counter() - start)


def _profiles(
    models: Mapping[str, nn.Module], images: Tensor, dtype: str, seconds: float, rounds: int
) -> list[Profile]:
    forwards: dict[str, list[dict[str, float]]] = {name: [] for name in models}

    def call(name: str) -> Callable[[Tensor], None]:
        return lambda images: forwards[name].append(parts_of(models[name], images))

    take_turns({name: call(name) for name in models}, images, seconds, rounds)
    medians = {
        name: {part: statistics.median(one[part] for one in counted) for part in PARTS}
        for name, (_, *counted) in forwards.items()
    }
    dense = sum(medians[DENSE].values())
    return [
        Profile(name, len(images), dtype, ms, {part: ms[part] / dense for part in PARTS})
        for name, ms in medians.items()
    ]


@convolutions_tried()
def _peak_mib(call: Callable[[Tensor], Any], images: Tensor) -> float | None:
    if images.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(images.device)
    call(images)
    synchronise(images.device)
    return torch.cuda.max_memory_allocated(images.device) / 2**20


def row_of(
    name: str,
    batch: int,
    dtype: str,
    mode: str,
    times: list[float],
    dense: float,
    ratio: float,
    peak: float | None,
) -> Row:
    """Sum up the `times` of one model in milliseconds; `dense` is the dense model's median."""
    low, ms, high = statistics.quantiles(times, n=4)
    return Row(
        name=name,
        batch=batch,
        dtype=dtype,
        mode=mode,
        ms=ms,
        ms_low=low,
        ms_high=high,
        images_per_s=1000 * batch / ms,
        speedup=dense / ms,
        macs_ratio=ratio,
        of_ideal=dense / ms * ratio,
        peak_mib=peak,
    )
