"""`python -m fastattn bench`."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..bench import peers, report
from ..bench.cases import CASES
from ..bench.harness import Result, compare
from ..bench.machine import Floors, describe


def bench(ops: list[str], quick: bool, seconds: float, json: Path | None, plot: Path | None) -> list[Result]:
    """Measures these ops, prints a table each, and writes what was asked for."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width of its own; the tables need this much
    machine = describe()
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, fastattn {machine['fastattn']}"
        f" ({(machine['commit'] or 'no commit')[:12]})",
        highlight=False,
    )
    reason = "--quick leaves it out" if quick else peers.compile_unavailable()
    if reason is not None:
        console.print(f"Without torch.compile: {reason}", highlight=False, markup=False)
    seconds, min_rounds = (0.05, 3) if quick else (seconds, 7)
    floors = Floors(seconds=0.02) if quick else Floors()
    cases = [case for op in ops for case in CASES[op](quick)]
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.op} {case}")
            results.append(compare(case, floors, seconds=seconds, min_rounds=min_rounds, compile=reason is None))
            progress.advance(task)
    for op, group in report.by_op(results).items():
        console.print(report.table(op, group))
    for kind, values in floors.as_dict().items():
        line = ", ".join(f"{name}: {rate:.1f}" for name, rate in values.items())
        console.print(f"Floors, {kind}: {line}", highlight=False)
    if json is not None:
        report.write_json(json, results, floors)
        console.print(f"Figures: {json}", highlight=False)
    if plot is not None:
        for path in report.write_charts(plot, results):
            console.print(f"Chart: {path}", highlight=False)
    return results
