"""Pictures of what `fastattn.inspect` sees: attention maps, and what each head does. Drawn by matplotlib, saved as PNG.

    >>> with fastattn.inspect.record(model) as seen, torch.no_grad():
    ...     model(input_ids)
    >>> fastattn.plot.attention_map(seen[3][0], tokens, path="layer3.png")
    >>> fastattn.plot.head_summary(seen.head_summaries(), path="heads.png")

Each function returns matplotlib's Figure, and touches none of matplotlib's global state. The colours run from white to dark
blue, which eyes that see few colours tell apart as well.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .inspect import HeadSummary, Seen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = "Blues"
_DPI = 150
_MOST_NAMES = 64  # tokens that are named along an axis; of more, positions are
_CELL = 0.2  # inches that a named token takes
_WIDEST = 20.0  # inches of a figure


def attention_map(
    attention: Seen | Tensor,
    tokens: Sequence[str] | None = None,
    *,
    query_tokens: Sequence[str] | None = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> "Figure":
    """The weights of one sequence: a panel a head, a row a query, a column a key, all on one scale.

    Args:
        attention: an entry of a recording, or weights (heads, rows, k) or (rows, k).
        tokens: (k,), the keys' names along the axes; of self-attention, also the queries'. None for positions. More than 64
            are not written out.
        query_tokens: all queries' names, where they are not the keys' (cross-attention).
        title: above the panels.
        path: where to save it as PNG; folders are made.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: attention is no such thing.
        ValueError: its shape, or the number of tokens, does not fit; a recording without weights.
    """
    weights, heads, rows = _weights_of(attention)
    count, _, k_len = weights.shape
    if tokens is not None and len(tokens) != k_len:
        raise ValueError(f"tokens has {len(tokens)} names, but there are {k_len} keys")
    names = tokens if query_tokens is None else query_tokens
    if names is not None and max(rows, default=-1) >= len(names):
        raise ValueError(
            f"query {max(rows)} has no name among {len(names)}; pass query_tokens, a name for each query of the sequence"
        )
    columns = min(count, math.ceil(math.sqrt(count)) if count <= 4 else 4)
    lines = math.ceil(count / columns)
    named = tokens is not None and k_len <= _MOST_NAMES
    width, height = (_panel_inches(n, named) for n in (k_len, len(rows)))
    size = (columns * width + 1.6, lines * height + (1.6 if named else 1.2) + (0.4 if title else 0.0))
    figure = _figure(size)
    grid = figure.subplots(lines, columns, squeeze=False)
    top = float(weights.max()) if weights.numel() else 1.0
    for panel, weight, head in zip(grid.flat, weights, heads, strict=False):
        image = panel.imshow(
            weight.numpy(), cmap=_COLOURS, vmin=0.0, vmax=top or 1.0, aspect="auto", interpolation="nearest"
        )
        if count > 1 or isinstance(attention, Seen):
            panel.set_title(f"head {head}", fontsize=9)
    for panel in list(grid.flat)[count:]:
        panel.set_visible(False)
    for index, panel in enumerate(grid.flat[:count]):
        _name_axis(panel.xaxis, range(k_len), tokens, rotation=90)
        _name_axis(panel.yaxis, rows, names)
        lowest = index + columns >= count  # of its column
        panel.tick_params(labelbottom=lowest, labelleft=index % columns == 0)
        panel.set_xlabel("key" if lowest else "")
        panel.set_ylabel("query" if index % columns == 0 else "")
    if count:
        bar = figure.colorbar(image, ax=list(grid.flat), fraction=0.02, pad=0.01, aspect=30)
        bar.set_label("weight (those of a query sum to 1)")
    return _finish(figure, title, path)


def head_summary(heads: Sequence[HeadSummary], *, title: str | None = None, path: str | Path | None = None) -> "Figure":
    """What each head does on the mean: its entropy, its largest weight and how far it looks, layer by layer.

    Args:
        heads: of one or more layers, as `Recording.head_summaries()` gives them.
        title: above the panels.
        path: where to save it as PNG; folders are made.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: heads is no list of `HeadSummary`, or empty.
    """
    if not all(isinstance(head, HeadSummary) for head in heads):
        raise TypeError("heads holds something else than HeadSummary; pass recording.head_summaries()")
    if not heads:
        raise ValueError("heads is empty; pass recording.head_summaries()")
    layers = list(dict.fromkeys(head.layer for head in heads))
    numbers = sorted({head.head for head in heads})
    values = torch.full((3, len(layers), len(numbers)), math.nan)
    for head in heads:
        measures = torch.tensor([head.entropy, head.max_weight, head.distance])
        values[:, layers.index(head.layer), numbers.index(head.head)] = measures
    panel_width, panel_height = max(2.6, 0.42 * len(numbers) + 1.2), max(1.6, 0.36 * len(layers) + 0.9)
    longest = max(map(len, layers))
    figure = _figure((3 * panel_width + 0.075 * longest, panel_height + (0.4 if title else 0.0)))
    grid = figure.subplots(1, 3, sharey=True)
    said = (("entropy", "nats"), ("largest weight", "of 1"), ("distance", "tokens"))
    for panel, value, (measure, unit) in zip(grid, values, said, strict=True):
        image = panel.imshow(value.numpy(), cmap=_COLOURS, aspect="auto", interpolation="nearest")
        panel.set_title(f"{measure} ({unit})", fontsize=10)
        panel.set_xlabel("head")
        panel.set_xticks(range(len(numbers)), [str(number) for number in numbers], fontsize=8)
        _write_values(panel, value, "{:.2f}" if float(value.nan_to_num().max()) < 10.0 else "{:.0f}")
        figure.colorbar(image, ax=panel, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    grid[0].set_yticks(range(len(layers)), layers, fontsize=8)
    grid[0].set_ylabel("layer")
    return _finish(figure, title, path)


def _weights_of(attention: Seen | Tensor) -> tuple[Tensor, Sequence[int], Sequence[int]]:
    """Weights (heads, rows, k), and the numbers of heads and rows."""
    if isinstance(attention, Seen):
        if attention.weights is None:
            raise ValueError("this recording has no weights; pass weights=True to fastattn.inspect.record")
        return attention.weights.detach().float().cpu(), attention.heads, attention.rows
    if not isinstance(attention, Tensor):
        raise TypeError(
            f"attention is a {type(attention).__name__}; expected an entry of a recording, such as seen[0][0], or weights"
        )
    if attention.ndim not in (2, 3):
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}; expected (heads, rows, k) or (rows, k), of one sequence"
        )
    weights = attention.detach().float().cpu()
    weights = weights if weights.ndim == 3 else weights.unsqueeze(0)
    return weights, range(weights.shape[0]), range(weights.shape[1])


def _panel_inches(count: int, named: bool) -> float:
    """The side of a panel for so many tokens."""
    return min(max(1.2, count * (_CELL if named else 0.03)), 12.0 if named else 3.5)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "fastattn.plot draws with matplotlib, which is not installed: pip install 'fastattn[plot]'"
        ) from error
    shrink = min(1.0, _WIDEST / max(size))
    return Figure(figsize=(size[0] * shrink, size[1] * shrink), dpi=_DPI, layout="constrained")


def _name_axis(axis: Any, places: Sequence[int], names: Sequence[str] | None, **style: Any) -> None:
    """Names of tokens along an axis, or positions; tick i stands for token places[i]."""
    if names is not None and len(places) <= _MOST_NAMES:
        # As they are: a dollar sign is no formula.
        labels = [str(names[place]).replace("$", r"\$") for place in places]
        axis.set_ticks(range(len(places)), labels, fontsize=7, **style)
        return
    step = max(1, math.ceil(len(places) / 8))
    ticks = range(0, len(places), step)
    axis.set_ticks(ticks, [str(places[tick]) for tick in ticks], fontsize=7)


def _write_values(panel: Any, values: Tensor, form: str) -> None:
    """The numbers into the cells, where they can be read."""
    if values.shape[1] > 24 or values.shape[0] > 48:
        return
    known = values[values.isfinite()]
    middle = float((known.min() + known.max()) / 2) if known.numel() else 0.0
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            if math.isfinite(value):
                colour = "white" if value > middle else "black"
                panel.text(j, i, form.format(value), ha="center", va="center", fontsize=6, color=colour)


def _finish(figure: Any, title: str | None, path: str | Path | None) -> Any:
    if title is not None:
        figure.suptitle(title, fontsize=11)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return figure
