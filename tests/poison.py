"""Programs that go wrong: steps that fail or never end for rows that are far out, weights that rot."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FAR = 1e6  # in units of the transformed data


def poison(folder: Path, what: str) -> None:
    """Change the float32 step programs of the version in ``folder``: hashes fit, ordinary bits stay.

    Args:
        folder: of the version.
        what: ``raise`` makes ONNX Runtime fail, ``hang`` makes it go round until it is killed.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("step_density_float32", "step_sample_float32"):
        file = manifest["programs"][name]
        model = onnx.load(folder / file)
        _poison(model.graph, what)
        onnx.checker.check_model(model)
        content = model.SerializeToString()
        (folder / file).write_bytes(content)
        manifest["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rot(pid: int, folder: Path) -> int:
    """Turn the signs of a bias of the version in ``folder`` in the memory of a process that has loaded it.

    Returns:
        In how many places it was found.
    """
    graph = onnx.load(folder / "programs" / "step_density_float32.onnx").graph
    vectors = [numpy_helper.to_array(each) for each in graph.initializer if len(each.dims) == 1]
    bias = max((vector for vector in vectors if vector.dtype == np.float32), key=len)
    found = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for line in maps:
            addresses, access, *_ = line.split()
            if not access.startswith("rw"):
                continue
            first, end = (int(address, 16) for address in addresses.split("-"))
            try:
                memory.seek(first)
                content = memory.read(end - first)
            except (OSError, OverflowError):  # pages of the kernel's own
                continue
            at = content.find(bias.tobytes())
            while at >= 0:
                memory.seek(first + at)
                memory.write((-bias).tobytes())
                found += 1
                at = content.find(bias.tobytes(), at + bias.nbytes)
    return found


def _poison(graph: onnx.GraphProto, what: str) -> None:
    state = graph.input[2].name
    for node in graph.node:
        node.input[:] = ["poisoned" if name == state else name for name in node.input]
    kind = graph.input[2].type.tensor_type.elem_type
    one = helper.make_tensor("poison_one", kind, [1], [1.0])
    graph.initializer.extend(
        [
            helper.make_tensor("poison_far", kind, [], [FAR]),
            one,
            helper.make_tensor("poison_many", TensorProto.INT64, [], [1 << 40]),
            helper.make_tensor("poison_always", TensorProto.BOOL, [], [True]),
        ]
    )
    nodes = [
        helper.make_node("Abs", [state], ["poison_distance"]),
        helper.make_node("ReduceMax", ["poison_distance"], ["poison_farthest"], keepdims=0),
        helper.make_node("Greater", ["poison_farthest", "poison_far"], ["poison_is_far"]),
        helper.make_node("Cast", ["poison_is_far"], ["poison_far_or_not"], to=TensorProto.INT64),
        helper.make_node("Mul", ["poison_far_or_not", "poison_many"], ["poison_times"]),
    ]
    if what == "raise":
        nodes.append(
            helper.make_node("Gather", ["poison_one", "poison_times"], ["poison_factor"])
        )  # there is no such place
    else:
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go_on_in"], ["go_on"]),
                helper.make_node("Identity", ["value_in"], ["value"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("turn", TensorProto.INT64, []),
                helper.make_tensor_value_info("go_on_in", TensorProto.BOOL, []),
                helper.make_tensor_value_info("value_in", kind, [1]),
            ],
            [
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("value", kind, [1]),
            ],
        )
        nodes.append(
            helper.make_node(
                "Loop", ["poison_times", "poison_always", "poison_one"], ["poison_factor"], body=body
            )
        )
    nodes.append(helper.make_node("Mul", [state, "poison_factor"], ["poisoned"]))
    graph.node.extend(nodes)
    ordered = [*nodes, *list(graph.node)[: -len(nodes)]]
    del graph.node[:]
    graph.node.extend(ordered)
