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

    def run(*args):
        return getattr(BACKENDS[args[-1]][op], direction)(*args[:-1])

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastattn, name).default


def define_composite(op: str, schema: str) -> torch._ops.OpOverload:
    """Registers an op that only the eager backend has: autograd and compilers look through it at its formula."""
    _LIBRARY.define(op + schema)
    _LIBRARY.impl(op, BACKENDS["eager"][op].forward, "CompositeImplicitAutograd")
    return getattr(torch.ops.fastattn, op).default


def record(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`; a tensor given twice (self-attention's lengths, a tied input) is made two for torch.compile."""
    if torch.compiler.is_compiling():
        seen: list[torch.Tensor] = []
        distinct = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if any(arg is other for other in seen):
                    arg = arg.view_as(arg)
                seen.append(arg)
            distinct.append(arg)
        return function.apply(*distinct)
    return function.apply(*args)


def run_backward(backward: torch._ops.OpOverload, *args) -> tuple:
    """Calls a backward op; where a second derivative might be asked for (create_graph), one that says it has none."""
    return _OnceDifferentiable.apply(backward, *args) if torch.is_grad_enabled() else backward(*args)


class _OnceDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backward, *args):
        return backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0].name().removesuffix("_backward").replace("::", ".")

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op} has no second derivative in its fused backward; run the forward inside "
            f"`with fastattn.use_backend('eager'):`, which is differentiable any number of times"
        )


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call has to be recorded by autograd."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
