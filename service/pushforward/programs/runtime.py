"""Run ONNX programs: the one place that knows ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pushforward.errors import InvalidModel, UsageError, brief
from pushforward.programs.devices import provider

__all__ = ["Program"]

Matrix = NDArray[np.floating]


class Program:
    """An ONNX graph with a dynamic batch dimension, run on one thread.

    One thread, because rows are what is parallel here: processes share the rows, not the products.  The CPU
    arena is on: without it the wide tensors of 64 rows and more are fresh pages in every run.

    Args:
        data: the serialised graph; from memory, so that it cannot refer to other files.
        name: for messages.
        multiple: batches are padded to a multiple of this, where a row's bits need it.
        device: ``cpu`` or ``cuda:<number>``.
    """

    def __init__(self, data: bytes, name: str, multiple: int = 1, device: str = "cpu") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # a graph from memory would otherwise look for external data in the working folder
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
        wanted = provider(device)
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=[wanted])
        except Exception as error:
            raise InvalidModel(
                f"{name} is not a program that ONNX Runtime can load: {brief(error)}"
            ) from error
        if self._session.get_providers()[0] != wanted[0]:  # it falls back on the CPU without an error
            raise UsageError(
                f"ONNX Runtime cannot use the device {device}: it could not start its {wanted[0]}. "
                "Are CUDA and cuDNN installed in the versions that it was built for?"
            )
        self.name = name
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.multiple = multiple

    def __call__(self, *inputs: Matrix) -> list[Matrix]:
        """Run the program on matrices of B rows each; the results are new arrays of B rows."""
        rows = len(inputs[0])
        padding = -rows % self.multiple
        if padding:
            inputs = tuple(np.concatenate([a, np.repeat(a[-1:], padding, axis=0)]) for a in inputs)
        outputs: Sequence[Matrix] = self._session.run(None, dict(zip(self.inputs, inputs, strict=True)))
        return [a[:rows] for a in outputs] if padding else list(outputs)
