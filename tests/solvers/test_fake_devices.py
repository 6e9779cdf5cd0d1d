"""The step on another device, without one: torch's fake tensors know where everything lies.

A tensor that is made on the wrong device, or a value that is read back to the host, is an error here as it
would be (or would wait) on a GPU.
"""

import copy

import pytest
import torch
from tests.problems import FLOWS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pushforward.solvers.state import Clock, Span
from pushforward.solvers.step import Start, Step
from pushforward.solvers.tableau import METHODS

ROWS = 5


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in FLOWS if name != "foreign3"])
def test_a_step_stays_on_its_device_and_never_waits_for_it(name: str, precision: torch.dtype) -> None:
    make, method = FLOWS[name]
    flow = make()
    start = Start(copy.deepcopy(flow.field).to(precision), divergence=True)
    step = Step(start.field, METHODS[method], divergence=True)
    with FakeTensorMode(), torch.no_grad():
        for module in (start, step):
            for parent in module.modules():
                for tensors in (parent._parameters, parent._buffers):
                    for key, tensor in tensors.items():
                        if tensor is not None:
                            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                            tensors[key] = (
                                torch.nn.Parameter(fake, requires_grad=False)
                                if tensors is parent._parameters
                                else fake
                            )

        def columns(width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.empty(ROWS, width, dtype=dtype, device="cuda")

        context = columns(flow.context_dim) if flow.context_dim else None
        state = start(columns(1), columns(flow.dim), context)
        assert state.device.type == "cuda"
        clock, moved = step(columns(len(Clock)), columns(len(Span)), state, context)
        assert clock.device.type == moved.device.type == "cuda"
        assert (clock.shape, moved.shape, moved.dtype) == ((ROWS, len(Clock)), state.shape, precision)


def test_a_value_read_back_would_be_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(1, device="cuda").item()
