"""What a head does on the whole: means over all the queries that were seen."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..ops.attention_summary import AttentionSummary


@dataclass(frozen=True)
class HeadSummary:
    """One head of one layer, on the mean of the queries that see any key.

    Attributes:
        layer: the layer's name.
        head: its number in the layer.
        entropy: of its weights, in nats: high where it spreads over many keys.
        max_weight: the largest weight, between 0 and 1.
        distance: how far away it looks, in tokens.
    """

    layer: str
    head: int
    entropy: float
    max_weight: float
    distance: float


def head_summaries(layer: str, heads: Iterable[int], sequences: list[AttentionSummary]) -> list[HeadSummary]:
    """A layer's heads, from its summaries (heads, q) of each sequence. NaN for a head that saw nothing."""
    entropy, max_weight, distance, seen = (
        torch.cat([part(one) for one in sequences], dim=-1).double()
        for part in (lambda s: s.entropy, lambda s: s.max_weight, lambda s: s.distance, lambda s: s.argmax >= 0)
    )
    count = seen.sum(dim=-1)
    means = [(torch.where(seen > 0, x, 0.0).sum(dim=-1) / count).tolist() for x in (entropy, max_weight, distance)]
    return [HeadSummary(layer, head, *numbers) for head, *numbers in zip(heads, *means, strict=True)]
