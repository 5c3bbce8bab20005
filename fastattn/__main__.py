"""`python -m fastattn info`, `python -m fastattn bench` and `python -m fastattn kernels`."""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch

from ._cli.kernels import DTYPES, kernels
from .backends.triton.calls import OPS as KERNEL_OPS
from .backends.triton.chips import CHIPS
from .bench.cases import CASES, GPU_CASES


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(prog="python -m fastattn", description="What fastattn can do here, and how fast.")
    commands = top.add_subparsers(dest="command", required=True)

    commands.add_parser("info", help="versions, devices, instruction sets, and what each backend takes")

    bench = commands.add_parser("bench", help="compare with eager, SDPA, oneDNN and torch.compile")
    bench.add_argument("op", nargs="*", help=f"what to measure; everything by default ({', '.join(CASES)})")
    bench.add_argument("--quick", action="store_true", help="one small shape a direction, a fraction of a second each")
    bench.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="measure torch.compile too (default: unless --quick)"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    bench.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own number)")
    bench.add_argument("--seconds", type=float, help="timing a case (default: 2, with --quick 0.05)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure, and the machine, to this file")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to this file")
    bench.add_argument("--plot", type=Path, metavar="FOLDER", help="write a PNG an op into this folder")

    budgets = commands.add_parser(
        "kernels", help="compile the GPU kernels offline, and say what each needs of its chip"
    )
    budgets.add_argument("op", nargs="*", help=f"whose kernels; all by default ({', '.join(KERNEL_OPS)})")
    budgets.add_argument("--chip", nargs="+", choices=list(CHIPS), default=list(CHIPS), help="for which chips")
    budgets.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of which tensors")
    budgets.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file")
    return top


def main(arguments: list[str] | None = None) -> None:
    """Runs one command."""
    top = parser()
    options = top.parse_args(arguments)
    if options.command == "info":
        from ._cli.info import info

        info()
    elif options.command == "kernels":
        _check_names(top, options.op, KERNEL_OPS, "GPU kernel")
        if not kernels(options.op or list(KERNEL_OPS), options.chip, options.dtype, options.json):
            raise SystemExit(1)
    else:
        measured = CASES if options.device == "cpu" else GPU_CASES
        _check_names(top, options.op, measured, "benchmark")
        if options.device == "cuda" and not torch.cuda.is_available():
            top.error("--device cuda: torch finds no GPU here")
        if options.threads is not None:
            if options.threads < 1:
                top.error(f"--threads is {options.threads}; expected 1 or more")
            torch.set_num_threads(options.threads)
        from ._cli.bench import bench

        compile = not options.quick if options.compile is None else options.compile
        seconds = (0.05 if options.quick else 2.0) if options.seconds is None else options.seconds
        if not bench(
            options.op or list(measured),
            options.quick,
            seconds,
            compile,
            options.json,
            options.markdown,
            options.plot,
            options.device,
        ):
            raise SystemExit(1)


def _check_names(top: argparse.ArgumentParser, asked: list[str], there: Collection[str], what: str) -> None:
    unknown = [name for name in asked if name not in there]
    if unknown:
        top.error(f"there is no {what} of {', '.join(unknown)}; choose from {', '.join(there)}")


if __name__ == "__main__":
    main()
