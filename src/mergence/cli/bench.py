"""mergence bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mergence.cli import options as o
from mergence.cli.output import check_json, console, progress, table_of, timed, write_json
from mergence.errors import OptionError

if TYPE_CHECKING:
    from mergence.benchmark import Benchmark
    from mergence.profiling import Profile


def bench(
    model: o.Model,
    method: o.Methods = None,
    recipe: o.Recipes = None,
    macs: o.ManyMacs = None,
    keep_rate: o.KeepRate = None,
    set_: o.Set = None,
    device: o.Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; several with commas.")] = (
        "float32"
    ),
    batch_size: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8,32",
    mode: Annotated[
        str, typer.Option(help="eager, compile, cudagraphs (CUDA only); several with commas.")
    ] = "eager",
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each setting.")] = 5.0,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say also where the time goes, in eager mode.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    seed: o.Seed = 0,
    checkpoint: o.Checkpoint = None,
    json: o.Json = None,
) -> None:
    """Time methods against the dense model, interleaved, and say whether they pay here."""
    check_json(json, *recipe or ())
    recipes = o.recipes_of(method, recipe, macs, keep_rate, set_, o.saved_in(model, checkpoint))
    dtypes = [o.dtype_of(name) for name in _parts("--dtype", dtype)]
    place, modes = o.device_of(device), _parts("--mode", mode)
    batches = [_batch(size) for size in _parts("--batch-size", batch_size)]
    import torch

    from mergence import benchmark

    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = o.load(model, checkpoint)
    with progress("timing", len(dtypes) * (len(modes) + profile) * len(batches)) as advance:
        result = benchmark.bench(
            loaded.model,
            recipes,
            input_size=loaded.input_size,
            batches=batches,
            dtypes=dtypes,
            modes=modes,
            device=place,
            seconds=seconds,
            profile=profile,
            model_name=model,
            progress=advance,
        )
    try:  # first, because printing may fail as well
        write_json(json, result.to_dict())
    finally:
        _table(result)
        if result.profiles:
            _profile(result.profiles)


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise OptionError(f"{option} '{text}' names nothing. Name one or more, or leave it out.")
    return parts


def _batch(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise OptionError(f"--batch-size {text} is no batch size; give numbers such as 1,8,32.")
    return int(text)


def _table(result: Benchmark) -> None:
    console.print(
        f"{result.model} on {result.device}, torch {result.torch}, {result.threads} threads"
    )
    settings = dict.fromkeys((row.dtype, row.mode) for row in result.rows)
    for setting in settings:
        rows = [row for row in result.rows if (row.dtype, row.mode) == setting]
        memory = rows[0].peak_mib is not None
        title = ", ".join(setting)
        table = table_of(title)
        table.add_column("batch", justify="right", no_wrap=True)
        table.add_column("method", no_wrap=True)
        headings = ("ms", "speed-up", "MACs", "of ideal")
        for heading in (*headings, "MiB") if memory else headings:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict")
        for row in rows:
            peak = (f"{row.peak_mib:.0f}",) if memory else ()
            table.add_row(str(row.batch), row.name, *timed(row), *peak, row.verdict)
        console.print(table)
    console.print(
        "ms: median of one forward ± half the distance between the quartiles. MACs: share of the "
        "dense model's, at this size of images. of ideal: speed-up × MACs, 1 where the time fell "
        "as much as the MACs.",
        style="dim",
    )


def _profile(profiles: Sequence[Profile]) -> None:
    parts = [part for part in profiles[0].ms if any(one.ms[part] for one in profiles)]
    for setting in dict.fromkeys((one.dtype, one.batch) for one in profiles):
        title = "where the time goes: {}, eager, batch {}".format(*setting)
        table = table_of(title, padding=(0, 1, 0, 0))
        table.add_column("method", no_wrap=True)
        for part in (*parts, "sum"):
            table.add_column(part, justify="right", no_wrap=True)
        for one in profiles:
            if (one.dtype, one.batch) == setting:
                cells = [_time_and_share(one.ms[part], one.share[part]) for part in parts]
                whole = _time_and_share(sum(one.ms.values()), sum(one.share.values()))
                table.add_row(one.name, *cells, whole)
        console.print(table)
    console.print(
        "ms, and below them shares of the dense forward. attention, mlp: the two halves of every "
        "block. scoring, planning, merging: what reducing costs. rest: outside of the blocks.",
        style="dim",
    )


def _time_and_share(ms: float, share: float) -> str:
    # A part that never runs takes exactly no time.
    return f"{ms:.{1 if ms >= 10 else 2}f}\n{share:.1%}" if ms else ""
