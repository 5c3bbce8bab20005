"""`python -m fastattn bench`."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..bench import peers, report
from ..bench.cases import CASES, GPU_CASES
from ..bench.harness import Result, compare, first_line
from ..bench.machine import Yardsticks, describe


def bench(
    ops: list[str],
    quick: bool,
    seconds: float,
    compile: bool,
    json: Path | None,
    markdown: Path | None,
    plot: Path | None,
    device: str = "cpu",
) -> bool:
    """Measures these ops, prints a table each as soon as it is there, and writes what was asked for.

    Returns:
        Whether every case could be measured; it has said why where not.
    """
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width of its own; the tables need this much
    machine = describe(device)
    kernels = "no CPU kernels" if machine["isa"] is None else f"CPU kernels for {machine['isa']}"
    console.print(
        f"{report.name_of(machine)}, {kernels}, "
        f"torch {machine['torch']}, fastattn {machine['fastattn']} ({machine['commit'] or 'no commit'})",
        highlight=False,
    )
    if compile and peers.compile_unavailable() is not None:
        console.print(f"Without torch.compile: {peers.compile_unavailable()}", highlight=False, markup=False)
        compile = False
    min_rounds = 3 if quick else 5
    yardsticks = Yardsticks(seconds=0.02 if quick else 0.2, device=device)
    cases = {op: (CASES if device == "cpu" else GPU_CASES)[op](quick) for op in ops}
    results: list[Result] = []
    failed = 0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, cases.values())))
        for op in ops:
            for case in cases[op]:
                progress.update(task, description=f"{op} {case}")
                try:
                    results.append(compare(case, yardsticks, seconds=seconds, min_rounds=min_rounds, compile=compile))
                except Exception as error:  # said here, and the other cases go on
                    failed += 1
                    line = f"Not measured, {op} {case}: {type(error).__name__}: {first_line(error)}"
                    progress.console.print(line, highlight=False, markup=False)
                progress.advance(task)
            measured = [result for result in results if result.case.op == op]
            if measured:
                progress.console.print(report.table(op, measured))
            if json is not None:
                report.write_json(json, results)
            if markdown is not None:
                report.write_markdown(markdown, results)
    if json is not None:
        console.print(f"Figures: {json}", highlight=False)
    if markdown is not None:
        console.print(f"Tables: {markdown}", highlight=False)
    if plot is not None:
        rates = report.write_rates(plot, results) if device == "cuda" else []
        for path in (*report.write_charts(plot, results), *rates):
            console.print(f"Chart: {path}", highlight=False)
    return failed == 0
