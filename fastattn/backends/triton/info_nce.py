"""The contrastive loss InfoNCE and its gradients; of the (queries, candidates) scores some queries' exist at a time.

    s     = query . [positive; negatives]^T / temperature        i: a query, c: a candidate, c = i its positive
    loss  = mean over i of lse_i - s_ii                          lse_i = log of the sum over c of exp(s_ic)
            symmetric: half of that, and half of the mean over positives c of lse'_c - s_cc, lse' the sum over i
    u_ic  = (exp(s_ic - lse_i) + exp(s_ic - lse'_c) - 2 [c = i]) received / (2 n temperature)      one-sided: its first half
    grad_query = u . [positive; negatives],   grad_candidates = u^T . query,   grad_temperature = -sum of u s

                          candidates
                   +-----------+---------+      Stretches of queries (stretches.py): the vendor's library makes their scores
                   | positives | negat.  |      with all candidates (products.py), `query_terms` finds each query's greatest
          queries  |    s      |   s     |      score and sum of exponentials, `positive_terms` those of each positive, carried
                   |    ↓      |   ↓     |      on from one stretch to the next, `score_gradients` puts u in s's place, and
                   |    u      |   u     |      further products take it from there.
                   +-----------+---------+

One-sided, a stretch is finished at once: 6 dim flops a score. Symmetric, the gradients wait for the last stretch, and the
scores of all others are made again: 8 dim flops, less 2 dim for the last stretch, which is taken first. Beside the products, 3
passes of 2 bytes a score (16-bit; symmetric: 4, and one to write them twice), where eager takes more than 40. Memory: a
stretch, and float32 sums of the candidates' gradients; eager has three float32 matrices of all scores at least.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..found_gradients import found_with_the_loss
from ..tensors import contiguous, given, gradient, rows
from . import _launch, logsumexp, stretches
from ._launch import launch
from .chips import chip_of
from .configs import choose
from .products import Sum, multiply


@triton.jit
def query_terms(
    products,  # (queries, width): of positives from column 0 on, of negatives from column `first_negative` on
    temperature,  # (1,) float32
    top,  # (queries,) float32: the greatest score,
    total,  # (queries,) float32: the sum of exp(s - top),
    own,  # (queries,) float32: the score of the query's positive
    stride_query,
    queries,
    first_query,
    positives,
    first_negative,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < queries
    divisor = tl.load(temperature)
    start = products + row * stride_query
    tops = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    totals = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(0, width, BLOCK):
        column = block + tl.arange(0, BLOCK)
        candidate = (column < positives) | ((column >= first_negative) & (column < width))
        inside = here[:, None] & candidate[None, :]
        score = tl.load(start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        score = tl.where(inside, tl.div_rn(score, divisor), float("-inf"))
        tops, totals = logsumexp.add(tops, totals, score)
    greatest, exponentials = logsumexp.merge(tops, totals, 1)
    mine = tl.load(start + first_query + row, mask=here, other=0.0).to(tl.float32)
    tl.store(top + row, greatest, mask=here)
    tl.store(total + row, logsumexp.finish(greatest, exponentials), mask=here)
    tl.store(own + row, tl.div_rn(mine, divisor), mask=here)


@triton.jit
def positive_terms(
    products,  # (queries, width): of positives from column 0 on
    temperature,  # (1,) float32
    top,  # (positives,) float32: the greatest score,
    total,  # (positives,) float32: and the sum of exp(s - top), of the queries so far
    stride_query,
    queries,
    positives,
    BEGINS: tl.constexpr,  # whether these are the first queries, and the last
    ENDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = column < positives
    lane = tl.arange(0, ROWS)
    divisor = tl.load(temperature)
    # What earlier queries gave goes into one lane.
    tops = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    totals = tl.zeros((ROWS, BLOCK), tl.float32)
    if not BEGINS:
        carrier = (lane[:, None] == 0) & valid[None, :]
        tops = tl.load(top + lane[:, None] + column[None, :], mask=carrier, other=float("-inf"))
        totals = tl.load(total + lane[:, None] + column[None, :], mask=carrier, other=0.0)
    for block in range(0, queries, ROWS):
        row = block + lane
        inside = (row < queries)[:, None] & valid[None, :]
        at = products + row[:, None].to(tl.int64) * stride_query + column[None, :]
        score = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(inside, tl.div_rn(score, divisor), float("-inf"))
        tops, totals = logsumexp.add(tops, totals, score)
    greatest, exponentials = logsumexp.merge(tops, totals, 0)
    if ENDS:
        exponentials = logsumexp.finish(greatest, exponentials)
    tl.store(top + column, greatest, mask=valid)
    tl.store(total + column, exponentials, mask=valid)


@triton.jit
def score_gradients(
    products,  # (queries, width), as in query_terms; u takes their place
    temperature,  # (1,) float32
    received,  # (1,) float32, or None: 1
    top,  # (queries,) float32
    total,  # (queries,) float32
    positive_top,  # (positives,) float32, or None: one-sided
    positive_total,  # (positives,) float32, or None
    partial_slope,  # (programs along queries, programs along candidates) float32: sums of u s; or None
    stride_query,
    queries,
    first_query,
    positives,
    first_negative,
    width,
    share,
    TILES: tl.constexpr,  # one below the other, of a program
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    candidate = (column < positives) | ((column >= first_negative) & (column < width))
    divisor = tl.load(temperature)
    factor = share / divisor
    if received is not None:
        factor *= tl.load(received)
    ones = 1.0
    if positive_top is not None:
        ones = 2.0
        # For a negative nothing: exp(s - inf).
        column_top = tl.load(positive_top + column, mask=column < positives, other=float("inf"))
        column_total = tl.load(positive_total + column, mask=column < positives, other=1.0)
    slopes = tl.zeros((BLOCK,), tl.float32)

    begin = tl.program_id(0) * TILES
    for tile in range(begin, tl.minimum(begin + TILES, tl.cdiv(queries, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        here = row < queries
        inside = here[:, None] & candidate[None, :]
        at = products + row[:, None] * stride_query + column[None, :]
        score = tl.div_rn(tl.load(at, mask=inside, other=0.0).to(tl.float32), divisor)
        row_top = tl.load(top + row, mask=here, other=0.0)
        row_total = tl.load(total + row, mask=here, other=1.0)
        u = tl.exp(score - row_top[:, None]) / row_total[:, None]
        if positive_top is not None:
            of_column = tl.exp(score - column_top[None, :]) / column_total[None, :]
            u += tl.where((column < positives)[None, :], of_column, 0.0)
        u -= tl.where((first_query + row)[:, None] == column[None, :], ones, 0.0)
        u = tl.where(inside, u * factor, 0.0)
        slopes += tl.sum(tl.where(inside, u * score, 0.0), axis=0)
        tl.store(at, u.to(products.dtype.element_ty), mask=inside)

    if partial_slope is not None:
        at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_slope + at, tl.sum(slopes, axis=0))


def unsupported(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    symmetric: bool,
    needs: list[bool],
) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    if query.numel() == 0:
        return "it takes no empty query"
    return _launch.unsupported(query, positive, negatives)


def forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    symmetric: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    found = found_with_the_loss(query, needs)
    loss, of_query, of_positive, of_negatives, of_temperature = _run(
        query, positive, negatives, temperature, None, symmetric, found
    )
    return loss, of_query, of_positive, of_negatives, of_temperature


def backward(
    grad_loss: Tensor,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    found_query: Tensor,
    found_positive: Tensor,
    found_negatives: Tensor,
    found_temperature: Tensor,
    symmetric: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    found = found_query, found_positive, found_negatives, found_temperature
    if any(grad.numel() for grad in found):
        grads = [grad * grad_loss if need else query.new_empty(0) for grad, need in zip(found, needs, strict=True)]
    else:
        _, *grads = _run(query, positive, negatives, temperature, grad_loss, symmetric, needs)
    of_query, of_positive, of_negatives, of_temperature = grads
    return of_query, of_positive, of_negatives, of_temperature.to(temperature.dtype if needs[3] else query.dtype)


def _run(query, positive, negatives, temperature, received, symmetric, needs) -> list[Tensor]:
    """The loss, and the gradients that are needed, that of the temperature in float32."""
    grads = [gradient(tensor, need) for tensor, need in zip((query, positive, negatives), needs[:3], strict=True)]
    # The gradients themselves, or other tensors where these have their features apart.
    written = [contiguous(grad) for grad in grads]
    divisor = temperature.reshape(1).float()
    slopes: list[Tensor] | None = [] if needs[3] else None
    candidates = rows(positive), None if negatives is None or negatives.shape[0] == 0 else rows(negatives)
    loss = _sweep(rows(query), *candidates, divisor, received, symmetric, written, slopes)
    if negatives is not None and candidates[1] is None and written[2] is not None:
        written[2].zero_()
    for grad, rows_of_grad in zip(grads, written, strict=True):
        if grad is not None and rows_of_grad is not None and rows_of_grad is not grad:
            grad.copy_(rows_of_grad)
    of_temperature = None
    if slopes is not None:
        of_temperature = -torch.stack(slopes).sum().float().reshape(temperature.shape)
    return [loss, *(given(grad, query) for grad in (*grads, of_temperature))]


def _sweep(query, positive, negatives, temperature, received, symmetric, grads, slopes) -> Tensor:
    """Goes through the queries, stretch by stretch; fills the gradients that are not None; returns the loss."""
    pairs = query.shape[0]
    # Both kinds of candidates begin at multiples of 128 bytes, whatever their number: products of odd strides are slow.
    first_negative = -(-pairs // 64) * 64
    width = pairs if negatives is None else first_negative + negatives.shape[0]
    parts = stretches.cut(pairs, stretches.elements(pairs, width) // width)
    space = query.new_empty((parts[0].stop, -(-width // 64) * 64))
    top, total, own = query.new_empty((3, pairs), dtype=torch.float32)
    of_positives = tuple(query.new_empty((2, pairs), dtype=torch.float32)) if symmetric else (None, None)
    place = pairs, first_negative, width

    def scores_of(r: slice) -> Tensor:
        scores = space[: r.stop - r.start, :width]
        multiply(query[r], positive.t(), scores[:, :pairs])
        if negatives is not None:
            multiply(query[r], negatives.t(), scores[:, first_negative:])
        return scores

    def find_terms(scores: Tensor, r: slice) -> None:
        count = r.stop - r.start
        config = choose("query_terms", chip_of(query.device), query.dtype, width)
        grid = (triton.cdiv(count, config.tiles["ROWS"]),)
        terms = top[r], total[r], own[r]
        launch(query_terms, grid, scores, temperature, *terms, scores.stride(0), count, r.start, *place, config=config)
        if symmetric:
            config = choose("positive_terms", chip_of(query.device), query.dtype, pairs)
            grid = (triton.cdiv(pairs, config.tiles["BLOCK"]),)
            launch(
                positive_terms,
                grid,
                scores,
                temperature,
                *of_positives,
                scores.stride(0),
                count,
                pairs,
                config=config,
                BEGINS=r is parts[0],
                ENDS=r is parts[-1],
            )

    def find_gradients(scores: Tensor, r: slice) -> None:
        count = r.stop - r.start
        config = choose("score_gradients", chip_of(query.device), query.dtype, width)
        grid = (
            triton.cdiv(count, config.tiles["ROWS"] * config.tiles["TILES"]),
            triton.cdiv(width, config.tiles["BLOCK"]),
        )
        partial = None if slopes is None else query.new_empty(grid, dtype=torch.float32)
        launch(
            score_gradients,
            grid,
            scores,
            temperature,
            received,
            top[r],
            total[r],
            *of_positives,
            partial,
            scores.stride(0),
            count,
            r.start,
            *place,
            1.0 / (pairs * (2 if symmetric else 1)),
            config=config,
        )
        if slopes is not None and partial is not None:
            slopes.append(partial.sum(dtype=torch.float64))

    grad_query, grad_positive, grad_negatives = grads
    positive_sum = None if grad_positive is None else Sum(grad_positive, len(parts))
    negative_sum = None if grad_negatives is None or negatives is None else Sum(grad_negatives, len(parts))

    def add_products(u: Tensor, r: slice) -> None:
        if grad_query is not None:
            of_query = Sum(grad_query[r], 1 if negatives is None else 2)
            of_query.add(u[:, :pairs], positive)
            if negatives is not None:
                of_query.add(u[:, first_negative:], negatives)
        if positive_sum is not None:
            positive_sum.add(u[:, :pairs].t(), query[r])
        if negative_sum is not None:
            negative_sum.add(u[:, first_negative:].t(), query[r])

    wanted = slopes is not None or any(grad is not None for grad in grads)
    for r in parts:
        scores = scores_of(r)
        find_terms(scores, r)
        if wanted and not symmetric:
            find_gradients(scores, r)
            add_products(scores, r)
    if wanted and symmetric:
        for r in reversed(parts):
            if r is not parts[-1]:
                scores = scores_of(r)
            find_gradients(scores, r)
            add_products(scores, r)

    def sum_of_losses(top: Tensor, total: Tensor) -> Tensor:
        return (total.log() + (top - own)).sum(dtype=torch.float64)

    loss = sum_of_losses(top, total)
    if symmetric:
        loss = (loss + sum_of_losses(*of_positives)) / 2
    return (loss / pairs).float()
