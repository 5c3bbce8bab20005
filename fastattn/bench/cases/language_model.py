"""A small GPT-like language model: one training step on random tokens, from the embedding to the loss and back.

Six layers before whose parts the norms stand, causal attention, and a head that shares the embedding's weight. Ours is
`fastattn.nn.TransformerEncoder` and `fastattn.linear_cross_entropy`; eager the same of torch.nn and F.cross_entropy, whose
attention is torch's fused one. The optimizer's step, which is the same for both, is not timed.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn.nn

from ..harness import OURS, TRAINING, Case, Peer, Problem

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """A vocabulary of 32,000 words, and a small one with longer sequences."""
    if quick:
        return [_case(2, 16, 32, 2, 100, layers=1)]
    return [
        _case(4, 512, 384, 6, 32000),
        _case(4, 512, 384, 6, 32000, dtype=HALF),
        _case(2, 1024, 512, 8, 8000),
    ]


def gpu_cases() -> list[Case]:
    """Twelve layers, 768 wide (GPT-2's smallest)."""
    return [_case(16, 1024, 768, 12, 50304, layers=12, dtype=HALF)]


def _case(batch: int, seq: int, dim: int, heads: int, words: int, *, layers: int = 6, dtype=FLOAT) -> Case:
    tokens = batch * seq
    products = 2 * tokens * (layers * 12 * dim * dim + words * dim) * 3
    attention = layers * 14 * tokens * seq / 2 * dim
    parameters = layers * 12 * dim * dim + words * dim
    shape = {"batch": batch, "seq": seq, "dim": dim, "heads": heads, "words": words, "layers": layers}
    return Case("language_model", shape, dtype, TRAINING, _build, products + attention, 3 * parameters * dtype.itemsize)


class _Model(nn.Module):
    """(batch, seq) token numbers to the mean loss of each token's successor."""

    def __init__(self, kind, dim: int, heads: int, words: int, layers: int) -> None:
        super().__init__()
        layer = kind.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.embedding = nn.Embedding(words, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.stack = kind.TransformerEncoder(layer, layers, norm=kind.LayerNorm(dim), enable_nested_tensor=False)
        self.fused = kind is fastattn.nn

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], ids.device, self.embedding.weight.dtype)
        hidden = self.stack(self.embedding(ids), mask=mask, is_causal=True)
        target = F.pad(ids[:, 1:], (0, 1), value=-100)
        if self.fused:
            return fastattn.linear_cross_entropy(hidden, self.embedding.weight, target)
        logits = F.linear(hidden, self.embedding.weight).flatten(0, 1)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target.flatten())


def _build(case: Case) -> Problem:
    batch, seq, *sizes = case.shape.values()
    torch.manual_seed(0)
    theirs = _Model(nn, *sizes).to(case.dtype)
    ours = _Model(fastattn.nn, *sizes).to(case.dtype)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.arange(batch * seq).reshape(batch, seq) * 7919 % case.shape["words"]

    def peer(model: nn.Module) -> Peer:
        return Peer(model, (ids,), parameters=tuple(model.parameters()))

    names = [name for name, _ in theirs.named_parameters()]

    def definition(ids: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(theirs, dict(zip(names, parameters, strict=True)), (ids,))

    weights = tuple(parameter.detach() for parameter in theirs.parameters())
    return Problem({OURS: peer(ours), "eager": peer(theirs)}, "eager", Peer(definition, (ids, *weights)))
