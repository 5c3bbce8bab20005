"""A run's results as a table, as Markdown, as JSON and as charts."""

import json
from collections import defaultdict
from math import nan
from pathlib import Path
from statistics import median

from rich.markup import escape
from rich.table import Table

from .harness import BACKEND, OURS, Result
from .machine import describe

COLOURS = {
    OURS: "#d95f30",
    "sdpa": "#5f8dd3",
    "eager": "#9aa0a6",
    "torch.compile": "#6bab6e",
    "onednn": "#9a6fb0",
    "openvino": "#c9a227",
    "onnxruntime": "#4aa3a2",
    "sdpa flash": "#2f5d9b",
    "sdpa efficient": "#8fb3e0",
    "sdpa cudnn": "#1b365d",
    "flash-attn": "#b0588f",
    "flex": "#9a6fb0",
    "liger": "#c9a227",
    "huggingface": "#5f8dd3",
}
RATES = {"matmul": ("TFLOP/s", 1e12), "copy": ("GB/s", 1e9)}


def by_op(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each op, in order."""
    groups = defaultdict(list)
    for result in results:
        groups[result.case.op].append(result)
    return dict(groups)


def table(op: str, results: list[Result]) -> Table:
    """A row a case: every peer's time and memory and fastattn's ratio to it, then fastattn's rate and share of the floor."""
    names = list(dict.fromkeys(name for result in results for name in result.timings))
    view = Table(title=op, title_justify="left", caption=_caption(results), caption_justify="left", show_lines=True)
    view.add_column("case", min_width=28)
    overheads = [] if all(result.overhead is None for result in results) else ["call - backend"]
    bounds = [] if all(result.bound is None for result in results) else ["rate, share of the floor"]
    for name in (*names, *overheads, *bounds):
        view.add_column(name, justify="right")
    for result in results:
        cells = [_cell(result, name) if name in result.timings else "" for name in names]
        if overheads:
            cells.append("" if result.overhead is None else _time(result.overhead))
        if bounds:
            cells.append(_rate(result))
        view.add_row(str(result.case), *cells)
    return view


def _cell(result: Result, name: str) -> str:
    """A peer's time, the memory of a call if it is worth a word, and how many times as fast as the peer fastattn is."""
    timing = result.timings[name]
    memory = f", {timing.memory / 2**20:.0f} MiB" if timing.memory is not None and timing.memory >= 2**20 else ""
    cell = _time(timing.median) + memory
    if name in (OURS, BACKEND):
        return cell
    ratio = result.speed(OURS, name)
    return f"{cell}\n[bold]{ratio.median:.2f}[/] ({ratio.low:.2f} to {ratio.high:.2f})"


def _rate(result: Result) -> str:
    share = result.share_of_floor(OURS)
    if share is None:
        return ""
    figures = result.peer_as_dict(OURS)
    multiplies = result.bound == "matmul"
    rate = f"{figures['gflops']:.1f} GFLOP/s" if multiplies else f"{figures['gbytes_per_s']:.1f} GB/s"
    return f"{rate}\n{share:.0%} of {result.bound}"


def _caption(results: list[Result]) -> str:
    """How to read a cell, and the notes of all cases, each once."""
    notes: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for note in result.notes:
            notes[note].append(str(result.case))
    lines = ["Under a time: how many times as fast fastattn is; the median of the rounds' ratios, and their quartiles."]
    for note, cases in notes.items():
        lines.append(note if len(cases) == len(results) else f"{note} ({'; '.join(cases)})")
    return escape("\n".join(lines))


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if abs(seconds) < 1e-3 else f"{seconds * 1e3:.2f} ms"


def name_of(machine: dict) -> str:
    """What was measured, of what `describe` gave: the GPU, or the processor and how many threads."""
    return machine.get("gpu") or f"{machine['cpu']}, {threads(machine)}"


def threads(machine: dict) -> str:
    """How many threads, of what `describe` gave."""
    return f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def _machine_of(results: list[Result]) -> dict:
    return describe(results[0].case.device if results else "cpu")


def write_json(path: Path, results: list[Result]) -> None:
    """Everything measured, with the machine it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": _machine_of(results), "results": [result.as_dict() for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_markdown(path: Path, results: list[Result]) -> None:
    """The tables for reading: fastattn's time, how many times as fast it is as each peer, and its share of the floor."""
    machine = _machine_of(results)
    compiler = (
        f"CUDA {machine['cuda']}, Triton {machine['triton']}" if "gpu" in machine else f"Kernels for {machine['isa']}"
    )
    lines = [
        f"# {name_of(machine)}",
        "",
        f"{compiler}; torch {machine['torch']}, Python {machine['python']}, {machine['system']}; fastattn "
        f"{machine['fastattn']} at {machine['commit'] or 'no commit'}. A ratio says how many times as fast as the peer "
        "fastattn is: the median over interleaved rounds. The floor is the time that the machine, in the same rounds, took "
        "for a matrix product of as many operations, or a copy of as many bytes, whichever is longer.",
    ]
    for op, group in by_op(results).items():
        peers = [name for name in dict.fromkeys(name for result in group for name in result.timings) if name != OURS]
        peers = [name for name in peers if name != BACKEND]
        columns = ["case", "fastattn", *(f"over {name}" for name in peers), "share of the floor"]
        overheads = any(result.overhead is not None for result in group)
        if overheads:
            columns[-1] = "call - backend"
        lines += ["", f"## {op}", "", _row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
        for result in group:
            cells = [str(result.case), _time(result.timings[OURS].median)]
            cells += [f"{result.speed(OURS, p).median:.2f}" if p in result.timings else "" for p in peers]
            share = result.share_of_floor(OURS)
            if overheads:
                cells.append("" if result.overhead is None else _time(result.overhead))
            else:
                cells.append("" if share is None else f"{share:.0%} of {result.bound}")
            lines.append(_row(cells))
        lines += [line for note in dict.fromkeys(n for result in group for n in result.notes) for line in ("", note)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_charts(folder: Path, results: list[Result]) -> list[Path]:
    """A PNG an op: for each case, how many times as fast as the baseline each peer is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    machine, paths = _machine_of(results), []
    for op, group in by_op(results).items():
        peers = list(dict.fromkeys(peer for result in group for peer in result.timings))
        height = 0.8 / len(peers)
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(group) * (len(peers) + 1)), layout="constrained")
        for index, peer in enumerate(peers):
            rows = [
                (i, result.speed(peer, result.baseline).median)
                for i, result in enumerate(group)
                if peer in result.timings
            ]
            places = [i + (index - (len(peers) - 1) / 2) * height for i, _ in rows]
            bars = axes.barh(places, [ratio for _, ratio in rows], height, label=peer, color=COLOURS.get(peer))
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        axes.set_yticks(range(len(group)), [str(result.case) for result in group], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(f"times as fast as {' or '.join(dict.fromkeys(result.baseline for result in group))}")
        axes.set_title(f"{op} on {name_of(machine)}")
        axes.legend(fontsize=8)
        paths.append(folder / f"{op}.png")
        figure.savefig(paths[-1], dpi=130)
        pyplot.close(figure)
    return paths


def write_rates(folder: Path, results: list[Result]) -> list[Path]:
    """A PNG an op and direction: each peer's rate over the cases, and the rate of the yardstick that binds them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    machine, paths = _machine_of(results), []
    groups = defaultdict(list)
    for result in results:
        if result.bound is not None:
            groups[result.case.op, result.case.direction, result.bound].append(result)
    for (op, direction, bound), group in groups.items():
        unit, scale = RATES[bound]
        work = [result.case.flops if bound == "matmul" else result.case.moved for result in group]
        figure, axes = pyplot.subplots(figsize=(max(6, 1 + 0.7 * len(group)), 5), layout="constrained")
        floors = [done / median(result.floors[bound]) / scale for done, result in zip(work, group, strict=True)]
        axes.plot(range(len(group)), floors, color="black", linestyle="--", label=bound)
        for peer in dict.fromkeys(peer for result in group for peer in result.timings):
            rates = [
                done / result.timings[peer].median / scale if peer in result.timings else nan
                for done, result in zip(work, group, strict=True)
            ]
            axes.plot(range(len(group)), rates, marker="o", color=COLOURS.get(peer), label=peer)
        axes.set_xticks(
            range(len(group)), [f"{r.case.size} {r.case.dtype_name}" for r in group], rotation=60, ha="right"
        )
        axes.tick_params(axis="x", labelsize=7)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.set_title(f"{op}, {direction}, on {name_of(machine)}")
        axes.legend(fontsize=8)
        paths.append(folder / f"{op}-{direction}-{bound}.png")
        figure.savefig(paths[-1], dpi=130)
        pyplot.close(figure)
    return paths
