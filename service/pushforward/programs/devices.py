"""Which devices ONNX Runtime can use here.

ONNX Runtime is imported only where a GPU is in question: the HTTP process does without its 40 MB.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pushforward.errors import UsageError

__all__ = ["check_devices", "gpus", "provider"]

_CUDA = "CUDAExecutionProvider"
_GPUS = Path("/proc/driver/nvidia/gpus")


def gpus() -> list[str]:
    """The CUDA devices that can be used: those the driver lists, if this ONNX Runtime is built for CUDA."""
    if not _GPUS.is_dir() or not _cuda_is_built_in():
        return []
    return [f"cuda:{number}" for number in range(len(list(_GPUS.iterdir())))]


def check_devices(devices: Iterable[str]) -> None:
    """Refuse devices that cannot be used here.

    Raises:
        UsageError: naming the device and what it needs.
    """
    for device in devices:
        if device == "cpu":
            continue
        if not _cuda_is_built_in():
            raise UsageError(
                f"The device {device} needs ONNX Runtime for CUDA, and this one can use the CPU only: "
                "pip uninstall onnxruntime, then pip install 'pushforward[gpu]'."
            )
        found = gpus()
        if device not in found:
            there = ", ".join(found) or "no GPU"
            raise UsageError(f"There is no device {device}: the driver lists {there}.")


def provider(device: str) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's execution provider of a device, with its options.

    Raises:
        UsageError: when the device cannot be used here.
    """
    if device == "cpu":
        return "CPUExecutionProvider", {}
    check_devices([device])
    return _CUDA, {"device_id": device.removeprefix("cuda:"), "use_tf32": "0"}


def _cuda_is_built_in() -> bool:
    import onnxruntime

    return _CUDA in onnxruntime.get_available_providers()
