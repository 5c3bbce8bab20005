"""What a fused op may look through: a module of torch.nn that does what its class says, and nobody watches."""

from torch import nn


def hooked(module: nn.Module) -> bool:
    """Whether this very module is watched, or its forward replaced, so that it has to be called, not looked through."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def dropout_p(dropout: nn.Module) -> float | None:
    """The probability with which a dropout module drops in its present mode; None where it has to be called."""
    if type(dropout) is not nn.Dropout or hooked(dropout):
        return None
    assert isinstance(dropout, nn.Dropout)
    return dropout.p if dropout.training else 0.0
