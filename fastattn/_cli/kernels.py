"""`python -m fastattn kernels`: compiles the GPU kernels, without a GPU, and says what each needs of its chip."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..backends import triton
from ..backends.cuda import binary

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Job:
    """All calls of one op for one chip and dtype, compiled in one process."""

    op: str
    chip: str
    dtype: str

    def run(self) -> list[dict[str, Any]]:
        """One entry a kernel launched; the same kernel with the same needs is there once."""
        from ..backends.triton.calls import calls
        from ..backends.triton.chips import CHIPS
        from ..backends.triton.offline import compile_call

        entries: dict[str, dict[str, Any]] = {}
        for call, function in calls(self.op, DTYPES[self.dtype]):
            for compiled in compile_call(function, CHIPS[self.chip]):
                entry = {
                    "op": self.op,
                    "kernel": compiled.kernel,
                    "chip": self.chip,
                    "dtype": self.dtype,
                    "call": call,
                    "tiles": dict(compiled.config.tiles),
                    "warps": compiled.config.num_warps,
                    "stages": compiled.config.num_stages,
                    "registers": compiled.registers,
                    "spills": compiled.spills,
                    "shared": compiled.shared,
                    "blocks": compiled.blocks,
                    "matrix": compiled.matrix,
                    "engine": compiled.copies,
                    "divided": compiled.divided,
                    "faults": compiled.faults,
                }
                entries.setdefault(json.dumps({**entry, "call": ""}), entry)
        return list(entries.values())


def kernels(ops: list[str], chips: list[str], dtypes: list[str], json_file: Path | None) -> bool:
    """Prints the table; returns whether every kernel keeps its budget.

    Raises:
        RuntimeError: Triton is not there, or the process interprets kernels instead of compiling them.
    """
    if triton.interpreted:
        raise RuntimeError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    if triton.reason is not None and "package" in triton.reason:
        raise RuntimeError(triton.reason)
    entries = _compile([Job(op, chip, dtype) for dtype in dtypes for chip in chips for op in ops])
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console.width = 200
    console.print(_table(entries))
    faults = [fault for entry in entries for fault in entry["faults"]]
    try:
        built = binary.built()
    except FileNotFoundError as error:
        console.print(f"No CUDA kernels: {error}", highlight=False)
    else:
        console.print(_built_table(built))
        faults += [fault for kernel in built for fault in kernel.faults]
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(entries, indent=1) + "\n")
    return not faults


def _compile(jobs: list[Job]) -> list[dict[str, Any]]:
    found: dict[Job, list[dict[str, Any]]] = {}
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with (
        ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=spawn) as pool,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("compiling", total=len(jobs))
        futures = {pool.submit(job.run): job for job in jobs}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress.advance(task)
    return [entry for job in jobs for entry in found[job]]


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table(title="GPU kernels, compiled offline", title_justify="left")
    for name in ("kernel", "chip", "dtype", "tiles", "warps", "stages", "registers", "spilled", "shared", "blocks"):
        table.add_column(name, justify="left" if name in ("kernel", "chip", "dtype", "tiles") else "right")
    table.add_column("matrix unit")
    table.add_column("tiles by")
    table.add_column("budget")
    for entry in entries:
        engine = "copy engine" if entry["engine"] else "addresses"
        table.add_row(
            entry["kernel"],
            entry["chip"],
            entry["dtype"],
            " ".join(f"{name}={size}" for name, size in entry["tiles"].items()),
            *(str(entry[name]) for name in ("warps", "stages", "registers", "spills", "shared", "blocks")),
            entry["matrix"],
            f"{engine}, divided warps" if entry["divided"] else engine,
            "kept" if not entry["faults"] else f"[red]{'; '.join(entry['faults'])} ({entry['call']})[/red]",
        )
    return table


def _built_table(built: list[binary.Built]) -> Table:
    table = Table(title="CUDA kernels, as built", title_justify="left")
    for name in ("kernel", "variant", "chip"):
        table.add_column(name)
    for name in ("threads", "registers", "spilled", "shared"):
        table.add_column(name, justify="right")
    table.add_column("budget")
    for kernel in built:
        sizes = (kernel.threads, kernel.registers, kernel.spills, kernel.shared)
        budget = "kept" if not kernel.faults else f"[red]{'; '.join(kernel.faults)}[/red]"
        table.add_row(kernel.kernel, kernel.variant, kernel.chip, *map(str, sizes), budget)
    return table
