"""The forwards that are the same in many models, written once over the names that each model gives to its parts.

    RMSNorm             norm(x), also norm(residual + x)                    Llama's, T5's
    DenseAddNorm        norm(residual + dropout(dense(x)))                  BertSelfOutput
    FeedForward         w2(dropout(act(w1(x))))                             the MLP of GPT-2, T5, DistilBERT
      with a gate       w2(dropout(act(gate(x)) * w1(x)))                   the MLP of Llama, T5 v1.1
    FeedForwardAddNorm  norm(x + dropout(w2(act(w1(x)))))                   the second half of a BertLayer
    PreNormBlock        y = x + attention(norm1(x));  y + mlp(norm2(y))     GPT2Block, LlamaDecoderLayer
    PostNormBlock       y = norm1(x + attention(x));  norm2(y + mlp(y))     DistilBERT's TransformerBlock

A row of a table names the parts: `norm="LayerNorm"`; dots go down into children. A fused forward looks through a child
at its weights only while the child is nothing but its weights: one that carries a hook, or has become another class
since (an adapter, a quantised layer), is called as the module it is.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fastattn import ops
from fastattn.nn.feed_forward import activation_name, feed_forward, weights
from fastattn.nn.norm import add_norm

from .swap import Swapped


class Pattern(Swapped):
    """A fused forward over named parts.

    Attributes:
        roles: the names of the parts.
        paths: where each part is, as a row says; a part may be left out.
        getters: for each role what fetches the part, or None.
    """

    roles: ClassVar[tuple[str, ...]]
    paths: ClassVar[dict[str, str]] = {}
    getters: ClassVar[list[Callable[[Any], Any] | None]]

    @classmethod
    def prepare(cls, original: type[nn.Module]) -> dict[str, Any]:
        unknown = set(cls.paths) - set(cls.roles)
        if unknown:
            raise ValueError(f"{original.__name__}: {cls.__name__} has no parts {sorted(unknown)}, only {cls.roles}")
        return {"getters": [_getter(cls.paths[role]) if role in cls.paths else None for role in cls.roles]}

    @classmethod
    def get_parts(cls, module: Any) -> tuple:
        """The parts, in the order of `roles`; None for one that this class does not have."""
        return tuple([get and get(module) for get in cls.getters])

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        try:
            cls.get_parts(module)
        except AttributeError as error:
            return f"fastattn expects parts in this class that it does not have: {error}"
        return None

    @classmethod
    def parts(cls, module: nn.Module) -> list[nn.Module]:
        return [part for part in cls.get_parts(module) if isinstance(part, nn.Module)]


def _getter(path: str) -> Callable[[Any], Any]:
    """`operator.attrgetter(path)`, which torch.compile cannot trace. Children first: a module's getattr finds them last."""
    names = path.split(".")

    def get(module: Any) -> Any:
        for name in names:
            child = module._modules.get(name)
            module = getattr(module, name) if child is None else child
        return module

    return get


class RMSNorm(Pattern):
    """weight · x / sqrt(mean(x²) + eps), with an optional residual and dropout before it."""

    does = "RMS norm in one pass"
    roles = ("weight", "eps")
    adds_residual = True  # what fastattn.nn.norm.add_norm asks for

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0.0) -> Any:
        weight, eps = self.get_parts(self)
        # Where the dtypes differ, models differ in what comes out: theirs is kept.
        if residual is None:
            if hidden_states.dtype != weight.dtype:
                return super().forward(hidden_states)
            return ops.rms_norm(hidden_states, weight, eps)
        if hidden_states.dtype != weight.dtype or residual.dtype != weight.dtype:
            total = residual + nn.functional.dropout(hidden_states, dropout_p)
            return super().forward(total), total
        return ops.rms_norm(hidden_states, weight, eps, residual, dropout_p)


class DenseAddNorm(Pattern):
    """norm(residual + dropout(dense(x)))."""

    does = "dropout, add and layer norm in one pass"
    roles = ("dense", "dropout", "norm")

    @classmethod
    def parts(cls, module: nn.Module) -> list[nn.Module]:
        _, dropout, norm = cls.get_parts(module)
        return [dropout, norm]

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        dense, dropout, norm = self.get_parts(self)
        return add_norm(norm, dense(hidden_states), input_tensor, dropout)[0]


