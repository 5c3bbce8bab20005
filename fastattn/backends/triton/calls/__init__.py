"""For each op, calls on meta tensors that between them launch every kernel, with every row of the table of configurations.

`calls/<op>.py` has `calls(dtype)`, which yields (what is special about the call, a function that makes it).
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator

import torch

OPS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def calls(op: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls of one op."""
    return importlib.import_module(f"{__name__}.{op}").calls(dtype)
