"""What one attempted step costs, and what around it.

1. The step program in ONNX Runtime against the same torch module, eager and compiled, at several batch sizes;
   its GFLOP/s as a share of ONNX Runtime's own matrix-product ceiling; its graph nodes.
2. Whole solves with the closed-form trace against the same steps without divergence.
3. The engine's time outside ONNX Runtime, in the steady state with all slots taken.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

import measure
import ours
from networks import HIDDEN, Network, load
from pushforward.programs.runtime import Program
from pushforward.solvers.state import Clock, Span
from pushforward.solvers.step import Step
from pushforward.solvers.tableau import METHODS

BATCHES = (1, 16, 64, 256, 1024)
DOPRI5 = METHODS["dopri5"]


def flop(network: Network, batch: int) -> int:
    """Floating-point operations of a step's useful matrix products: field and trace, at every stage."""
    d, h = network.dim, network.hidden
    return DOPRI5.stages * 2 * batch * (d * h + h * h + h * d + h * h)


def inputs(network: Network, batch: int) -> list[np.ndarray]:
    """Clock, span and state of rows in flight."""
    clock, span = np.zeros((batch, len(Clock))), np.empty((batch, len(Span)))
    clock[:, Clock.T], clock[:, Clock.DT], clock[:, Clock.CAP] = 1.0, -0.05, 10.0
    span[:] = (0.0, 1e-5, 1e-5, 1e-5, 1000)
    z = network.rows[np.arange(batch) % len(network.rows)]
    (state,) = ours.model(network.dim).program("start_density_float32")(np.ones((batch, 1)), z)
    return [clock, span, state]


def product_chain(width: int, length: int = 10) -> Program:
    """A graph of nothing but products [B, width] × [width, width]: the ceiling of ONNX Runtime."""
    weight = np.eye(width, dtype=np.float32) + 1e-3
    nodes = [helper.make_node("MatMul", [f"x{i}", "w"], [f"x{i + 1}"]) for i in range(length)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", width]) for n in ("x0", f"x{length}")]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return Program(made.SerializeToString(), "products")


def nodes(path: str) -> dict[str, int]:
    """Graph nodes of a program: as published, and as ONNX Runtime runs it."""
    published = [node.op_type for node in onnx.load(path).graph.node]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/run.onnx"
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        run = onnx.load(options.optimized_model_filepath).graph.node
    return {"published nodes": len(published), "of them Mul": published.count("Mul"), "run nodes": len(run)}


def step_cost(network: Network, batch: int, rounds: int) -> dict[str, Any]:
    """One step, three ways."""
    program = ours.model(network.dim).program("step_density_float32")
    module = Step(network.field(), DOPRI5, divergence=True).eval()
    torch.compiler.reset()
    compiled = torch.compile(module, dynamic=False)
    products = product_chain(network.hidden)
    arrays, flat = inputs(network, batch), np.ones((batch, network.hidden), np.float32)
    tensors = [torch.from_numpy(a) for a in arrays]

    def run_torch(step: Any) -> None:
        with torch.inference_mode():
            step(*tensors)

    with torch.no_grad():
        (clock, state), (clock_torch, state_torch) = program(*arrays), module(*tensors)
    where = [Clock.T, Clock.ELL]  # the next step depends on the error, which is mostly rounding here
    np.testing.assert_allclose(clock[:, where], clock_torch.numpy()[:, where], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state, state_torch.numpy(), rtol=1e-3, atol=1e-3)
    times = measure.paired(
        {
            "eager": lambda: run_torch(module),
            "compiled": lambda: run_torch(compiled),
            "onnx": lambda: program(*arrays),
            "products": lambda: products(flat),
        },
        rounds,
    )
    ms = {name: float(np.median(values)) * 1e3 for name, values in times.items()}
    ceiling = 10 * 2 * batch * network.hidden**2 / times["products"]
    rate = flop(network, batch) / times["onnx"]
    return {
        "D": network.dim,
        "H": network.hidden,
        "B": batch,
        "eager ms": ms["eager"],
        "compiled ms": ms["compiled"],
        "program ms": ms["onnx"],
        "eager / program": measure.ratio(times, "eager", "onnx"),
        "compiled / program": measure.ratio(times, "compiled", "onnx"),
        "GFLOP/s": float(np.median(rate)) / 1e9,
        "ceiling GFLOP/s": float(np.median(ceiling)) / 1e9,
        "share of ceiling": float(np.median(rate / ceiling)),
    }


def trace_cost(network: Network, rounds: int) -> dict[str, Any]:
    """Whole solves of 256 rows with the divergence against the same steps without it."""
    solver = ours.Solver(network)
    requests = {
        kind: ours.chunk(network.rows, 1e-5, 1e9, density=kind == "with") for kind in ("with", "without")
    }
    counts = {kind: solver.answer(request).steps for kind, request in requests.items()}
    assert abs(counts["with"].mean() / counts["without"].mean() - 1) < 0.01, "the steps differ"
    times = measure.paired({kind: lambda c=c: solver.answer(c) for kind, c in requests.items()}, rounds)
    return {
        "D": network.dim,
        "H": network.hidden,
        "with trace ms": float(np.median(times["with"])) * 1e3,
        "without ms": float(np.median(times["without"])) * 1e3,
        "ratio": measure.ratio(times, "with", "without"),
    }


def overhead(network: Network, slots: int, seconds: float) -> dict[str, Any]:
    """The engine kept full by requests of 16 rows: time outside ONNX Runtime over the time inside."""
    loaded = ours.model(network.dim)
    each = min(16, slots)
    requests = deque(ours.chunk(network.rows[i : i + each], 1e-5, 1e-5) for i in range(0, 256, each))
    shares, turns = [], 0
    with ours.onnx_seconds(loaded) as inside:
        engine = ours.Solver(network, slots).engine
        for part in range(4):  # the first fills the slots and is not counted
            inside[0], start, turns = 0.0, time.perf_counter(), 0
            while time.perf_counter() - start < seconds / 3:
                while engine.waiting + engine.running < slots + each:
                    engine.submit(requests[0])
                    requests.rotate()
                engine.step()
                turns += 1
            elapsed = time.perf_counter() - start
            if part:
                shares.append(elapsed / inside[0] - 1)
    return {"D": network.dim, "H": network.hidden, "slots": slots, "ms a step": elapsed / turns * 1e3} | {
        "outside / inside ONNX Runtime": float(np.median(shares))
    }


def main() -> None:
    """All three."""
    quick = measure.arguments(__doc__).quick
    measure.pin_to_one_core()
    torch.set_num_threads(1)
    dims, batches, rounds = ((30,), (1, 64), 5) if quick else (tuple(HIDDEN), BATCHES, 15)
    networks = [load(dim) for dim in dims]
    graphs = []
    for network in networks:
        path = str(ours.published(network.dim) / "programs" / "step_density_float32.onnx")
        graphs.append({"D": network.dim, "H": network.hidden} | nodes(path))
    measure.show(graphs)
    cost = [trace_cost(network, rounds) for network in networks]
    measure.show(cost)
    engine = [overhead(n, slots, 1.0 if quick else 6.0) for n in networks for slots in (1, 64, 256)]
    measure.show(engine)
    step = [step_cost(network, batch, rounds) for network in networks for batch in batches]
    measure.show(step)
    measure.save("step", step, graphs=graphs, trace=cost, engine=engine, quick=quick)


if __name__ == "__main__":
    main()