class FeedForward(Pattern):
    """w2(dropout(activation(w1(x)))), gated w2(dropout(activation(gate(x)) * w1(x))), then an output dropout if there
    is one."""

    does = "feed-forward network as one op"
    roles = ("w1", "activation", "dropout", "w2", "gate", "output_dropout")

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        return super().unsupported(module) or _why_not_fused(*cls.get_parts(module)[:5])

    def forward(self, hidden_states: Tensor) -> Tensor:
        w1, _, _, w2, _, _ = self.get_parts(self)
        first, last = weights(w1), weights(w2)
        if first and last and first[0].dtype != last[0].dtype:
            return super().forward(hidden_states)  # T5 keeps its last matrix in float32 and converts in between
        return self._fused(hidden_states)

    def _fused(self, x: Tensor) -> Tensor:
        w1, activation, dropout, w2, gate, output_dropout = self.get_parts(self)
        out = feed_forward(x, w1, activation, dropout, w2, gate)
        return out if output_dropout is None else output_dropout(out)


class ChunkedFeedForward(FeedForward):
    """`FeedForward` where the module's forward only cuts its input into chunks and `ff_chunk` computes them."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super(FeedForward, self).forward(*args, **kwargs)  # the original's

    def ff_chunk(self, x: Tensor) -> Tensor:
        return self._fused(x)


class FeedForwardAddNorm(Pattern):
    """norm(x + dropout(w2(activation(w1(x))))), in the method `feed_forward_chunk`."""

    does = "feed-forward network as one op, then dropout, add and layer norm in one pass"
    roles: ClassVar[tuple[str, ...]] = ("w1", "activation", "w2", "dropout", "norm")

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        missing = super().unsupported(module)
        if missing is not None:
            return missing
        w1, activation, w2 = cls.get_parts(module)[:3]
        return _why_not_fused(w1, activation, None, w2, None)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        w1, activation, w2, dropout, norm = self.get_parts(self)[:5]
        out = feed_forward(attention_output, w1, activation, None, w2)
        return add_norm(norm, out, attention_output, dropout)[0]


def _why_not_fused(
    w1: nn.Module, activation: Any, dropout: nn.Module | None, w2: nn.Module, gate: nn.Module | None
) -> str | None:
    if activation_name(activation) is None:
        name = getattr(activation, "__name__", type(activation).__name__)
        return f"its activation, {name}, is not one of relu, gelu, gelu_tanh and silu"
    for linear in (w1, w2, gate):
        if linear is not None and weights(linear) is None:
            return f"a {type(linear).__name__} stands where a plain linear layer is expected, or a hook watches it"
    if gate is not None and getattr(gate, "bias", None) is not None:
        return "its gate has a bias, which the op has no place for"
    if dropout is not None and type(dropout) is not nn.Dropout:
        return f"a {type(dropout).__name__} stands where nn.Dropout is expected"
    return None


class PreNormBlock(Pattern):
    """y = x + attention(norm1(x));  y + mlp(norm2(y)): the first add and the second norm are one pass.

    attention takes the block's other arguments by keyword and returns a tuple whose first element is its output.
    """

    does = "add and norm in one pass"
    roles = ("norm1", "attention", "norm2", "mlp")

    # The block's arguments after the first, with their defaults, for those that arrive by position.
    arguments: ClassVar[dict[str, Any]]

    @classmethod
    def prepare(cls, original: type[nn.Module]) -> dict[str, Any]:
        parameters = list(inspect.signature(inspect.unwrap(original.forward)).parameters.values())[2:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        arguments = {p.name: None if p.default is p.empty else p.default for p in named}
        return {**super().prepare(original), "arguments": arguments}

    @classmethod
    def parts(cls, module: nn.Module) -> list[nn.Module]:
        return []  # norms and mlp run as the modules they are

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = {**self.arguments, **dict(zip(self.arguments, args, strict=False)), **kwargs}
        if given.pop("encoder_hidden_states", None) is not None:
            return super().forward(hidden_states, *args, **kwargs)  # cross-attention is one sublayer more
        given.pop("encoder_attention_mask", None)
        norm1, attention, norm2, mlp = self.get_parts(self)
        attended = attention(norm1(hidden_states), **given)[0]
        normed, hidden_states = add_norm(norm2, attended, hidden_states)
        return hidden_states + mlp(normed)


class PostNormBlock(Pattern):
    """y = norm1(x + attention(x));  norm2(y + mlp(y)): each add and norm is one pass."""

    does = "add and layer norm in one pass, twice"
    roles = ("attention", "norm1", "mlp", "norm2")

    @classmethod
    def parts(cls, module: nn.Module) -> list[nn.Module]:
        return []

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        attention, norm1, mlp, norm2 = self.get_parts(self)
        attended = attention(hidden_states, attention_mask=attention_mask, **kwargs)[0]
        hidden_states = add_norm(norm1, attended, hidden_states)[0]
        return add_norm(norm2, mlp(hidden_states), hidden_states)[0]
