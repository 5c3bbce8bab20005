"""`python -m fastattn info`: what is installed, what was built, and what each backend takes."""

import importlib.metadata
import os
import platform

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import __version__
from ..backends import BACKENDS, OPS
from ..backends.cpu import _native
from ..bench.machine import commit, cpu
from ..dispatch import explain

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKAGES = ("torch", "triton", "transformers", "numpy")


def info() -> None:
    """Prints everything."""
    console = Console()
    console.print(versions())
    console.print(processor())
    for device in devices():
        console.print(abilities(device))


def versions() -> Table:
    """fastattn, Python and the packages beside it."""
    table = Table(title="Versions", show_header=False, title_justify="left")
    sha = commit()
    table.add_row("fastattn", __version__ + (f" ({sha[:12]}{'+' if sha.endswith('+') else ''})" if sha else ""))
    table.add_row("python", platform.python_version())
    for name in PACKAGES:
        table.add_row(name, _version(name))
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> Table:
    """The processor, its threads, and the instruction sets of the CPU backend."""
    table = Table(title="Processor", show_header=False, title_justify="left")
    name, flags = cpu()
    table.add_row("cpu", name)
    table.add_row("instructions found", " ".join(flags) or "unknown")
    for key, value in instruction_sets().items():
        table.add_row(key, value)
    table.add_row("threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it; {os.cpu_count()} cores)")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(
            f"cuda:{index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )
    return table


def instruction_sets() -> dict[str, str]:
    """The extension's instruction sets, built ones that this machine runs and the one in use; or why there is none."""
    if _native.C is None:
        return {"cpu kernels": str(_native.reason)}
    return {
        "kernels built for": f"{', '.join(_native.C.isas())} (of those this machine runs)",
        "kernels in use": f"{_native.C.isa()} (FASTATTN_CPU_ISA overrides it)",
    }


def devices() -> list[str]:
    """The devices to ask about."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def abilities(device: str) -> Table:
    """Each op against each backend: "yes", or the dtypes it takes and the reason for the others."""
    table = Table(title=f"Backends on {device}, in order of preference", title_justify="left", show_lines=True)
    table.add_column("op", no_wrap=True)
    for backend in BACKENDS:
        table.add_column(backend, overflow="fold")
    for op in OPS:
        reasons = {}
        for dtype in DTYPES:
            args, kwargs = example(op, dtype, device)
            reasons[dtype] = explain(op, *args, **kwargs).reasons
        table.add_row(op, *(_cell({dtype: reasons[dtype][backend] for dtype in DTYPES}) for backend in BACKENDS))
    return table


def _cell(reasons: dict[torch.dtype, str | None]) -> str:
    """One backend's answer for one op."""
    by_reason: dict[str | None, list[str]] = {}
    for dtype, reason in reasons.items():
        by_reason.setdefault(reason, []).append(str(dtype).removeprefix("torch."))
    if len(by_reason) == 1:
        (reason,) = by_reason
        return "yes" if reason is None else f"no: {reason}"
    parts = [f"{'yes' if reason is None else 'no'} in {', '.join(names)}" for reason, names in by_reason.items()]
    return "; ".join(
        part if reason is None else f"{part}: {reason}" for part, reason in zip(parts, by_reason, strict=True)
    )


def example(op: str, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    """Small ordinary arguments, positional and by keyword, for `fastattn.<op>`."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    def integers(*values: int, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    query, packed, rows, square, vector = ones(1, 2, 8, 64), ones(8, 2, 64), ones(8, 64), ones(64, 64), ones(64)
    ends = integers(0, 8)
    cached = {"cache_seqlens": integers(4)}
    keywords = {"attention_with_kvcache": cached, "decoder_layer": cached}
    positional = {
        "attention": (query, query, query),
        "attention_varlen": (packed, packed, packed, ends, ends, 8, 8),
        "attention_with_kvcache": (query, query, query),
        "attention_summary": (query, query),
        "additive_attention": (ones(1, 8, 64), ones(1, 8, 64), ones(1, 8, 64), square, square, vector),
        "layer_norm": (rows, vector, vector),
        "rms_norm": (rows, vector),
        "linear": (rows, square, vector),
        "feed_forward": (rows, square, vector, square, vector),
        "rotary_embedding": (query, query, ones(8, 64), ones(8, 64)),
        "linear_cross_entropy": (rows, square, integers(*range(8), kind=torch.int64)),
        "info_nce": (rows, rows),
        "encoder_layer": (
            ones(1, 8, 64),
            *(square, vector) * 4,
            vector,
            vector,
            *(square, vector) * 2,
            vector,
            vector,
            4,
        ),
        "decoder_layer": (
            ones(1, 1, 64),
            query,
            query,
            ones(384, 64),
            None,
            ones(64, 128),
            *(vector,) * 3,
            *(square, vector) * 2,
            vector,
            vector,
        ),
    }
    return positional[op], keywords.get(op, {})
