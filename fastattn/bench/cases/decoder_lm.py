"""A training step of `fastattn.models.DecoderLM`, AdamW's included: loss, gradients, and the optimizer over all parameters.

Against it stand the same model in plain torch ("eager", as `fastattn.use_backend` gives it) and Hugging Face's with the same
weights, whose attention is torch's fused one and which forms the logits. The learning rate is 0, at which AdamW does all its work
and every step starts from the same weights, so that the loss and the embedding's gradient can be compared.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

import fastattn

from ..harness import OURS, STEP, Case, Peer, Problem
from ._language_models import NEEDS, pair


def cases(quick: bool = False) -> list[Case]:
    """Six layers, 384 wide, 32,000 words; none without transformers."""
    if any(importlib.util.find_spec(name) is None for name in NEEDS):
        return []
    if quick:
        return [_case(2, 8, "gpt", 64, 1, 100)]
    return [_case(4, 512, kind, 384, 6, 32000) for kind in ("gpt", "llama")]


def _case(batch: int, seq: int, kind: str, dim: int, layers: int, words: int) -> Case:
    weights = layers * 12 * dim * dim + words * dim
    flops = 6 * batch * seq * weights + layers * 14 * batch * seq * seq / 2 * dim
    shape = {"batch": batch, "seq": seq, "dim": dim, "layers": layers, "words": words}
    # A step reads and writes the parameters, their gradients and two moments.
    return Case("decoder_lm", shape, torch.float32, STEP, _build, flops, 8 * 4 * weights, kind, compiled=False)


def _build(case: Case) -> Problem:
    batch, seq, dim, layers, words = case.shape.values()
    ours, theirs = pair(case.options, dim, layers, words)
    ids = torch.randint(1, words, (batch, seq), generator=torch.Generator().manual_seed(0))

    peers = {
        OURS: Peer(_step(copy.deepcopy(ours)), (ids,)),
        "eager": Peer(_in_plain_torch(copy.deepcopy(ours)), (ids,)),
        "huggingface": Peer(_step(copy.deepcopy(theirs)), (ids,)),
    }
    definition = Peer(
        lambda ids, like: _in_plain_torch(copy.deepcopy(ours).to(like.dtype))(ids),
        (ids, torch.zeros((), dtype=case.dtype)),
    )
    return Problem(peers, "eager", definition)


def _step(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Token ids to the loss and the embedding's gradient, after a step of AdamW."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.0)
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))

    def step(ids: Tensor) -> tuple[Tensor, ...]:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        grad = cast(Tensor, embedding.weight.grad)
        optimizer.zero_grad()
        return loss.detach(), grad

    return step


def _in_plain_torch(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    step = _step(model)

    def plain(ids: Tensor) -> tuple[Tensor, ...]:
        with fastattn.use_backend("eager"):
            return step(ids)

    return plain
