"""Turn a flow and a method into ONNX programs that run without torch.

Written for a version (``Manifest.programs`` names them):

- ``encode``: x [B, D] → z [B, D], log|det ∂z/∂x| [B, 1]; ``decode``: z → x, the same; both float64;
- ``start_{kind}_{precision}``: time, point (, context) → state;
- ``step_{kind}_{precision}``: clock, span, state (, context) → clock, state;

kind ``density`` integrates the log-density, ``sample`` leaves it out; precision is ``float32`` or
``float64``. The batch dimension is dynamic in all of them.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented  # noqa: A004
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pushforward.errors import PublishFailed
from pushforward.flows.flow import Flow
from pushforward.flows.transforms import Transform
from pushforward.solvers.state import Clock, Span
from pushforward.solvers.step import Start, Step
from pushforward.solvers.tableau import Tableau

__all__ = ["PRECISIONS", "export_programs"]

PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
OPSET = 20


class _Encode(nn.Module):
    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.encode(x)


class _Decode(nn.Module):
    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.decode(z)


def export_programs(
    flow: Flow, tableau: Tableau, folder: Path, advance: Callable[[str], None] = lambda name: None
) -> dict[str, str]:
    """Write all programs of a flow into ``folder``.

    Args:
        flow: what to export; it is not changed.
        tableau: the method of the steps.
        folder: where the ``.onnx`` files go; it must exist.
        advance: called with the name of each program that is written.

    Returns:
        program name → file name.
    """
    flow = copy.deepcopy(flow).cpu().eval().requires_grad_(False)
    dim, interval = flow.dim, abs(flow.t_data - flow.t_base)
    # an example batch with more rows than any matrix has columns: tracing takes equal sizes for the same size
    rows = 2 * dim + flow.context_dim + len(Clock) + 2
    context = [torch.zeros(rows, flow.context_dim, dtype=torch.float64)] if flow.context_dim else []
    context_name = ["context"] if context else []
    t, z = torch.zeros(rows, 1, dtype=torch.float64), torch.full((rows, dim), 0.5, dtype=torch.float64)
    files: dict[str, str] = {}

    def write(
        name: str, module: nn.Module, inputs: list[Tensor], names: list[str], outputs: list[str]
    ) -> None:
        files[name] = f"{name}.onnx"
        try:
            if flow.field.exactness in ("reverse_mode", "hutchinson") and "_density_" in name:
                # torch.export cannot see through autograd; tracing first leaves plain operators
                module = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
            _export(module, inputs, names, outputs, folder / files[name])
        except (NotImplemented, OSError):
            raise
        except Exception as error:
            raise PublishFailed(
                "The field cannot be turned into an ONNX program: it must be tensor operations only, "
                f"without Python branches on values. {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        advance(name)

    transform = flow.transform.double()
    write("encode", _Encode(transform), [z], ["x"], ["z", "log_det"])
    write("decode", _Decode(transform), [z], ["z"], ["x", "log_det"])
    for precision, dtype in PRECISIONS.items():
        field = copy.deepcopy(flow.field).to(dtype)
        clock = torch.ones(rows, len(Clock), dtype=torch.float64)
        span = torch.ones(rows, len(Span), dtype=torch.float64)
        try:
            for kind, divergence in (("density", True), ("sample", False)):
                start, step = Start(field, divergence), Step(field, tableau, divergence, interval)
                names = ["time", "point", *context_name]
                write(f"start_{kind}_{precision}", start, [t, z, *context], names, ["state"])
                state = torch.zeros(rows, 2 * dim + divergence, dtype=dtype)
                names, outputs = ["clock", "span", "state", *context_name], ["clock_next", "state_next"]
                write(f"step_{kind}_{precision}", step, [clock, span, state, *context], names, outputs)
        except NotImplemented as error:
            if precision == "float32":
                raise PublishFailed(f"ONNX Runtime cannot run this field: {error}") from error
            # a foreign field may use operators that exist in float32 only: it is then served in float32 only
            for name in [name for name in files if name.endswith(precision)]:
                (folder / files.pop(name)).unlink(missing_ok=True)
    return files


def _export(
    module: nn.Module, inputs: list[Tensor], names: list[str], outputs: list[str], path: Path
) -> None:
    batch = torch.export.Dim("batch", min=1)
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it reports every operator set that is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs),
                dynamo=True,
                dynamic_shapes=({0: batch},) * len(inputs),
                input_names=names,
                output_names=outputs,
                opset_version=OPSET,
                verbose=False,
                optimize=True,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    with tempfile.TemporaryDirectory() as temporary:
        plain = os.path.join(temporary, "plain.onnx")
        program.save(plain, include_initializers=True, external_data=False)
        # ONNX Runtime's own basic passes fold what is constant (weight transposes, the bracket of the trace),
        # so that
        # loading does not repeat it and the file holds what runs.  "Basic" keeps to standard operators.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = optimized = os.path.join(temporary, "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
        shutil.copyfile(optimized, path)  # by Python, which reports a full disk as one
