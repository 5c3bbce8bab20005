"""The table of configurations: which tiles, warps and stages a kernel takes, by chip, dtype and width.

Rows are read from the top and the first that fits is taken, so a kernel's special cases come before its general one. What
the compiler makes of each row is asserted for every chip (`budgets.py`, `python -m fastattn kernels`): matrix instructions,
shared memory, registers for the blocks a multiprocessor is to hold, spilled bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        described: the copy engine brings the tiles of a loop, where it can read the tensors (descriptors.py).
        specialised: where the copy engine brings them, loads, products and what follows have warps of their own. On sm_90 Triton
            (3.6 to 3.9) leaves such a loop as it is, or fails; there csrc/cuda/attention_hopper.cu does it by hand.
        persistent: a row of a product may say that the copy engine brings the operands, if it can read them, and that as many
            programs as multiprocessors go through the tiles (matmul_persistent.py, feed_forward_persistent.py).
        library: a row of "matmul" may say that torch's own product (cuBLAS, rocBLAS) is faster; what follows it is then a pass of
            its own. Such a row has no tiles.
    """

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    blocks: int = 1
    spills: int = 0
    newest: bool = True
    described: bool = False
    specialised: bool = False
    persistent: bool = False
    library: bool = False


@dataclass(frozen=True)
class Row:
    """One row: the calls it fits, and their config.

    Attributes:
        kernel: the kernel's name, of unusual operands with OFF_16_BYTES.
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


# Of products whose 16-bit operands do not lie at multiples of 16 bytes: what follows a kernel's name.
OFF_16_BYTES = " off 16 bytes"


def _matmul(kernel: str, columns: int, warps: int = 4, spills: tuple[int, int] = (0, 0)) -> tuple[Row, ...]:
    """A matrix product's tiles (`matmul.py`); the width is the number of rows.

    Args:
        columns: of the largest tile, whose accumulators take half of the registers.
        warps: of half that tile on sm_80 and sm_86.
        spills: of the largest tile on sm_90 and sm_100.
    """

    def row(
        width: int, bits: int, chips: tuple[str, ...], tile: tuple[int, int, int], name: str = kernel, **config: Any
    ) -> Row:
        tiles = dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH"), tile, strict=True), GROUP=8)
        return Row(name, Config(tiles, **config), chips, bits, width)

    most, amd = 1 << 30, ("gfx942",)
    large: dict[str, Any] = {"num_warps": 8, "num_stages": 3, "persistent": True}
    one_sum = kernel != "gated_matmul"  # of two Triton (3.7) cannot divide the loop between warps
    return (
        # Loads element by element, by way of registers: any larger tile spills.
        row(most, 16, (), (64, 64, 32), num_warps=8, name=f"{kernel}{OFF_16_BYTES}"),
        # Few rows: the weights' bytes are what counts, so narrow tiles of long rows, many of them under way.
        row(16, 16, (*amd, "sm_86"), (16, 32, 128), num_stages=2, newest=False),
        row(16, 16, (), (16, 32, 256), num_stages=4, newest=False),
        row(64, 16, amd, (64, 64, 64), num_stages=2),
        row(64, 16, (), (64, 64, 64), num_stages=4),
        # As large as registers and shared memory allow. What is spilled, is so between the products and the stores.
        row(most, 16, ("sm_90",), (128, columns, 64), **large, spills=spills[0]),
        row(most, 16, ("sm_100",), (128, columns, 64), **large, spills=spills[1], specialised=one_sum),
        row(most, 16, amd, (128, columns // 2, 64), num_stages=2),
        row(most, 16, (), (128, columns // 2, 32), num_warps=warps, num_stages=4, spills=96),
        # float32 without tensor cores: operands of the whole depth of a tile lie in registers.
        row(16, 32, (), (16, 64, 32), num_stages=3, spills=32),
        row(most, 32, (), (64, 64, 16), num_stages=3, spills=48),
    )


def _rotary() -> tuple[Row, ...]:
    """1024 pairs of a head at a time, the angles of which stay in registers for four heads. The width is that of a half."""
    kernel = "rotary_embedding"
    narrow = tuple(Row(kernel, _turning(block), width=block) for block in (16, 32, 64))
    return (*narrow, Row(kernel, _turning(128)))


def _turning(block: int) -> Config:
    return Config({"TOKENS": 1024 // block, "HEADS": 4, "BLOCK": block}, blocks=4)


def _cache() -> tuple[Row, ...]:
    """Reading is what counts: 32 KB of keys and as many of values a tile, two or three on their way where they fit.

    Tiles have 16 rows and more, as many as queries share their keys, and so take sm_80's matrix instructions.
    """

    def row(
        width: int, keys: int, warps: int, stages: int, chips: tuple[str, ...] = (), bits: int = 0, spills: int = 0
    ) -> Row:
        config = Config({"KEYS": keys}, num_warps=warps, num_stages=stages, spills=spills, newest=False)
        return Row("attend_to_cache", config, chips, bits, width)

    small = ("sm_86", "gfx942")
    return (
        row(64, 64, 4, 2, small),
        row(64, 128, 4, 3, bits=16),
        row(64, 64, 4, 3),
        row(128, 32, 8, 2, small, bits=32),
        row(128, 32, 4, 2, small),
        row(128, 64, 4, 3, bits=16, spills=16),  # of paged caches, with three blocks on a multiprocessor
        row(128, 32, 8, 3),
        row(256, 16, 8, 2, small),
        row(256, 32, 8, 3, bits=16),
        row(256, 16, 8, 3),
        # There every warp has the whole rows of queries and keys in registers.
        row(512, 16, 8, 1, ("gfx942",), bits=32, spills=400),
        row(512, 16, 8, 1, small),
        row(512, 16, 8, 2),
        row(1024, 16, 8, 1, ("gfx942",), spills=200),
        row(1024, 16, 8, 1),
        Row("append_to_cache", Config({"TOKENS": 8, "BLOCK": 128})),
        Row("combine_parts", Config({"PARTS": 16, "BLOCK": 128})),
    )


def _additive() -> tuple[Row, ...]:
    """A chunk of 32 tanhs a thread. The forward's width is that of values, of which a tile lies in shared memory as well.

    Its products have 16 rows, and so take sm_80's matrix instructions. A few bytes are spilled for the sake of another
    block on the multiprocessor.
    """
    few = 32

    def forward(width: int, keys: int, warps: int, hidden: int) -> Row:
        config = Config({"KEYS": keys, "HIDDEN": hidden}, num_warps=warps, spills=few, newest=False)
        return Row("additive_forward", config, width=width)

    return (
        forward(128, 64, 4, 4),
        forward(256, 64, 4, 4),
        forward(512, 32, 8, 8),
        forward(1 << 30, 16, 8, 16),
        Row("additive_scores", Config({"KEYS": 64, "HIDDEN": 4}, spills=few)),
        Row("additive_weights", Config({"KEYS": 1024})),
        Row("additive_projection_grad", Config({"HIDDEN": 64, "OTHERS": 4, "RUN": 64}, spills=few)),
    )


_WIDEST = {"ROWS": 1, "BLOCK": 16384}


def _attention(
    kernel: str, chips: tuple[str, ...], bits: int, *shapes: tuple[int, ...], **config: bool
) -> tuple[Row, ...]:
    """Rows by the wider of head_dim and value_dim, padded to a power of two: width, QUERIES, KEYS, warps, stages, spills."""
    return tuple(
        Row(kernel, Config({"QUERIES": q, "KEYS": k}, warps, stages, spills=sum(spills), **config), chips, bits, width)
        for width, q, k, warps, stages, *spills in shapes
    )


def _described(kernel: str, chips: tuple[str, ...], *shapes: tuple[int, ...], **config: bool) -> tuple[Row, ...]:
    """The same for 16 bits, with tiles by the copy engine."""
    return _attention(kernel, chips, 16, *shapes, described=True, **config)


_HOPPER = ("sm_90", "sm_100")
_AMPERE = ("sm_80",)

# In 16 bits a program's own rows are 128 where registers allow it. Products in float32 are no matrix instructions, and have rows
# of both operands in registers: small tiles, with which hardly anything spills (up to 3 KB a thread with twice their sides).
# The width is twice that of the heads where a call has dropout or something is added to its scores (attention_problem.py).
# What spills: on sm_100 the gradients of keys and values of head_dim 256, both of which lie in registers, elsewhere tiles with
# dropout or a mask at that width. Otherwise a few bytes, stored before the loop over tiles and loaded after it or once a head,
# for the sake of a larger tile or of a third block on the multiprocessor (64 by 32 in attention_forward and
# attention_backward_rows).
# attention_backward_key on sm_80: the sums of 128 keys of head_dim 128 take half of eight warps' registers. Blocks of 16 queries
# leave room for what a window and packed sequences ask besides; blocks of 32 spill up to 280 bytes then, some of it in the loop.
# 64 keys would take as many registers with four warps, and with eight the matrix units would make half of the products twice.
# Of packed sequences it has no descriptors (attention_backward.py): on sm_90 and sm_100 causal ones store 208 and 520 bytes
# before the loop over tiles and load part of them once a head; with one stage there are none, and no tile on its way while
# another is multiplied.
_ATTENTION = (
    *_described("attention_forward", ("sm_90",), (128, 128, 64, 8, 3)),
    *_described("attention_forward", ("sm_100",), (128, 128, 64, 8, 3, 16), specialised=True),
    *_described("attention_forward", _HOPPER, (256, 128, 64, 8, 2), (512, 128, 32, 8, 2, 8)),
    *_attention("attention_forward", _AMPERE, 16, (64, 128, 64, 4, 3), (128, 128, 64, 8, 2, 16)),
    *_attention("attention_forward", _AMPERE, 16, (256, 64, 32, 4, 2, 64), (512, 64, 32, 8, 1)),
    *_attention("attention_forward", (), 16, (64, 128, 64, 4, 1, 32), (128, 64, 32, 4, 1, 8)),
    *_attention("attention_forward", (), 16, (256, 64, 32, 8, 1), (512, 32, 32, 4, 1)),
    *_attention("attention_forward", (), 32, (64, 64, 32, 8, 1), (128, 32, 32, 8, 1), (512, 16, 16, 4, 1, 16)),
    *_attention("attention_summary", _HOPPER, 16, (128, 64, 64, 4, 2), (512, 64, 32, 4, 1)),
    *_attention("attention_summary", (), 16, (128, 64, 32, 4, 1), (512, 32, 32, 4, 1)),
    *_attention("attention_summary", (), 32, (128, 32, 32, 4, 1, 8), (512, 16, 32, 4, 1)),
    *_attention("attention_backward_rows", _HOPPER, 16, (128, 128, 64, 8, 1), (512, 64, 64, 4, 1)),
    *_attention("attention_backward_rows", (), 16, (128, 64, 32, 4, 1, 16), (512, 32, 32, 4, 1, 96)),
    *_attention("attention_backward_rows", (), 32, (64, 32, 32, 4, 1), (128, 16, 32, 8, 1), (512, 16, 16, 4, 1)),
    *_described("attention_backward_query", _HOPPER, (128, 128, 64, 8, 2), (256, 64, 64, 8, 2), (512, 64, 32, 8, 2)),
    *_attention(
        "attention_backward_query", _AMPERE, 16, (128, 128, 32, 8, 2), (256, 64, 32, 8, 1), (512, 32, 32, 8, 1)
    ),
    *_attention(
        "attention_backward_query", (), 16, (128, 64, 32, 4, 1, 8), (256, 32, 32, 4, 1), (512, 32, 32, 8, 1, 720)
    ),
    *_attention("attention_backward_query", ("gfx942",), 32, (128, 16, 32, 4, 1), (512, 16, 16, 4, 1)),
    *_attention("attention_backward_query", (), 32, (64, 32, 32, 4, 1), (512, 16, 32, 8, 1, 16)),
    *_described("attention_backward_key", ("sm_90",), (128, 32, 128, 8, 2, 208), (256, 32, 64, 8, 2, 16)),
    *_described("attention_backward_key", ("sm_90",), (512, 16, 64, 8, 2, 8)),
    *_described("attention_backward_key", ("sm_100",), (128, 32, 128, 8, 2, 520), (256, 32, 64, 8, 2, 656)),
    *_described("attention_backward_key", ("sm_100",), (512, 16, 64, 8, 2, 568)),
    *_attention("attention_backward_key", _AMPERE, 16, (64, 32, 128, 8, 2), (128, 16, 128, 8, 2, 8)),
    *_attention("attention_backward_key", _AMPERE, 16, (256, 32, 64, 8, 1, 120), (512, 16, 64, 8, 1, 64)),
    *_attention(
        "attention_backward_key", (), 16, (128, 32, 64, 4, 1, 48), (256, 16, 32, 4, 1, 40), (512, 16, 32, 8, 1)
    ),
    *_attention("attention_backward_key", ("gfx942",), 32, (128, 32, 16, 4, 1), (512, 16, 16, 4, 1)),
    *_attention("attention_backward_key", (), 32, (64, 32, 32, 4, 1), (128, 32, 32, 8, 1, 56), (512, 16, 16, 8, 1, 40)),
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
    Row("activation_backward", Config({"ROWS": 16, "COLUMNS": 256}, spills=8)),
    Row("epilogue", Config({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256})),
    *_matmul("matmul", columns=256),
    *_matmul("gated_matmul", columns=128),  # and as many of the gate's
    *_matmul("hidden_backward", columns=256, warps=8, spills=(8, 56)),
    *_rotary(),
    *_cache(),
    *_additive(),
    # A row of a vocabulary is read by as many lanes as keep enough loads on their way; short ones share a program.
    Row("row_statistics", Config({"ROWS": 4, "BLOCK": 256}, num_warps=4), width=1024),
    Row("row_statistics", Config({"ROWS": 1, "BLOCK": 4096}, num_warps=8, blocks=2)),
    Row("logit_gradients", Config({"TILES": 32, "ROWS": 4, "BLOCK": 512}, num_warps=4, blocks=3)),
    Row("query_terms", Config({"ROWS": 4, "BLOCK": 256}, num_warps=4), width=1024),
    Row("query_terms", Config({"ROWS": 1, "BLOCK": 4096}, num_warps=8, blocks=3)),
    # 128 bytes of a row, and programs enough for a GPU.
    Row("positive_terms", Config({"ROWS": 32, "BLOCK": 64}, num_warps=4, blocks=4)),
    Row("score_gradients", Config({"TILES": 32, "ROWS": 4, "BLOCK": 512}, num_warps=4, blocks=3)),
)


def choose(kernel: str, chip: Chip, dtype: torch.dtype, width: int) -> Config:
    """The config of a call: the first row of the table that fits."""
    for row in TABLE:
        if row.fits(kernel, chip, dtype.itemsize * 8, width):
            return row.config
    raise LookupError(f"no row of configs.TABLE fits {kernel} on {chip.name} for {dtype} and width {width}")
