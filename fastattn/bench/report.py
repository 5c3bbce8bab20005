"""A run's results as a table, as JSON and as charts."""

import json
from collections import defaultdict
from pathlib import Path

from rich.table import Table

from .harness import OURS, Result
from .machine import Floors, describe

COLOURS = {OURS: "#d95f30", "sdpa": "#5f8dd3", "eager": "#9aa0a6", "torch.compile": "#6bab6e", "onednn": "#9a6fb0"}


def by_op(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each op, in order."""
    groups = defaultdict(list)
    for result in results:
        groups[result.case.op].append(result)
    return dict(groups)


def table(op: str, results: list[Result]) -> Table:
    """A row a case: every peer's time, then fastattn's ratio to the baseline, its rate and its share of the floor."""
    names = list(dict.fromkeys(name for result in results for name in result.timings))
    view = Table(title=op, title_justify="left")
    view.add_column("case", min_width=28)
    overheads = [] if all(result.overhead is None for result in results) else ["call - backend"]
    for name in (*names, *overheads, "times as fast as (quartiles)", "rate", "of floor"):
        view.add_column(name, justify="right")
    for result in results:
        ours, figures = result.timings[OURS], result.peer_as_dict(OURS)
        low, high = ours.ratio_range
        times = [_time(result.timings[name].median) if name in result.timings else "" for name in names]
        if overheads:
            times.append("" if result.overhead is None else _time(result.overhead))
        rate = f"{figures['gflops']:.1f} GFLOP/s" if result.compute_bound else f"{figures['gbytes_per_s']:.1f} GB/s"
        ratio = f"[bold]{ours.ratio:.2f}[/] {result.baseline} ({low:.2f} to {high:.2f})"
        view.add_row(str(result.case), *times, ratio, rate, f"{figures['share_of_floor']:.0%}")
    return view


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def write_json(path: Path, results: list[Result], floors: Floors) -> None:
    """Everything measured, with the machine it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": describe(), "floors": floors.as_dict(), "results": [result.as_dict() for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_charts(folder: Path, results: list[Result]) -> list[Path]:
    """A PNG an op: for each case, how many times as fast as the baseline each peer is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    name, paths = describe()["cpu"], []
    for op, group in by_op(results).items():
        peers = list(dict.fromkeys(peer for result in group for peer in result.timings))
        height = 0.8 / len(peers)
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(group) * (len(peers) + 1)), layout="constrained")
        for index, peer in enumerate(peers):
            rows = [(i, result.timings[peer].ratio) for i, result in enumerate(group) if peer in result.timings]
            places = [i + (index - (len(peers) - 1) / 2) * height for i, _ in rows]
            bars = axes.barh(places, [ratio for _, ratio in rows], height, label=peer, color=COLOURS.get(peer))
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        axes.set_yticks(range(len(group)), [str(result.case) for result in group], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(f"times as fast as {' or '.join(dict.fromkeys(result.baseline for result in group))}")
        axes.set_title(f"{op} on {name}")
        axes.legend(fontsize=8)
        paths.append(folder / f"{op}.png")
        figure.savefig(paths[-1], dpi=130)
        pyplot.close(figure)
    return paths
