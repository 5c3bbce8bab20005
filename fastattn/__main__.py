"""`python -m fastattn info` and `python -m fastattn bench`."""

import argparse
from pathlib import Path

import torch

from .bench.cases import CASES


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
    bench.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own number)")
    bench.add_argument("--seconds", type=float, help="timing a case (default: 2, with --quick 0.05)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure, and the machine, to this file")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to this file")
    bench.add_argument("--plot", type=Path, metavar="FOLDER", help="write a PNG an op into this folder")
    return top


def main(arguments: list[str] | None = None) -> None:
    """Runs one command."""
    top = parser()
    options = top.parse_args(arguments)
    if options.command == "info":
        from ._cli.info import info

        info()
    else:
        unknown = [op for op in options.op if op not in CASES]
        if unknown:
            top.error(f"there is no benchmark of {', '.join(unknown)}; choose from {', '.join(CASES)}")
        if options.threads is not None:
            if options.threads < 1:
                top.error(f"--threads is {options.threads}; expected 1 or more")
            torch.set_num_threads(options.threads)
        from ._cli.bench import bench

        compile = not options.quick if options.compile is None else options.compile
        seconds = (0.05 if options.quick else 2.0) if options.seconds is None else options.seconds
        if not bench(
            options.op or list(CASES), options.quick, seconds, compile, options.json, options.markdown, options.plot
        ):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
