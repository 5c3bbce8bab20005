"""The grid: `BACKENDS[backend][op]` is the module fastattn/backends/<backend>/<op>.py.

A backend that can run a call has `unsupported(*args)` returning None for it. The eager backend takes every call and has no
`unsupported`; it comes last. A backend of which no kernel can run in this process has no modules, and `ABSENT` says why.
"""

import importlib
import pkgutil
from types import ModuleType

from . import cpu, cuda, eager, triton

OPS = (
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "attention_summary",
    "additive_attention",
    "layer_norm",
    "rms_norm",
    "linear",
    "feed_forward",
    "rotary_embedding",
    "linear_cross_entropy",
    "info_nce",
    "encoder_layer",
    "decoder_layer",
)


def _ops_of(package: ModuleType) -> dict[str, ModuleType]:
    present = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return {op: importlib.import_module(f"{package.__name__}.{op}") for op in OPS if op in present}


BACKENDS: dict[str, dict[str, ModuleType]] = {
    "cpu": _ops_of(cpu),
    "cuda": {} if cuda.reason is not None else _ops_of(cuda),
    "triton": {} if triton.reason is not None else _ops_of(triton),
    "eager": _ops_of(eager),
}
ABSENT: dict[str, str] = {
    name: reason for name, reason in (("cuda", cuda.reason), ("triton", triton.reason)) if reason is not None
}
