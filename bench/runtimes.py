"""Build functions of the non-PyTorch providers, which receive the network as ONNX."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Runner = Callable[[Tensor], Tensor]


def _onnx(model: nn.Module, example: Tensor) -> bytes:
    """Export the network to ONNX; the exporter folds BatchNorm into the convolutions."""
    program = torch.onnx.export(model, (example,), dynamo=True, input_names=["x"], verbose=False)
    assert program is not None
    model_bytes: bytes = program.model_proto.SerializeToString()
    return model_bytes


def onnxruntime(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Build an ONNX Runtime session on the CPU with all graph optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graph is a chain
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(_onnx(model, example), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return run


def openvino(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Build an OpenVINO CPU model that serves one request at a time."""
    import openvino as ov

    core = ov.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",  # all threads serve the single request
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the CPU supports it
    }
    compiled = core.compile_model(core.read_model(_onnx(model, example)), "CPU", settings)
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        # No copies: the output aliases the request's buffer, which is valid until the next call.
        result = request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

    return run
