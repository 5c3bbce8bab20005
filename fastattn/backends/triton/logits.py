"""From logits to a cross entropy and its gradient: the kernels of linear_cross_entropy.py.

    l     = softcap(logit),   lse = logsumexp of a row of l,   y = target,   e: label smoothing
    loss  = share ((1 - e) w_y (lse - l_y) + e / classes * sum of w_c (lse - l_c)) + z_share z_loss lse^2
    u_c   = (rise exp(l_c - lse) - share (e / classes * w_c + [c = y] (1 - e) w_y)) received (1 - (l_c / softcap)^2)
    rise  = share ((1 - e) w_y + e / classes * sum of w) + 2 z_share z_loss lse

share and z_share are what a row's loss counts for: 1, or in a mean 1 / sum of the targets' weights, 1 / rows. Logits come as
matrices of some rows and some classes, with the products in between (see linear_cross_entropy.py).

                        classes
                 +--------------------+       row_statistics    ROWS rows a program, BLOCK classes at a time: the greatest
           rows  |  logits ──► u      |                         logit and the sum of exponentials, one pair a lane
                 +--------------------+       logit_gradients   tiles of ROWS x BLOCK, u in the logits' place

The first reads b bytes a logit and the second reads and writes b: three passes over memory, and one or two exponentials each.
The products on either side take 6 dim flops a logit, which at dim 4096 is ten times as long.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import logsumexp
from ._launch import launch
from .chips import chip_of
from .configs import choose
from .tanh import tanh


@triton.jit
def _shares(totals, rows_share, all_classes, MEAN: tl.constexpr):
    """share, z_share, sum of w."""
    share = rows_share
    z_share = rows_share
    weights = all_classes
    if totals is not None:
        weights = tl.load(totals + 1)
        if MEAN:
            share = 1.0 / tl.load(totals)
            z_share = 1.0 / tl.load(totals + 2)
    return share, z_share, weights


@triton.jit
def row_statistics(
    logits,  # (rows, classes): those from class `first` on
    target,  # (rows,) int64
    class_weight,  # (all_classes,) float32, or None: all 1
    totals,  # (3,) float32: sums of the targets' weights, of all weights, and of the rows that count; or None
    top,  # (rows,) float32: the greatest logit,
    total,  # (rows,) float32: the sum of exp(l - top),
    weighted,  # (rows,) float32: the sum of w_c l_c (None without smoothing),
    own,  # (rows,) float32: and the target's logit; of the classes so far
    loss,  # (rows,) float32, or None
    stride_row,
    rows,
    first,
    classes,
    all_classes,
    rows_share,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    CAPPED: tl.constexpr,
    MEAN: tl.constexpr,
    BEGINS: tl.constexpr,  # whether these are the first classes, and the last
    ENDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    lane = tl.arange(0, BLOCK)
    start = logits + row[:, None] * stride_row
    # What earlier classes gave goes into one lane.
    tops = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    totals_of_lanes = tl.zeros((ROWS, BLOCK), tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    if not BEGINS:
        carrier = (lane[None, :] == 0) & here[:, None]
        tops = tl.load(top + row[:, None] + lane[None, :], mask=carrier, other=float("-inf"))
        totals_of_lanes = tl.load(total + row[:, None] + lane[None, :], mask=carrier, other=0.0)
        if weighted is not None:
            sums = tl.load(weighted + row[:, None] + lane[None, :], mask=carrier, other=0.0)

    for block in range(0, classes, BLOCK):
        column = block + lane
        inside = here[:, None] & (column < classes)[None, :]
        value = tl.load(start + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            value = softcap * tanh(tl.div_rn(value, softcap))
        if weighted is not None:
            term = value
            if class_weight is not None:
                term *= tl.load(class_weight + first + column, mask=column < classes, other=0.0)[None, :]
            sums += tl.where(inside, term, 0.0)
        tops, totals_of_lanes = logsumexp.add(tops, totals_of_lanes, tl.where(inside, value, float("-inf")))
    greatest, exponentials = logsumexp.merge(tops, totals_of_lanes, 1)

    y = tl.load(target + row, mask=here, other=0)
    among = here & (y >= first) & (y < first + classes)
    mine = tl.load(logits + row * stride_row + (y - first), mask=among, other=0.0).to(tl.float32)
    if CAPPED:
        mine = softcap * tanh(tl.div_rn(mine, softcap))
    if not BEGINS:
        mine += tl.load(own + row, mask=here, other=0.0)
    if ENDS:
        exponentials = logsumexp.finish(greatest, exponentials)
    else:
        tl.store(own + row, mine, mask=here)
    tl.store(top + row, greatest, mask=here)
    tl.store(total + row, exponentials, mask=here)
    if weighted is not None:
        smooth = tl.sum(sums, axis=1)
        if not ENDS:
            tl.store(weighted + row, smooth, mask=here)

    if ENDS and loss is not None:
        share, z_share, weights = _shares(totals, rows_share, all_classes, MEAN)
        counted = here & (y != ignore_index)
        log = tl.log(exponentials)
        value = (1.0 - smoothing) * (log + (greatest - mine))
        if class_weight is not None:
            value *= tl.load(class_weight + y, mask=counted, other=0.0)
        lse = greatest + log
        if weighted is not None:
            value += smoothing / all_classes * (weights * lse - smooth)
        value = share * value + z_share * z_loss * lse * lse
        nothing = 0.0 * share  # NaN in the mean over no row at all
        tl.store(loss + row, tl.where(counted, value, nothing), mask=here)


@triton.jit
def logit_gradients(
    logits,  # (rows, classes): those from class `first` on; u takes their place
    target,  # (rows,) int64
    class_weight,  # (all_classes,) float32, or None: all 1
    totals,  # (3,) float32: sums of the targets' weights, of all weights, and of the rows that count; or None
    received,  # (rows,) float32: the gradient of each row's loss (of one element where stride_received is 0); or None: 1
    top,  # (rows,) float32: the greatest logit,
    total,  # (rows,) float32: and the sum of exp(l - top)
    partial_bias,  # (programs along rows, classes) float32: sums of u; or None
    stride_row,
    stride_received,
    rows,
    first,
    classes,
    all_classes,
    rows_share,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    CAPPED: tl.constexpr,
    MEAN: tl.constexpr,
    TILES: tl.constexpr,  # one below the other, of a program
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < classes
    share, z_share, weights = _shares(totals, rows_share, all_classes, MEAN)
    each = smoothing / all_classes
    smooth = tl.where(valid, each, 0.0)
    if class_weight is not None:
        smooth *= tl.load(class_weight + first + column, mask=valid, other=0.0)
    sums = tl.zeros((BLOCK,), tl.float32)

    begin = tl.program_id(0) * TILES
    for tile in range(begin, tl.minimum(begin + TILES, tl.cdiv(rows, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        y = tl.load(target + row, mask=row < rows, other=ignore_index)
        counted = (row < rows) & (y != ignore_index)
        highest = tl.load(top + row, mask=counted, other=0.0)
        exponentials = tl.load(total + row, mask=counted, other=1.0)
        mine = tl.full((ROWS,), 1.0, tl.float32) - smoothing
        if class_weight is not None:
            mine *= tl.load(class_weight + y, mask=counted, other=0.0)
        rise = share * (mine + each * weights) + 2.0 * z_share * z_loss * (highest + tl.log(exponentials))
        factor = rise / exponentials
        grad_loss = tl.full((ROWS,), 1.0, tl.float32)
        if received is not None:
            grad_loss = tl.load(received + row * stride_received, mask=counted, other=0.0)

        inside = (row < rows)[:, None] & valid[None, :]
        at = logits + row[:, None] * stride_row + column[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            capped = tanh(tl.div_rn(value, softcap))
            value = softcap * capped
        down = smooth[None, :] + tl.where((first + column)[None, :] == y[:, None], mine[:, None], 0.0)
        u = factor[:, None] * tl.exp(value - highest[:, None]) - share * down
        u *= grad_loss[:, None]
        if CAPPED:
            u *= 1.0 - capped * capped
        u = tl.where(counted[:, None] & valid[None, :], u, 0.0)
        sums += tl.sum(u, axis=0)
        tl.store(at, u.to(logits.dtype.element_ty), mask=inside)

    if partial_bias is not None:
        tl.store(partial_bias + tl.program_id(0).to(tl.int64) * classes + column, sums, mask=valid)


@dataclass(frozen=True)
class CrossEntropy:
    """The terms of a call's rows, and what becomes of a matrix of their logits.

    Attributes:
        target: (rows,) int64, contiguous, as are all of these.
        class_weight: (classes,) float32, or None.
        totals: (3,) float32, as the kernels take it; None where rows_share says it all.
        received: (rows,) float32, or one element for all rows; None: 1.
        loss: (rows,) float32, to be filled; or None.
        classes: of all logits of a row.
        rows_share: what a row counts for where there are no totals.
        mean: whether the shares are those of a mean, where there are totals.
    """

    target: Tensor
    class_weight: Tensor | None
    totals: Tensor | None
    received: Tensor | None
    loss: Tensor | None
    classes: int
    rows_share: float
    ignore_index: int
    smoothing: float
    z_loss: float
    softcap: float
    mean: bool

    def terms(self, rows: int) -> list[Tensor | None]:
        """Space for top, total, weighted and own of so many rows."""
        space = self.target.new_empty((4, rows), dtype=torch.float32)
        return [space[0], space[1], space[2] if self.smoothing > 0.0 else None, space[3]]

    def find_terms(
        self, logits: Tensor, terms: list[Tensor | None], row: int, first: int, begins: bool, ends: bool
    ) -> None:
        """Goes through the logits of rows `row` on and of classes `first` on; with a row's last ones, fills in its loss."""
        rows, classes = logits.shape
        config = choose("row_statistics", chip_of(logits.device), logits.dtype, classes)
        launch(
            row_statistics,
            (triton.cdiv(rows, config.tiles["ROWS"]),),
            logits,
            self.target[row : row + rows],
            self.class_weight,
            self.totals,
            *terms,
            None if self.loss is None else self.loss[row : row + rows],
            logits.stride(0),
            rows,
            first,
            classes,
            float(self.classes),
            self.rows_share,
            self.ignore_index,
            self.smoothing,
            self.z_loss,
            self.softcap,
            config=config,
            CAPPED=self.softcap > 0.0,
            MEAN=self.mean,
            BEGINS=begins,
            ENDS=ends,
        )

    def find_gradients(
        self, logits: Tensor, terms: list[Tensor | None], row: int, first: int, sums: Tensor | None
    ) -> None:
        """Puts u in the logits' place; adds its sums over the rows to `sums` (all classes, float64) if asked."""
        rows, classes = logits.shape
        config = choose("logit_gradients", chip_of(logits.device), logits.dtype, classes)
        programs = triton.cdiv(rows, config.tiles["ROWS"] * config.tiles["TILES"])
        partial = None if sums is None else logits.new_empty((programs, classes), dtype=torch.float32)
        received = self.received
        if received is not None and received.numel() > 1:
            received = received[row : row + rows]
        launch(
            logit_gradients,
            (programs, triton.cdiv(classes, config.tiles["BLOCK"])),
            logits,
            self.target[row : row + rows],
            self.class_weight,
            self.totals,
            received,
            *terms[:2],
            partial,
            logits.stride(0),
            0 if received is None or received.numel() == 1 else 1,
            rows,
            first,
            classes,
            float(self.classes),
            self.rows_share,
            self.ignore_index,
            self.smoothing,
            self.z_loss,
            self.softcap,
            config=config,
            CAPPED=self.softcap > 0.0,
            MEAN=self.mean,
        )
        if sums is not None and partial is not None:
            # What a bias receives nearly cancels.
            sums[first : first + classes] += partial.sum(0, dtype=torch.float64)
