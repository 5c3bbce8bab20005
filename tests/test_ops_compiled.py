"""Every op under torch.compile and torch.export: one graph, also for shapes that change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import SAMPLES, Sample, asked, gradients, leaves, tensors
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

import fastattn
from fastattn.backends import BACKENDS, OPS

pytestmark = pytest.mark.usefixtures("same_random_numbers")


def every(samples: list[Sample], arguments: list[tuple[tuple, dict]]) -> list[Tensor]:
    return [
        out
        for sample, (args, kwargs) in zip(samples, arguments, strict=True)
        for out in tensors(sample.function(*args, **kwargs))
    ]


def compare_compiled(compiler: str, samples: list[Sample], backend: str, **options: Any) -> None:
    """All samples as one graph, forward and backward, against the same without a compiler."""
    torch.compiler.reset()
    compiled = torch.compile(every, fullgraph=True, backend=compiler, **options)
    results = []
    for function in (every, compiled):
        arguments = [sample.arguments() for sample in samples]
        torch.manual_seed(0)
        with fastattn.use_backend(backend):
            outputs = function(samples, arguments)
            results.append([*outputs, *gradients(outputs, leaves(arguments))])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in OPS for backend in BACKENDS if op in BACKENDS[backend]]
)
def test_compiled_without_graph_breaks(op: str, backend: str) -> None:
    taken = [sample for sample in SAMPLES if sample.op == op and backend in asked(sample)]
    compare_compiled("aot_eager", taken, backend)


class Block(torch.nn.Module):
    """A Transformer layer of ops: every op that a language model's layer has, in one graph."""

    def __init__(self) -> None:
        super().__init__()
        dim, hidden = 16, 24
        shapes = {
            "qkv": (3 * dim, dim),
            "out": (dim, dim),
            "w1": (hidden, dim),
            "gate": (hidden, dim),
            "w2": (dim, hidden),
        }
        self.weights = torch.nn.ParameterDict({name: torch.randn(shape) / 4 for name, shape in shapes.items()})
        self.norm1, self.norm2 = (torch.nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x: Tensor, dropout_p: float = 0.0) -> Tensor:
        w = self.weights
        seq = x.shape[1]
        q, k, v = (
            fastattn.linear(fastattn.layer_norm(x, self.norm1), w.qkv).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        )
        angle = torch.arange(seq)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        q, k = fastattn.rotary_embedding(q, k, angle.cos(), angle.sin())
        attended = fastattn.attention(q, k, v, None, dropout_p, is_causal=True).transpose(1, 2).flatten(2)
        normed, x = fastattn.rms_norm(fastattn.linear(attended, w.out), self.norm2, residual=x, dropout_p=dropout_p)
        return x + fastattn.feed_forward(normed, w.w1, None, w.w2, None, "silu", w.gate, dropout_p)


def training_step(block: Block, function: Callable, x: Tensor, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    out = function(x, **options)
    return [out, *gradients([out], [x, *block.parameters()])]


@torch._inductor.config.patch(fallback_random=True)  # eager's random numbers
def test_inductor_with_dynamic_shapes() -> None:
    """No new graph for sequences of other lengths, forward and backward, with dropout."""
    torch.compiler.reset()
    block, graphs, counts = Block(), [], []

    def compiler(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return compile_fx(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((2, 5, 16), (3, 9, 16), (2, 40, 16)):
        x = torch.randn(shape)
        for found, expected in zip(
            *(training_step(block, f, x, dropout_p=0.2) for f in (compiled, block)), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        counts.append(len(graphs))
    # The first length may take two: dynamo starts over once it knows that dropout_p is a constant.
    assert counts[0] in (1, 2)
    assert counts == counts[:1] * 3


def test_export_with_dynamic_shapes() -> None:
    block = Block()
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
    exported = torch.export.export(block, (torch.randn(2, 5, 16),), dynamic_shapes={"x": {0: batch, 1: seq}})
    for shape in ((2, 5, 16), (1, 7, 16), (4, 3, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), block(x))
