"""The grid: `BACKENDS[backend][op]` is the module fastattn/backends/<backend>/<op>.py.

A backend that can run a call has `unsupported(*args)` returning None for it. The eager backend takes every call and has no
`unsupported`; it comes last.
"""

import importlib
import pkgutil
from types import ModuleType

from . import cpu, eager

OPS = (
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "additive_attention",
    "layer_norm",
    "rms_norm",
    "linear",
    "feed_forward",
    "rotary_embedding",
    "linear_cross_entropy",
    "info_nce",
    "encoder_layer",
)


def _ops_of(package: ModuleType) -> dict[str, ModuleType]:
    present = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return {op: importlib.import_module(f"{package.__name__}.{op}") for op in OPS if op in present}


BACKENDS: dict[str, dict[str, ModuleType]] = {"cpu": _ops_of(cpu), "eager": _ops_of(eager)}
