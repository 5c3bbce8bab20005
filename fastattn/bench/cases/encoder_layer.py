"""A whole `TransformerEncoderLayer`, against torch.nn's with the same weights."""

import torch

import fastattn.nn

from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """Small and base width; inference in eval mode (where torch.nn has a fused path of its own), and training."""
    if quick:
        return [_case(2, 16, 32, 4, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(32, 64, 384, 12),
        _case(8, 128, 768, 12),
        _case(8, 128, 768, 12, dtype=HALF),
        _case(2, 1024, 768, 12),
        _case(8, 512, 384, 12, direction=TRAINING),
        _case(8, 128, 768, 12, direction=TRAINING),
        _case(8, 128, 768, 12, direction=TRAINING, dtype=HALF),
    ]


def _case(batch, seq, dim, heads, *, dtype=FLOAT, direction=FORWARD) -> Case:
    tokens = batch * seq
    attention = 4 * tokens * seq * dim * (1 if direction == FORWARD else 3.5)
    products = (
        2 * tokens * 12 * dim * dim * (1 if direction == FORWARD else 3)
    )  # 4 projections, feed-forward 4 × as wide
    moved = (2 * tokens * dim + 12 * dim * dim) * dtype.itemsize * (1 if direction == FORWARD else 3)
    shape = {"batch": batch, "seq": seq, "dim": dim, "heads": heads}
    return Case("encoder_layer", shape, dtype, direction, _build, attention + products, moved)


def _build(case: Case) -> Problem:
    batch, seq, dim, heads = case.shape.values()

    def layer(kind: type[torch.nn.TransformerEncoderLayer]) -> torch.nn.TransformerEncoderLayer:
        return kind(dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True)

    torch.manual_seed(0)
    theirs = layer(torch.nn.TransformerEncoderLayer).to(case.dtype)
    ours = layer(fastattn.nn.TransformerEncoderLayer).to(case.dtype)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        module.train(case.direction == TRAINING)
    inputs = tuple(random((batch, seq, dim), dtype=case.dtype))

    def peer(module: torch.nn.Module) -> Peer:
        return Peer(module, inputs, parameters=tuple(module.parameters()))

    # In training mode torch.nn runs its layers one by one: the definition, with its parameters as inputs.
    plain = layer(torch.nn.TransformerEncoderLayer).train()
    names = [name for name, _ in plain.named_parameters()]

    def definition(x, *parameters):
        return torch.func.functional_call(plain, dict(zip(names, parameters, strict=True)), (x,))

    weights = tuple(parameter.detach() for parameter in theirs.parameters())
    return Problem({OURS: peer(ours), "eager": peer(theirs)}, "eager", Peer(definition, (*inputs, *weights)))
