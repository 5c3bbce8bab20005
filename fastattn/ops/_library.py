"""Registers the ops with torch.library, and calls them: through the registration where somebody watches, else straight.

Each op is `fastattn::<op>`, and where it has a backward kernel `fastattn::<op>_backward`, so that torch.compile, export, fake
tensors, functional transforms and the profiler see one node a call. The last argument is the name of the backend, so that a
graph keeps the choice made when it was traced. A call that nothing watches skips torch's dispatcher, which costs 4 µs.
"""

from collections.abc import Callable
from types import NoneType

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.nn import Parameter

from ..backends import BACKENDS
from ..backends.cpu import _native

_LIBRARY = torch.library.Library("fastattn", "DEF")

_PLAIN_TYPES = {Tensor, Parameter, NoneType, int, float, bool, str, list}


def watched(*args) -> bool:
    """Whether the call must go through torch's dispatcher: a tracer, a mode, a transform or a tensor subclass is at work."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
        or not _PLAIN_TYPES.issuperset(map(type, args))
    )


class Op:
    """A registered op: `overload` for torch's dispatcher; calling it takes the shortest way to the kernel."""

    def __init__(self, op: str, direction: str, overload: torch._ops.OpOverload) -> None:
        self.op, self.direction, self.overload = op, direction, overload
        arguments = overload._schema.arguments
        self.tensors = [i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type)]
        self._modules = {name: grid.get(op) for name, grid in BACKENDS.items()}

    def __call__(self, *args):
        return self.overload(*args) if watched(*args) else self.unwatched(*args)

    def unwatched(self, *args):
        """A call of which `watched` has been asked."""
        for i in self.tensors:
            x = args[i]
            if x is not None and x.is_neg():
                return self.kernel(*self._without_negated_views(args))
        return getattr(self._modules[args[-1]], self.direction)(*args[:-1])

    def _without_negated_views(self, args: tuple) -> list:
        """Kernels read memory, and a view (the imaginary part of a conjugate) may stand for the negative of what lies there."""
        resolved = list(args)
        for i in self.tensors:
            argument = self.overload._schema.arguments[i]
            if args[i] is None or not args[i].is_neg():
                continue
            if argument.alias_info is not None:
                raise ValueError(
                    f"{argument.name} is changed in place, and is a negated view: pass {argument.name}.resolve_neg()"
                )
            resolved[i] = args[i].resolve_neg()
        return resolved

    def kernel(self, *args):
        """The backend's function, without torch in between."""
        return getattr(self._modules[args[-1]], self.direction)(*args[:-1])


def define(op: str, schema: str, fake: Callable, direction: str = "forward") -> Op:
    """Registers `fastattn::<op>` (or `<op>_backward`).

    Args:
        schema: the arguments without the backend, and the results: `"(Tensor x, …) -> Tensor"`.
        fake: makes the outputs' shapes, strides and dtypes without computing; takes the arguments and the backend's name.
    """
    name = op if direction == "forward" else f"{op}_backward"
    _LIBRARY.define(name + schema.replace(") ->", ", str backend) ->", 1))
    registered = Op(op, direction, getattr(torch.ops.fastattn, name).default)
    _LIBRARY.impl(name, registered.kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIBRARY)
    return registered


# For each Function its twin's `apply`, and how many of the arguments are tensors.
_UNWATCHED: dict[type[torch.autograd.Function], tuple[Callable, int]] = {}


