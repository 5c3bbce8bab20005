"""Inference engines beside PyTorch that take a whole model: ONNX Runtime and OpenVINO, on the same weights.

Each is made from the PyTorch module at its first call, with sizes left open, and threads as torch has them then. A missing
package is an ImportError at that call, which the harness notes.
"""

import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_INSTALL = "it is not installed; pip install 'fastattn[bench]'"


def onnxruntime(model: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """`call(*inputs)` in float32; inputs are integer tensors (batch, seq)."""

    @functools.cache
    def session(threads: int):
        try:
            import onnxruntime as runtime
            import onnxscript  # noqa: F401  (torch's exporter asks for it)
        except ImportError as error:
            raise ImportError(_INSTALL) from error
        batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
        names = [f"input{i}" for i in range(len(example))]
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            sizes = tuple({0: batch, 1: seq} for _ in example)
            program = torch.onnx.export(
                model, example, dynamo=True, dynamic_shapes=sizes, input_names=names, verbose=False
            )
            path = str(Path(folder) / "model.onnx")
            program.save(path)  # type: ignore[union-attr]
            options = runtime.SessionOptions()
            options.intra_op_num_threads = threads
            # Its threads would go on spinning while the next peer of the round is timed.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"]), names

    def call(*inputs: Tensor) -> Tensor:
        runner, names = session(torch.get_num_threads())
        arrays = dict(zip(names, (x.numpy() for x in inputs), strict=False))
        return torch.from_numpy(runner.run(None, arrays)[0])

    return call


def openvino(model: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    """`call(*inputs)`, which multiplies in this dtype, float32 or bfloat16, and gives it back."""
    count = len(example)

    @functools.cache
    def request(threads: int):
        try:
            import openvino as engine
        except ImportError as error:
            raise ImportError(_INSTALL) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = engine.convert_model(model, example_input=example)
        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        return engine.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def call(*inputs: Tensor) -> Tensor:
        arrays = {i: x.numpy() for i, x in enumerate(inputs[:count])}
        return torch.from_numpy(request(torch.get_num_threads()).infer(arrays, share_inputs=True)[0]).to(dtype)

    return call
