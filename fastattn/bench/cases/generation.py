"""Text from a language model: `fastattn.generation.generate` against Hugging Face's `generate` on the same weights.

A call reads a prompt a row and writes new tokens behind each, greedily or by beams; batch · new over the time is tokens a second.
Both keep keys and values; Hugging Face's attention is torch's fused one. The peers have to write the same tokens.
"""

import copy
import importlib.util

import torch
from torch import Tensor

from fastattn.generation import generate

from ..harness import FORWARD, OURS, Case, Peer, Problem
from ._language_models import NEEDS, pair

WORDS = 32000


def cases(quick: bool = False) -> list[Case]:
    """GPT-2-like and Llama-like, small and base, one text and eight, and by four beams; none without transformers."""
    if any(importlib.util.find_spec(name) is None for name in NEEDS):
        return []
    if quick:
        return [_case(1, "gpt", 64, 1, words=100, prompt=4, new=4)]
    return [
        _case(batch, kind, dim, layers, beams)
        for dim, layers in ((384, 6), (768, 12))
        for kind in ("gpt", "llama")
        for batch, beams in ((1, 1), (8, 1), (1, 4))
    ]


def _case(batch: int, kind: str, dim: int, layers: int, beams: int = 1, *, words=WORDS, prompt=32, new=64) -> Case:
    weights = layers * 12 * dim * dim + words * dim
    flops = 2 * batch * (prompt + beams * new) * weights
    shape = {"batch": batch, "dim": dim, "layers": layers, "words": words, "prompt": prompt, "new": new}
    options = f"{kind} {beams} beams" if beams > 1 else kind
    return Case("generation", shape, torch.float32, FORWARD, _build, flops, 4 * new * weights, options)


def _build(case: Case) -> Problem:
    batch, dim, layers, words, prompt, new = case.shape.values()
    kind, *beams = case.options.split()
    count = int(beams[0]) if beams else 1
    ours, theirs = pair(kind, dim, layers, words)
    ids = torch.randint(1, words, (batch, prompt), generator=torch.Generator().manual_seed(0))

    def written(ids: Tensor) -> Tensor:
        return torch.stack(generate(ours, ids, new, num_beams=count)).float()  # what the harness compares is floating

    def reference(model: torch.nn.Module, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        text = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, num_beams=count
        )
        return text[:, prompt:].float()

    # The harness asks for the definition in two dtypes by those of its inputs; a model's are integers.
    definition = Peer(
        lambda ids, like: reference(theirs if like.dtype == torch.float32 else copy.deepcopy(theirs).double(), ids),
        (ids, torch.zeros((), dtype=case.dtype)),
    )
    peers = {OURS: Peer(written, (ids,)), "huggingface": Peer(lambda ids: reference(theirs, ids), (ids,))}
    return Problem(peers, "huggingface", definition)
