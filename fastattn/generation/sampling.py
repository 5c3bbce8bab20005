"""The choice of a next token from its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.ops import _checks


@dataclass(frozen=True)
class Sampler:
    """Greedy where temperature is 0; else draws from the softmax of logits / temperature, cut as asked.

    Args:
        temperature: 0 for the largest logit.
        top_k: draw from the k largest logits alone; equal ones at the end count all.
        top_p: draw from the fewest most probable tokens that have this probability together (Holtzman et al. 2020), of what
            temperature and top_k leave.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _checks.not_negative("temperature", _checks.number("temperature", self.temperature))
        if self.top_k is not None and _checks.integer("top_k", self.top_k) < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to draw from all tokens")
        if self.top_p is not None and not 0.0 < _checks.number("top_p", self.top_p) <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                "top_k and top_p say what to draw from, and temperature 0 draws nothing; set a temperature, such as 1.0"
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """(batch, vocabulary) logits, any floating dtype, to the probabilities that tokens are drawn with, float32."""
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = scores.softmax(-1)
        if self.top_p is not None and self.top_p < 1.0:
            ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # that of the more probable; the first token always stays
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, places, ordered)
            probabilities /= probabilities.sum(-1, keepdim=True)
        return probabilities

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(batch, vocabulary) logits to (batch,) tokens, int64."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(-1)
