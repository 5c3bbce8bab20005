"""Registers the ops with torch.library, so that torch.compile, export and fake tensors see one node a call.

Each op is `fastattn::<op>`, and where it has a backward kernel `fastattn::<op>_backward`. The last argument is the name of the
backend, so that a graph keeps the choice made when it was traced. `Library.define` and `impl` cost a call 2 µs;
`torch.library.custom_op` would cost 10.
"""

from collections.abc import Callable

import torch

from ..backends import BACKENDS

_LIBRARY = torch.library.Library("fastattn", "DEF")


def define(op: str, schema: str, fake: Callable, direction: str = "forward") -> torch._ops.OpOverload:
    """Registers `fastattn::<op>` (or `<op>_backward`) and returns it.

    Args:
        schema: the arguments without the backend, and the results: `"(Tensor x, …) -> Tensor"`.
        fake: makes the outputs' shapes, strides and dtypes without computing; takes the arguments and the backend's name.
    """
    name = op if direction == "forward" else f"{op}_backward"
    _LIBRARY.define(name + schema.replace(") ->", ", str backend) ->", 1))
    kernels = {backend: getattr(ops[op], direction, None) for backend, ops in BACKENDS.items() if op in ops}

    def run(*args):
        return kernels[args[-1]](*args[:-1])

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.fastattn, name).default
    if direction == "backward":
        torch.library.register_autograd(f"fastattn::{name}", _no_second_derivative(op), lib=_LIBRARY)
    return overload


def define_composite(op: str, schema: str) -> torch._ops.OpOverload:
    """Registers an op that only the eager backend has: autograd and compilers look through it at its formula."""
    _LIBRARY.define(op + schema)
    _LIBRARY.impl(op, BACKENDS["eager"][op].forward, "CompositeImplicitAutograd")
    return getattr(torch.ops.fastattn, op).default


def _no_second_derivative(op: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastattn.{op} has no second derivative in its fused backward; run the forward inside "
            f"`with fastattn.use_backend('eager'):`, which is differentiable any number of times"
        )

    return backward


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call has to be recorded by autograd."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False
