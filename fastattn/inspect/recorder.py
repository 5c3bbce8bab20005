"""Records what the attention of a model's layers attends to, while the model runs."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _watch, ops
from ..accelerate import transformers_among
from ..models.self_attention import CrossAttention, SelfAttention
from ..nn import MultiheadAttention
from ..ops.attention_summary import AttentionSummary, score_arguments, summarise
from .heads import HeadSummary, head_summaries
from .weights import Sides, chosen, select_heads, weights_of


@dataclass(frozen=True)
class Seen:
    """What one sequence's attention looked like, in one call of a layer.

    Attributes:
        weights: (heads, rows, k), float32 (float64 for float64), before dropout; None if not asked for.
        summary: entropy, max_weight, argmax and distance, each (heads, q); None if not asked for.
        heads: the numbers of the heads, in order.
        rows: the queries that `weights` has, in order.
    """

    weights: Tensor | None
    summary: AttentionSummary | None
    heads: tuple[int, ...]
    rows: tuple[int, ...]


class Recording(Mapping[str, list[Seen]]):
    """What `record` has seen: for each chosen layer a list with an entry for each sequence, call after call.

    `recording[layer]` takes a layer's name or its number, as `record` does; it raises a KeyError that says why where there is
    nothing.
    """

    def __init__(self, layers: list[str], recorded: list[str]) -> None:
        self._layers = layers
        self._seen: dict[str, list[Seen]] = {name: [] for name in recorded}

    def __getitem__(self, layer: str | int) -> list[Seen]:
        name = _name(layer, self._layers) if isinstance(layer, int) else layer
        if name not in self._seen:
            raise KeyError(f"{name!r} is not recorded; recorded are {', '.join(self._seen)}")
        if not self._seen[name]:
            raise KeyError(
                f"{name!r} has not attended to anything: run the model inside `with fastattn.inspect.record(…)`"
            )
        return self._seen[name]

    def head_summaries(self) -> list[HeadSummary]:
        """Every recorded head, layer after layer: means over the queries of all sequences.

        Raises:
            ValueError: no summaries were recorded.
            KeyError: a layer has not attended to anything.
        """
        found: list[HeadSummary] = []
        for name in self:
            summaries = [one.summary for one in self[name] if one.summary is not None]
            if not summaries:
                raise ValueError("no summaries were recorded; pass summaries=True to fastattn.inspect.record")
            found += head_summaries(name, self[name][0].heads, summaries)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)


@contextlib.contextmanager
def record(
    model: nn.Module,
    layers: Iterable[int | str] | None = None,
    *,
    rows: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    weights: bool = True,
    summaries: bool = True,
) -> Iterator[Recording]:
    """Inside the `with` block, looks at what chosen layers of a model attend to, whenever the model runs.

        >>> with fastattn.inspect.record(model, layers=[0, 5], rows=[0], summaries=True) as seen, torch.no_grad():
        ...     model(input_ids, attention_mask)
        >>> seen[5][0].weights  # of the first sequence: (heads, 1, k)

    The model computes what it computes without, from the same kernels; weights and summaries are computed beside that, in the
    chosen layers alone. (An encoder layer that would run as one op runs its parts.) Padding that a model leaves out is not
    seen either: a sequence's entry then has its tokens alone. Dropout is left out. A forward that is run again by activation
    checkpointing is not seen again. Under torch.compile a recorded layer breaks the graph.

    Args:
        model: a module of fastattn.nn or fastattn.models, a model that `fastattn.accelerate` has been given, or one that has
            such inside.
        layers: which of the model's attention modules, by number in the order of `named_modules()` (negative ones count
            from the end), or by name. None for all.
        rows: which queries' weights are kept; negative ones count from the end of each sequence, and None is all of them, the
            whole (seq, seq) matrix.
        heads: which heads are looked at, by weights and summaries. None for all.
        weights: whether weights are kept.
        summaries: whether summaries are (of all queries; memory is linear in the sequence).

    Yields:
        A `Recording`: for each layer a list of `Seen`, one a sequence.

    Raises:
        TypeError: model is not an nn.Module, or rows or heads are not ints.
        ValueError: the model has no attention that can be looked at, or none of this name or number; while it runs, rows or
            heads that are not there.
        RuntimeError: a layer is being recorded already; while it runs, the call asks for output_attentions as well, or its
            softmax has an attention sink.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    modules = _attention_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no attention of fastattn's to look at: give it to fastattn.accelerate first, or "
            f"build it of fastattn.nn or fastattn.models"
        )
    names = list(modules)
    asked = names if layers is None else list(dict.fromkeys(_name(layer, names) for layer in layers))
    recording = Recording(names, asked)
    rows, heads = (None if picks is None else list(picks) for picks in (rows, heads))
    for name in asked:
        if _watch.watched(modules[name]):
            raise RuntimeError(f"{name} is being recorded already; leave that `with` block first")
    for name in asked:
        _watch.watch(modules[name], _Watch(recording._seen[name], rows, heads, weights, summaries))
    try:
        yield recording
    finally:
        for name in asked:
            _watch.unwatch(modules[name])


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    transformers = transformers_among(model.modules())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (MultiheadAttention, SelfAttention, CrossAttention))
        or (transformers is not None and transformers.dispatches(module))
    }


