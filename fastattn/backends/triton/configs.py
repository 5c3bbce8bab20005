"""The table of configurations: which tiles, warps and stages a kernel takes, by chip, dtype and width.

Rows are read from the top and the first that fits is taken, so a kernel's special cases come before its general one. What
the compiler makes of each row is asserted for every chip (`budgets.py`, `python -m fastattn kernels`): matrix instructions,
shared memory, registers for the blocks a multiprocessor is to hold, spilled bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .chips import Chip


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        tiles: the kernel's `tl.constexpr` tile sizes by name.
        num_warps: warps a block.
        num_stages: how many tiles are on their way from memory in a pipelined loop.
        blocks: how many blocks a multiprocessor is to hold at once; the registers have to suffice for them.
        spills: the bytes a thread may spill to local memory.
        newest: whether products of 16-bit tensors must use the matrix instructions of the chip's own generation; without, those
            that sm_80 has will do (tiles of few rows: wgmma and tcgen05 take 64 and more).
    """

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    blocks: int = 1
    spills: int = 0
    newest: bool = True


@dataclass(frozen=True)
class Row:
    """One row: the calls it fits, and their config.

    Attributes:
        kernel: the kernel's name.
        config: what it takes.
        chips: names of chips, or () for all.
        bits: the elements' width, or 0 for all.
        width: the largest width (head_dim, features of a row) that the row fits.
    """

    kernel: str
    config: Config
    chips: tuple[str, ...] = ()
    bits: int = 0
    width: int = 1 << 30

    def fits(self, kernel: str, chip: Chip, bits: int, width: int) -> bool:
        return (
            self.kernel == kernel
            and (not self.chips or chip.name in self.chips)
            and self.bits in (0, bits)
            and width <= self.width
        )


def _norm(kernel: str, spills: int) -> tuple[Row, ...]:
    """A norm's row lies in registers: as few warps as keep 16 elements a thread, and several short rows in a program."""
    shapes = (
        (64, 16, 4),
        (128, 16, 4),
        (256, 8, 4),
        (512, 4, 4),
        (1024, 2, 4),
        (2048, 1, 4),
        (4096, 1, 8),
        (8192, 1, 16),
    )
    return tuple(
        Row(kernel, Config({"ROWS": rows, "BLOCK": width}, num_warps=warps, spills=spills), width=width)
        for width, rows, warps in shapes
    )


_WIDEST = {"ROWS": 1, "BLOCK": 16384}


def _attention(kernel: str, chips: tuple[str, ...], bits: int, *shapes: tuple[int, ...]) -> tuple[Row, ...]:
    """Rows by the wider of head_dim and value_dim, padded to a power of two: width, QUERIES, KEYS, warps, stages, spills."""
    return tuple(
        Row(kernel, Config({"QUERIES": q, "KEYS": k}, warps, stages, spills=sum(spills)), chips, bits, width)
        for width, q, k, warps, stages, *spills in shapes
    )


_HOPPER = ("sm_90", "sm_100")
_AMPERE = ("sm_80",)

# In 16 bits a program's own rows are 128 where registers allow it. Products in float32 are no matrix instructions: small tiles.
# The width is twice that of the heads where a call has dropout or something is added to its scores (attention_problem.py).
# What spills: the gradients of keys and values of head_dim 256, both of which lie in registers, and tiles with dropout or a
# mask at that width.
_ATTENTION = (
    *_attention("attention_forward", _HOPPER, 16, (64, 128, 64, 4, 3), (128, 128, 64, 8, 2), (512, 128, 32, 8, 2)),
    *_attention("attention_forward", _AMPERE, 16, (64, 128, 64, 4, 3), (128, 128, 64, 8, 2)),
    *_attention("attention_forward", _AMPERE, 16, (256, 64, 32, 4, 2, 64), (512, 64, 32, 8, 1)),
    *_attention("attention_forward", (), 16, (64, 128, 64, 4, 1, 8), (128, 64, 32, 4, 1)),
    *_attention("attention_forward", (), 16, (256, 64, 32, 8, 1), (512, 32, 32, 4, 1)),
    *_attention("attention_forward", (), 32, (128, 64, 32, 4, 1), (512, 32, 32, 4, 1)),
    *_attention("attention_backward_rows", _HOPPER, 16, (128, 128, 64, 8, 1), (512, 64, 64, 4, 1)),
    *_attention("attention_backward_rows", (), 16, (128, 64, 32, 4, 1), (512, 32, 32, 4, 1, 96)),
    *_attention("attention_backward_rows", (), 32, (128, 32, 32, 4, 1), (512, 16, 32, 4, 1)),
    *_attention(
        "attention_backward_query", _HOPPER, 16, (128, 128, 64, 8, 2), (256, 64, 64, 8, 2, 8), (512, 64, 32, 8, 2)
    ),
    *_attention(
        "attention_backward_query", _AMPERE, 16, (128, 128, 32, 8, 2), (256, 64, 32, 8, 1), (512, 32, 32, 8, 1)
    ),
    *_attention("attention_backward_query", (), 16, (128, 64, 32, 4, 1), (256, 32, 32, 4, 1), (512, 32, 32, 8, 1, 720)),
    *_attention("attention_backward_query", (), 32, (128, 32, 32, 4, 1), (512, 16, 32, 4, 1)),
    *_attention("attention_backward_key", _HOPPER, 16, (128, 32, 128, 8, 2, 160)),
    *_attention("attention_backward_key", _HOPPER, 16, (256, 32, 64, 8, 2, 1048), (512, 16, 64, 8, 2, 560)),
    *_attention("attention_backward_key", _AMPERE, 16, (128, 32, 128, 8, 2, 40)),
    *_attention("attention_backward_key", _AMPERE, 16, (256, 32, 64, 8, 1, 120), (512, 16, 64, 8, 1, 64)),
    *_attention("attention_backward_key", (), 16, (128, 32, 64, 4, 1, 8), (256, 16, 32, 4, 1, 24), (512, 16, 32, 8, 1)),
    *_attention("attention_backward_key", (), 32, (128, 32, 32, 4, 1), (512, 32, 16, 4, 1)),
    *_attention("attention_mask_gradient", _HOPPER, 16, (256, 64, 64, 8, 2), (512, 64, 32, 8, 2, 160)),
    *_attention("attention_mask_gradient", (), 16, (256, 32, 32, 4, 1), (512, 32, 32, 8, 1, 368)),
    *_attention("attention_mask_gradient", (), 32, (512, 16, 32, 4, 1)),
)

TABLE: tuple[Row, ...] = (
    *_ATTENTION,
    *_norm("norm_forward", spills=0),
    Row("norm_forward", Config(_WIDEST, num_warps=16)),
    *_norm("norm_backward", spills=32),
    Row("norm_backward", Config(_WIDEST, num_warps=16, spills=32), ("gfx942",)),  # whose blocks have 1024 threads, too
    Row("norm_backward", Config(_WIDEST, num_warps=32, spills=320)),
)


def choose(kernel: str, chip: Chip, dtype: torch.dtype, width: int) -> Config:
    """The config of a call: the first row of the table that fits."""
    for row in TABLE:
        if row.fits(kernel, chip, dtype.itemsize * 8, width):
            return row.config
    raise LookupError(f"no row of configs.TABLE fits {kernel} on {chip.name} for {dtype} and width {width}")
