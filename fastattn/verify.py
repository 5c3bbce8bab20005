"""The numerics rule, as a library: a fast path may err twice as far as eager does, and a few units in the last place.

    |fast - reference|  <=  2 * |eager - reference|  +  4 * eps(dtype) * |reference|         each | | a maximum over the tensor

`reference` is the eager backend in float64 on the very same (rounded) inputs, `eager` the eager backend in the inputs' dtype.
The rule holds for outputs and for every gradient. NaN and infinity must stand where eager has them.

    >>> fastattn.verify.check(fastattn.attention, query, key, value, is_causal=True).raise_if_failed()
    >>> print(fastattn.verify.check_model(accelerated, original, input_ids=ids))
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dispatch import use_backend

FACTOR = 2.0
ULPS = 4.0


@dataclass(frozen=True)
class Comparison:
    """One tensor under the rule.

    Attributes:
        name: which output or gradient.
        error: largest |fast - reference|.
        eager_error: largest |eager - reference|.
        allowed: the bound of the rule.
        mismatch: why the tensors cannot be compared at all, or None.
    """

    name: str
    error: float
    eager_error: float
    allowed: float
    mismatch: str | None = None

    @property
    def passed(self) -> bool:
        return self.mismatch is None and self.error <= self.allowed

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        detail = self.mismatch or (
            f"error {self.error:.3e}, allowed {self.allowed:.3e}, eager's own {self.eager_error:.3e}"
        )
        return f"{verdict} {self.name}: {detail}"


@dataclass
class Report:
    """All tensors of one check. Truthy where all passed; prints one line a tensor."""

    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return "\n".join(map(str, self.comparisons))

    def raise_if_failed(self) -> None:
        """AssertionError with the report if any tensor failed."""
        if not self.passed:
            raise AssertionError(f"the numerics rule does not hold:\n{self}")


def compare(fast: Tensor, eager: Tensor, reference: Tensor, name: str = "output") -> Comparison:
    """One tensor under the rule.

    Args:
        fast, eager: the two results in the dtype under test; `fast`'s dtype gives the unit in the last place.
        reference: float64.
    """
    if fast.shape != reference.shape:
        mismatch = f"has shape {tuple(fast.shape)}, the reference {tuple(reference.shape)}"
        return Comparison(name, float("inf"), 0.0, 0.0, mismatch)
    eps = torch.finfo(fast.dtype).eps
    wide, wide_eager, reference = (x.detach().double() for x in (fast, eager, reference))
    same = _equally_special(wide, wide_eager) | _equally_special(wide, reference)
    if not bool(same.all()):
        count = int((~same).sum())
        mismatch = f"{count} of {same.numel()} elements are NaN or infinite where eager's are not, or the reverse"
        return Comparison(name, float("inf"), 0.0, 0.0, mismatch)

    def largest(x: Tensor) -> float:
        x = x[torch.isfinite(x)]
        return float(x.abs().max()) if x.numel() else 0.0

    error, eager_error = largest(wide - reference), largest(wide_eager - reference)
    return Comparison(name, error, eager_error, FACTOR * eager_error + ULPS * eps * largest(reference))


def _equally_special(x: Tensor, y: Tensor) -> Tensor:
    """Where both are finite, both NaN, or the same infinity."""
    return (torch.isfinite(x) & torch.isfinite(y)) | (x == y) | (torch.isnan(x) & torch.isnan(y))


def compare_all(fast: Iterable, eager: Iterable, reference: Iterable, names: Iterable[str]) -> Report:
    """The rule for several tensors at once; None in all three places is skipped."""
    report = Report()
    for a, b, c, name in zip(fast, eager, reference, names, strict=True):
        if a is None and b is None and c is None:
            continue
        if a is None or b is None or c is None:
            report.comparisons.append(Comparison(name, float("inf"), 0.0, 0.0, "is missing on one side"))
        else:
            report.comparisons.append(compare(a, b, c, name))
    return report


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _floating_tensors(tree: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _widen(x: Tensor) -> Tensor:
    """A float64 copy that requires a gradient if x does."""
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def _run(function: Callable, args: tuple, kwargs: dict, leaves: list[Tensor], seed: int) -> tuple[list, list]:
    """Outputs of one run, and gradients of a random but fixed projection of them."""
    torch.manual_seed(seed)
    outputs = _floating_tensors(function(*args, **kwargs))
    recorded = [out for out in outputs if out.requires_grad]
    if not leaves or not recorded:
        return outputs, [None] * len(leaves)
    generator = torch.Generator().manual_seed(seed)
    directions = []
    for out in recorded:
        direction = torch.randn(out.shape, generator=generator, dtype=torch.float32)
        # Rounded to bfloat16, the direction is the same number in every dtype.
        directions.append(direction.to(torch.bfloat16).to(device=out.device, dtype=out.dtype))
    grads = torch.autograd.grad(recorded, leaves, directions, allow_unused=True)
    return outputs, list(grads)


def check(
    function: Callable,
    *args: Any,
    backend: str | None = None,
    eager: Callable | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Report:
    """Runs a function three times (as dispatch chooses, eager, eager in float64) and applies the rule.

    Args:
        function: anything built on fastattn's ops; called as function(*args, **kwargs). Its floating outputs are compared,
            and the gradients of every argument tensor that requires one.
        backend: run the fast path with `use_backend(backend)`, so that a call which it cannot take is an error.
        eager: the function to take eager's and the reference's results from, where `function` itself is not built on fastattn's
            ops or where another implementation should judge it.
        seed: torch.manual_seed before each run, so that dropout draws the same mask.

    Returns:
        A Report; `raise_if_failed()` makes an error of a failure.
    """
    leaves = [t for t in _floating_tensors((args, kwargs)) if t.requires_grad]
    wide_args, wide_kwargs = _map_tensors((args, kwargs), _widen)
    wide_leaves = [t for t in _floating_tensors((wide_args, wide_kwargs)) if t.requires_grad]
    if backend is None:
        fast = _run(function, args, kwargs, leaves, seed)
    else:
        with use_backend(backend):
            fast = _run(function, args, kwargs, leaves, seed)
    judge = function if eager is None else eager
    with use_backend("eager"):
        slow = _run(judge, args, kwargs, leaves, seed)
        reference = _run(judge, wide_args, wide_kwargs, wide_leaves, seed)
    names = [f"output {i}" for i in range(len(fast[0]))] + [f"gradient of {name}" for name in _names(args, kwargs)]
    return compare_all(fast[0] + fast[1], slow[0] + slow[1], reference[0] + reference[1], names)


def _names(args: tuple, kwargs: dict) -> list[str]:
    """Names of the tensors that require a gradient, in the order of `_floating_tensors`."""
    paths, _ = torch.utils._pytree.tree_flatten_with_path((args, kwargs))
    names = []
    for path, leaf in paths:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            _, *rest = path
            first: Any = rest[0]
            head = f"argument {first.idx}" if hasattr(first, "idx") else str(first.key)
            names.append(head + torch.utils._pytree.keystr(tuple(rest[1:])))
    return names


def check_model(
    model: torch.nn.Module, original: torch.nn.Module, *args: Any, gradients: bool = True, seed: int = 0, **kwargs: Any
) -> Report:
    """The rule for a whole model: an accelerated one against its original, judged by the original in float64.

    Args:
        model: the fast model.
        original: the model before acceleration (a deep copy, say), same parameters by name.
        args, kwargs: what both are called with. Floating outputs are compared, whatever structure they come in.
        gradients: also compare the gradient of every parameter.
    """
    wide = copy.deepcopy(original).double()

    def run(module: torch.nn.Module, arguments: Any) -> tuple[list, list]:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad] if gradients else []
        with torch.set_grad_enabled(gradients):
            return _run(module, arguments[0], arguments[1], [p for _, p in named], seed)

    names = [name for name, p in model.named_parameters() if p.requires_grad] if gradients else []
    fast = run(model, (args, kwargs))
    slow = run(original, (args, kwargs))
    reference = run(wide, _map_tensors((args, kwargs), _widen))
    labels = [f"output {i}" for i in range(len(fast[0]))] + [f"gradient of {name}" for name in names]
    return compare_all(fast[0] + fast[1], slow[0] + slow[1], reference[0] + reference[1], labels)