def _name(layer: int | str, names: list[str]) -> str:
    if isinstance(layer, str):
        if layer not in names:
            raise ValueError(f"there is no attention module {layer!r}; the model has {', '.join(map(repr, names))}")
        return layer
    return names[chosen("layers", [layer], len(names))[0]]


class _Watch:
    """Stands in for `ops` in one module: the same functions, which look at their arguments first."""

    def __init__(
        self, seen: list[Seen], rows: list[int] | None, heads: list[int] | None, weights: bool, summaries: bool
    ) -> None:
        self.seen, self.rows, self.heads, self.weights, self.summaries = seen, rows, heads, weights, summaries

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        out = ops.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse=return_lse, **options
        )
        self.look(query, key, attn_mask, is_causal, scale, **options)
        return out

    def attention_varlen(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        *,
        attn_mask: Tensor | None = None,
        window: Sides | None = None,
        alibi_slopes: Tensor | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        out = ops.attention_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            is_causal,
            scale,
            attn_mask=attn_mask,
            window=window,
            alibi_slopes=alibi_slopes,
            return_lse=return_lse,
            **options,
        )
        biases: dict[str, Any] = {"attn_mask": attn_mask, "window": window, "alibi_slopes": alibi_slopes}
        self.look_at_packed(query, key, cu_seqlens_q, cu_seqlens_k, is_causal, scale, **biases, **options)
        return out

    def attention_with_kvcache(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        cache_seqlens: Tensor,
        is_causal: bool = True,
        scale: float | None = None,
        window: Sides | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        interleaved: bool = False,
    ) -> Any:
        if k is not None and cos is not None and sin is not None:
            query, k = ops.rotary_embedding(query, k, cos, sin, interleaved)  # what is looked at is turned, too
        out = ops.attention_with_kvcache(
            query,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=cache_seqlens,
            is_causal=is_causal,
            scale=scale,
            window=window,
        )
        self.look_at_cache(query, k_cache, cache_seqlens + (0 if k is None else k.shape[2]), is_causal, scale, window)
        return out

    @torch.compiler.disable
    @torch.no_grad()
    def look(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        *,
        window: Sides | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> None:
        """At sequences of one length."""
        if torch._C._current_graph_task_id() != -1:
            return  # a backward is running: activation checkpointing computes again what has been seen
        args = score_arguments(query, key, attn_mask, is_causal, scale, True, window, softcap, alibi_slopes)
        args = select_heads(args, self.heads)
        heads = tuple(chosen("heads", self.heads, query.shape[1]))
        rows = chosen("rows", self.rows if query.shape[2] else None, query.shape[2]) if self.weights else []
        weights = weights_of(args, rows) if self.weights else None
        summary = summarise(args) if self.summaries else None
        for b in range(query.shape[0]):
            self.seen.append(
                Seen(
                    None if weights is None else weights[b],
                    None if summary is None else AttentionSummary(*(x[b] for x in summary)),
                    heads,
                    tuple(rows),
                )
            )

    @torch.compiler.disable
    def look_at_packed(
        self,
        query: Tensor,
        key: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        is_causal: bool,
        scale: float | None,
        *,
        attn_mask: Tensor | None,
        window: Sides | None,
        alibi_slopes: Tensor | None,
        **options: Any,
    ) -> None:
        """At sequences laid end to end, one by one."""
        lengths = [ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k)]
        split = [x.transpose(0, 1).unsqueeze(0).split(own, dim=2) for x, own in zip((query, key), lengths, strict=True)]
        for b, (q, k) in enumerate(zip(*split, strict=True)):
            mask = attn_mask
            if mask is not None:
                mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
                mask = mask[b : b + 1] if mask.shape[0] != 1 else mask
                mask = mask[:, :, : q.shape[2], : k.shape[2]]
            slopes = alibi_slopes
            if slopes is not None and slopes.ndim == 2:
                slopes = slopes[b]
            sides = _causal(window) if is_causal else window
            self.look(q, k, mask, False, scale, window=sides, alibi_slopes=slopes, **options)

    @torch.compiler.disable
    def look_at_cache(
        self,
        query: Tensor,
        k_cache: Tensor,
        lengths: Tensor,
        is_causal: bool,
        scale: float | None,
        window: Sides | None,
    ) -> None:
        """At new tokens of sequences whose keys are in a cache."""
        for b, length in enumerate(lengths.tolist()):
            sides = _causal(window) if is_causal else window
            one = query[b : b + 1].to(k_cache.dtype)
            self.look(one, k_cache[b : b + 1, :, :length], None, False, scale, window=sides)


def _causal(window: Sides | None) -> Sides:
    """A causal mask as a window, which is aligned to the bottom right."""
    return (None if window is None else window[0], 0)
