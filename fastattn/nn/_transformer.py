"""What encoder and decoder share. Their layers are torch.nn's, one for one, on fused ops.

Post-norm, the residual add, dropout and layer norm after each sublayer are one op:

    x = norm(x + dropout(sublayer(x)))

Pre-norm, the add after one sublayer and the norm before the next are one op, which returns both:

    normed, x = norm(x + dropout(sublayer(normed))), x + dropout(sublayer(normed))

The feed-forward network is one op where the activation is relu, gelu or silu.
"""

from collections.abc import Callable

from torch import Tensor, nn

from . import _checks
from .attention import MultiheadAttention
from .norm import LayerNorm

Activation = str | Callable[[Tensor], Tensor]

# Each class has the state of its torch.nn base and no more, so that a module of torch.nn becomes one of ours by
# its class alone: the parameters, buffers, hooks and the random numbers of their initialisation are those that torch.nn
# made.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.LayerNorm: LayerNorm,
}


def adopt_children(module: nn.Module) -> None:
    """Turns the torch.nn children that the constructor of torch.nn made into their counterparts."""
    for child in module.children():
        counterpart = COUNTERPARTS.get(type(child))
        if counterpart is not None:
            child.__class__ = counterpart


def length(name: str, x: Tensor, batch_first: bool) -> int:
    """The sequence length of (S, E), (S, N, E) or, batch first, (N, S, E)."""
    _checks.tensor(name, x)
    if x.dim() not in (2, 3):
        raise AssertionError(f"{name} should be unbatched 2D or batched 3D tensor but received {x.dim()}-D tensor")
    return x.shape[1 if x.dim() == 3 and batch_first else 0]
