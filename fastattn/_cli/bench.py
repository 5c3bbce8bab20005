"""`python -m fastattn bench`."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..bench import peers, report
from ..bench.cases import CASES
from ..bench.harness import Result, compare
from ..bench.machine import Floors, describe


def bench(ops: list[str], quick: bool, seconds: float, compile: bool, json: Path | None, plot: Path | None) -> None:
    """Measures these ops, prints a table each as soon as it is there, and writes what was asked for."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width of its own; the tables need this much
    machine = describe()
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, fastattn {machine['fastattn']}"
        f" ({(machine['commit'] or 'no commit')[:12]})",
        highlight=False,
    )
    if compile and peers.compile_unavailable() is not None:
        console.print(f"Without torch.compile: {peers.compile_unavailable()}", highlight=False, markup=False)
        compile = False
    seconds, min_rounds = (0.05, 3) if quick else (seconds, 5)
    floors = Floors(seconds=0.02) if quick else Floors()
    cases = {op: CASES[op](quick) for op in ops}
    results: list[Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, cases.values())))
        for op in ops:
            for case in cases[op]:
                progress.update(task, description=f"{op} {case}")
                results.append(compare(case, floors, seconds=seconds, min_rounds=min_rounds, compile=compile))
                progress.advance(task)
            progress.console.print(report.table(op, [result for result in results if result.case.op == op]))
            if json is not None:
                report.write_json(json, results, floors)
    for kind, values in floors.as_dict().items():
        line = ", ".join(f"{name}: {rate:.1f}" for name, rate in values.items())
        console.print(f"Floors, {kind}: {line}", highlight=False)
    if json is not None:
        console.print(f"Figures: {json}", highlight=False)
    if plot is not None:
        for path in report.write_charts(plot, results):
            console.print(f"Chart: {path}", highlight=False)
