"""Transformer layers on `SelfAttention` and `fastattn.nn.FeedForward`, and their initialisation."""

import math

from torch import Tensor, nn

from fastattn.nn import FeedForward, LayerNorm, RMSNorm

from . import _decoder_layer
from .self_attention import Angles, Continued, CrossAttention, Memory, Remembered, SelfAttention, Tokens


def make_norm(kind: str, d_model: int, eps: float) -> LayerNorm | RMSNorm:
    """A "layer" or "rms" norm."""
    return LayerNorm(d_model, eps) if kind == "layer" else RMSNorm(d_model, eps)


class PreNormLayer(nn.Module):
    """x = x + attention(norm1(x)); x = x + feed_forward(norm2(x)), each branch dropped out before it is added. With `cross`,
    x = x + cross(norm_cross(x)) stands between the two.

    A layer gives the branch of its feed-forward network without adding it: the next layer's norm1, or the norm at the end
    of the model, adds and normalises in one pass. On tokens behind a cache it runs as one op where it can (`_decoder_layer`),
    and leaves no branch.

    Source: Xiong et al., 2020.
    """

    def __init__(
        self,
        attention: SelfAttention,
        feed_forward: FeedForward,
        norms: list[LayerNorm | RMSNorm],
        dropout: float,
        cross: CrossAttention | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, *rest = norms
        self.norm_cross = rest[0] if rest else None
        self.attention, self.cross, self.feed_forward, self.dropout = attention, cross, feed_forward, dropout

    def forward(
        self,
        branch: Tensor | None,
        x: Tensor,
        tokens: Tokens,
        angles: Angles = None,
        memory: Memory | Remembered | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """(branch, x) to (branch, x), each (batch, seq, d_model); a branch is None where there is nothing to add."""
        if isinstance(tokens, Continued):
            whole = _decoder_layer.run(self, branch, x, tokens, angles)
            if whole is not None:
                return None, whole
        p = self.dropout if self.training else 0.0
        if branch is None:
            normed = self.norm1(x, dropout_p=0.0)
        else:
            normed, x = self.norm1(branch, x, dropout_p=p)
        branch = self.attention(normed, tokens, angles)
        if self.cross is not None and self.norm_cross is not None and memory is not None:
            normed, x = self.norm_cross(branch, x, dropout_p=p)
            branch = self.cross(normed, memory)
        normed, x = self.norm2(branch, x, dropout_p=p)
        return self.feed_forward(normed), x


def last_norm(norm: LayerNorm | RMSNorm, branch: Tensor | None, x: Tensor, dropout_p: float) -> Tensor:
    """The norm at the end of pre-norm layers, of what the last of them gave."""
    return norm(x, dropout_p=0.0) if branch is None else norm(branch, x, dropout_p=dropout_p)[0]


class PostNormLayer(nn.Module):
    """x = norm1(x + attention(x)); x = norm2(x + feed_forward(x)), each branch dropped out before it is added.

    Source: Vaswani et al., 2017.
    """

    def __init__(
        self, attention: SelfAttention, feed_forward: FeedForward, norms: list[LayerNorm | RMSNorm], dropout: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attention, self.feed_forward, self.dropout = attention, feed_forward, dropout

    def forward(self, x: Tensor, tokens: Tokens, angles: Angles = None) -> Tensor:
        """x (batch, seq, d_model) to the same."""
        p = self.dropout if self.training else 0.0
        x = self.norm1(self.attention(x, tokens, angles), x, dropout_p=p)[0]
        return self.norm2(self.feed_forward(x), x, dropout_p=p)[0]


def initialise(model: nn.Module, std: float, branches: int = 1) -> None:
    """Weights normal with deviation std, those that end one of the `branches` that a norm sums std / sqrt(branches);
    biases 0, norms 1.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            nn.init.normal_(module.out.weight, std=std / math.sqrt(branches))
        if isinstance(module, FeedForward):
            nn.init.normal_(module.linear2.weight, std=std / math.sqrt(branches))