def differentiable(op: Op) -> Callable[[type[torch.autograd.Function]], type[torch.autograd.Function]]:
    """Completes a Function whose forward is the op: what holds for all of them, and a twin that costs less.

    A gradient that did not come in is None, since autograd would make zeros even for outputs that have none; where none
    came in at all, none goes out, and the Function's backward is not asked.

    The twin's forward sets up the context as well: transforms need a `setup_context` of its own, which costs a third of a
    call. The twin is applied by the C++ method under `Function.apply`, whose Python looks for `setup_context` and for
    transforms: the one is not there, and the other `watched` has asked. It takes all that follows the tensors as one tuple,
    since each argument costs 0.2 µs.
    """
    count = len(op.tensors)
    assert op.tensors == list(range(count)), f"{op.op}: the tensors come first"
    nothing = (None,) * len(op.overload._schema.arguments)

    def complete(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        save, differentiate = function.setup_context, function.backward

        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def backward(ctx, *grads):
            for grad in grads:
                if grad is not None:
                    return differentiate(ctx, *grads)
            return nothing

        def twins_forward(ctx, *tensors_and_rest):
            *tensors, rest = tensors_and_rest
            args = (*tensors, *rest)
            output = op.unwatched(*args)
            ctx.set_materialize_grads(False)  # `setup_context`, without the call
            save(ctx, args, output)
            return output

        def twins_backward(ctx, *grads):
            return (*backward(ctx, *grads)[:count], None)

        function.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
        function.backward = staticmethod(backward)  # type: ignore[method-assign]
        function.generate_vmap_rule = True
        members = {"forward": staticmethod(twins_forward), "backward": staticmethod(twins_backward)}
        twin = type(function.__name__, (torch.autograd.Function,), members)
        _UNWATCHED[function] = super(torch.autograd.Function, twin).apply, count  # type: ignore[misc]
        return function

    return complete


def record(function: type[torch.autograd.Function], *args):
    """Runs a differentiable Function. A tensor given twice (lengths in self-attention) is made two for torch.compile."""
    if not watched(*args):
        return record_unwatched(function, *args)
    if torch.compiler.is_compiling():
        seen: list[Tensor] = []
        distinct = []
        for arg in args:
            if isinstance(arg, Tensor):
                if any(arg is other for other in seen):
                    arg = arg.view_as(arg)
                seen.append(arg)
            distinct.append(arg)
        return function.apply(*distinct)
    return function.apply(*args)


def record_unwatched(function: type[torch.autograd.Function], *args):
    """The same, of a call of which `watched` has been asked."""
    apply, count = _UNWATCHED[function]
    tensors = args[:count]
    for x in tensors:
        if type(x) is Tensor and is_functorch_wrapped_tensor(x):
            # It has outlived the transform it was made in, and stands for another one; `Function.apply` knows it, too.
            tensors = tuple(unwrap_if_dead(x) if type(x) is Tensor else x for x in tensors)
            break
    return apply(*tensors, args[count:])


def fits(check: str, *args) -> bool:
    """Whether the bindings' own checks, in one call of C++, find nothing wrong with plain CPU tensors.

    Where they do, or there are no bindings, the checks of the ops layer go through the arguments one by one, and say what
    is wrong. They cost ten times as much.
    """
    try:
        return args[0].is_cpu and getattr(_native.C, check)(*args)
    except (TypeError, ValueError, AttributeError):
        return False


def run_backward(backward: Op, *args) -> tuple:
    """Calls a backward op; where a second derivative might be asked for (create_graph), one that says it has none."""
    return _OnceDifferentiable.apply(backward, *args) if torch.is_grad_enabled() else backward(*args)


def scale_found(grad_loss: Tensor, found: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Gradients found with a loss, times what the loss receives: in their own memory, which autograd is about to let go.

    None where they are to be copied: the graph is kept for another backward, somebody watches, or there are none.
    """
    if watched(grad_loss, *found) or torch.is_grad_enabled() or _get_current_graph_task_keep_graph():
        return None
    if not any(grad.numel() for grad in found):
        return None
    if not (grad_loss.is_cpu and grad_loss.item() == 1.0):
        for grad in found:
            grad.mul_(grad_loss)
    return found


class _OnceDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backward, *args):
        return backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = f"fastattn.{inputs[0].op}"

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op} has no second derivative in its fused backward; run the forward inside "
            f"`with fastattn.use_backend('eager'):`, which is differentiable any number of times"
        )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call has to be recorded by autograd."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110  (a generator for `any` costs as much as the rest of the question)
        if tensor is not None and tensor.requires_grad:
            return True
    return False
