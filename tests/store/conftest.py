"""Small but valid versions of models, for tests that read, label and damage them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushforward.scoring.calibration import Calibration
from pushforward.store.catalog import Catalog

WriteVersion = Callable[..., Path]


def document(name: str = "moons", version: int = 1, files: dict[str, bytes] | None = None) -> dict[str, Any]:
    """A manifest as JSON values."""
    contents = {"MODEL_CARD.md": b"", "calibration.safetensors": b"", "golden.safetensors": b""}
    contents |= {"weights.safetensors": b"", "programs/encode.onnx": b"", "programs/decode.onnx": b""}
    contents |= files or {}
    return {
        "format_version": 1,
        "name": name,
        "version": version,
        "created": "2026-01-31T12:00:00+00:00",
        "description": "Two interleaved half circles.",
        "features": ["x", "y"],
        "context_features": [],
        "t_base": 0.0,
        "t_data": 1.0,
        "solver": {
            "method": "dopri5",
            "rtol": 1e-5,
            "atol": 1e-5,
            "logp_atol": 1e-4,
            "precision": "float32",
            "dt_data_to_base": 0.1,
            "dt_base_to_data": 0.05,
            "max_steps": 1000,
        },
        "divergence": "closed_form",
        "programs": {"encode": "programs/encode.onnx", "decode": "programs/decode.onnx"},
        "method_stages": 6,
        "files": {
            path: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for path, content in contents.items()
        },
        "certificate": {
            "rows": 100,
            "reference": "float64, dopri8, rtol = atol = 1e-10",
            "p50": 1e-5,
            "p99": 1e-4,
            "p999": 2e-4,
            "max": 3e-4,
            "share_within_1e3": 1.0,
            "steps_mean": 7.5,
            "steps_max": 12,
            "created_on": "x86_64",
        },
        "calibration_rows": 50,
        "metrics": {"held_out_log_density": -0.9},
        "training": {"objective": "flow matching", "seed": 0, "epochs": 10, "ot": True, "note": None},
        "data": {"source": "generator", "licence": "Apache-2.0", "rows": 1000},
    }


@pytest.fixture
def manifest_document() -> Callable[..., dict[str, Any]]:
    return document


@pytest.fixture
def write_version(tmp_path: Path) -> WriteVersion:
    """write_version(name, version, folder=None, extra=None, **fields) → the folder of the new version.

    ``folder`` puts it elsewhere than its manifest says, ``extra`` adds files that the manifest lists, and
    ``fields`` replace fields of the manifest.
    """

    def write(
        name: str = "moons",
        version: int = 1,
        folder: str | None = None,
        extra: dict[str, bytes] | None = None,
        **fields: Any,
    ) -> Path:
        random = np.random.default_rng([version, *name.encode()])
        target = tmp_path / "store" / (folder or f"{name}/{version}")
        (target / "programs").mkdir(parents=True)
        calibration = target / "calibration.safetensors"
        Calibration.from_rows(random.normal(size=50), random.normal(size=(50, 2))).save(calibration)
        files = {
            "calibration.safetensors": calibration.read_bytes(),
            "golden.safetensors": random.bytes(100),
            "weights.safetensors": random.bytes(200),
            "programs/encode.onnx": random.bytes(300),
            "programs/decode.onnx": random.bytes(300),
            "MODEL_CARD.md": b"# Moons\n",
            **(extra or {}),
        }
        for path, content in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(content)
        (target / "manifest.json").write_text(json.dumps(document(name, version, files) | fields))
        return target

    return write


@pytest.fixture
def catalog(tmp_path: Path, write_version: WriteVersion) -> Catalog:
    """moons 1, 2, 10 and wine 1."""
    for version in (1, 2, 10):
        write_version("moons", version)
    write_version("wine", 1)
    return Catalog(tmp_path / "store")
