"""Devices that are not there are refused by name, before anything is started."""

import subprocess
import sys
from pathlib import Path

import pytest

from pushforward.errors import UsageError
from pushforward.programs import devices


def test_the_processor_is_always_there() -> None:
    devices.check_devices(["cpu", "cpu"])
    assert devices.provider("cpu") == ("CPUExecutionProvider", {})


def test_a_gpu_without_the_runtime_for_it_is_refused_with_what_to_install() -> None:
    with pytest.raises(UsageError, match=r"cuda:0 needs ONNX Runtime for CUDA.*pushforward\[gpu\]"):
        devices.check_devices(["cuda:0"])


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_cuda_is_built_in", lambda: True)
    with pytest.raises(UsageError, match="no device cuda:0: the driver lists no GPU"):
        devices.check_devices(["cuda:0"])
    for bus in ("0000:3b:00.0", "0000:af:00.0"):
        (tmp_path / bus).mkdir()
    monkeypatch.setattr(devices, "_GPUS", tmp_path)
    assert devices.gpus() == ["cuda:0", "cuda:1"]
    devices.check_devices(["cuda:1"])
    with pytest.raises(UsageError, match="no device cuda:2: the driver lists cuda:0, cuda:1"):
        devices.check_devices(["cuda:2"])


def test_the_command_refuses_a_device_at_its_start() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pushforward.cli", "serve", "--port", "0", "--device", "cuda:0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "cuda:0 needs ONNX Runtime for CUDA" in done.stderr.replace("\n", " ")
