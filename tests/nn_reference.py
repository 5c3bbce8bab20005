"""torch.nn as the reference of fastattn.nn: same weights in both, same outputs and gradients out of both."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Relative to the largest value of the group (all outputs, or all gradients): a gradient that is zero in exact
# arithmetic, as that of the keys' bias, has no scale of its own.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
MODES = [(True, True), (False, True), (False, False)]  # training, and whether gradients are recorded


def pair(ours: type[nn.Module], theirs: type[nn.Module], *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Both modules from one seed; asserts that they start equal, then fills both with random values.

    The state goes once from theirs to ours and once the other way, strictly.
    """
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
        torch.manual_seed(0)
        a = ours(*args, **kwargs)
        torch.manual_seed(0)
        b = theirs(*args, **kwargs)
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in b.state_dict().items():
        torch.testing.assert_close(a.state_dict()[key], value, rtol=0, atol=0, msg=f"{key} starts differently")
    randomise(b)
    a.load_state_dict(b.state_dict(), strict=True)
    b.load_state_dict(copy.deepcopy(a).state_dict(), strict=True)
    return a, b


def randomise(module: nn.Module) -> None:
    """Biases start at zero and norms at one, where errors hide; give all parameters values of their own."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def run(
    module: Callable, inputs: Iterable[Tensor], kwargs: dict, grad: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients of a fixed random projection with respect to inputs, floating masks and parameters.

    An object that is passed twice is passed twice as one copy, so that self-attention stays recognisable.
    """
    copies: dict[int, Tensor] = {}

    def fresh(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in copies:
            copies[id(x)] = x.detach().clone().requires_grad_(x.requires_grad and grad)
        return copies[id(x)]

    arguments = [fresh(x) for x in inputs]
    keywords = {name: fresh(x) for name, x in kwargs.items()}
    with torch.set_grad_enabled(grad):
        outputs = tensors_of(module(*arguments, **keywords))
        if not grad:
            return outputs, []
        leaves = [x for x in copies.values() if x.requires_grad] + list(module.parameters())
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
        return outputs, list(torch.autograd.grad(outputs, leaves, directions, allow_unused=True))


def assert_close_group(ours: list, theirs: list, tolerance: float) -> None:
    assert len(ours) == len(theirs)
    scale = max((float(x.detach().abs().max()) for x in theirs if x is not None and x.numel()), default=0.0)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # None and zeros both say that nothing flows back.
        a = torch.zeros_like(b) if a is None and b is not None else a
        b = torch.zeros_like(a) if b is None and a is not None else b
        if a is None:
            continue
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.isfinite(a).all(), f"tensor {i} is not finite"
        assert float((a - b).detach().abs().max() if a.numel() else 0.0) <= tolerance * max(scale, 0.1), f"tensor {i}"


def assert_same(ours: nn.Module, theirs: nn.Module, inputs: Iterable[Tensor], grad: bool = True, **kwargs: Any) -> None:
    """Outputs, and with grad the gradients of inputs, floating masks and parameters, agree."""
    inputs = list(inputs)
    tolerance = TOLERANCE[inputs[0].dtype]
    a, grads_a = run(ours, inputs, kwargs, grad)
    b, grads_b = run(theirs, inputs, kwargs, grad)
    assert_close_group(a, b, tolerance)
    assert_close_group(grads_a, grads_b, tolerance)


def assert_same_error(ours: Callable, theirs: Callable, *args: Any, **kwargs: Any) -> None:
    """Both refuse the call, with the same type of exception; torch's NotImplementedError is one of RuntimeError's."""
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs(*args, **kwargs)
    error = type(expected.value)
    with pytest.raises(RuntimeError if issubclass(error, RuntimeError) else error):
        ours(*args, **kwargs)


def uniform(*shape: int, dtype: torch.dtype, requires_grad: bool = True) -> Tensor:
    return (torch.rand(*shape, dtype=dtype) * 2 - 1).requires_grad_(requires_grad)


def left_aligned(lengths: list[int], longest: int) -> Tensor:
    """A padding mask, True after each sequence's end."""
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]
