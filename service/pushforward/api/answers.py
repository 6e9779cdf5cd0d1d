"""What an answer is. The OpenAPI document is made from these models.

Answers are written straight from arrays, without passing through them; the tests hold every answer
to its model.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "AnomalyAnswer",
    "DensityAnswer",
    "Health",
    "ModelAnswer",
    "ModelList",
    "PathAnswer",
    "Problem",
    "SampleAnswer",
    "TransportAnswer",
    "VersionState",
]

RowStatus = Literal[
    "ok", "max_steps", "step_underflow", "nonfinite", "outside_support", "cancelled", "deadline"
]
Number = float | None


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)


class Failure(_Answer):
    """A row without an answer, and what would help."""

    row: int
    """Its number, from 0."""
    time: int | None = None
    """For a path: the number of the time, from 0."""
    status: RowStatus
    detail: str
    """What happened, and what to change."""
    t: float
    """The time it had reached."""


class _Solved(_Answer):
    model: str
    version: int
    status: list[RowStatus]
    """How each row ended. One that is not "ok" has null for its values; "outside_support" means density 0."""
    failures: list[Failure]
    """More about the rows that are not "ok"."""
    steps: list[int]
    """Attempted steps of each row."""
    nfe: list[int]
    """Evaluations of the vector field for each row."""


class DensityAnswer(_Solved):
    """Log-densities."""

    exact: bool
    """Whether the divergence was integrated exactly, rather than estimated."""
    log_density: list[Number]
    """log p(x) in nats, in the units of the raw data. Null for a row that failed, and for one that is
    "outside_support": its density is 0 and the logarithm −∞, which JSON cannot write."""
    error_estimate: list[Number]
    """Sum of the local errors of the log-density, in nats."""


class AnomalyAnswer(DensityAnswer):
    """Anomaly scores."""

    score: list[Number]
    """−log p(x) in nats; null where ``log_density`` is."""
    p_value: list[Number]
    """Conformal p-value against held-out rows; null for a row that failed."""
    is_anomaly: list[bool | None]
    """Whether the p-value is small enough; null for a row that failed."""
    alpha: float | None
    """The level, if rows were flagged by it."""
    fdr: float | None
    """The false discovery rate, if rows were flagged by it."""
    smallest_p_value: float
    """The least p-value that the calibration rows can give; a lower level flags nothing."""
    features: list[str] | None = None
    """Names of the columns of ``attributions``."""
    attributions: list[list[Number]] | None = None
    """How many nats more likely the row would be were this one feature typical; null where that is unbounded,
    because the feature alone puts the row outside the support, and where it could not be found."""


class SampleAnswer(_Solved):
    """Samples."""

    seed: int
    """Ask with it again to have the same samples."""
    features: list[str]
    """Names of the columns of ``x``."""
    x: list[list[float] | None]
    """Samples in raw units; null for a row that failed."""
    log_density: list[Number] | None = None
    """log p(x) in nats, if it was asked for."""


class TransportAnswer(_Solved):
    """Where points end."""

    z: list[list[float] | None] | None = None
    """Base points, when data was given; null for a row that failed or is outside the support."""
    x: list[list[float] | None] | None = None
    """Data points in raw units, when base points were given."""
    log_density: list[Number] | None = None
    """log p of the data points in nats, if it was asked for."""


class PathAnswer(_Answer):
    """Where points are on their way."""

    model: str
    version: int
    times: list[float]
    path: list[list[list[float] | None]]
    """For each row, for each time: the point in flow coordinates, which are those after the model's
    transform; null where it failed."""
    status: list[list[RowStatus]]
    """For each row, for each time."""
    failures: list[Failure]


State = Literal["loading", "ready", "failed", "unloaded"]


class VersionSummary(_Answer):
    """A version, in a list."""

    version: int
    labels: list[str]
    state: State
    """What the workers say of it: ready when one of them has it."""
    reason: str
    """Why it failed to load; "" unless it did."""


class VersionState(_Answer):
    """What has become of a version after an order to load or unload it."""

    model: str
    version: int
    state: State
    """What the workers say of it now; the order is carried out in the background."""
    reason: str
    """Why it failed to load; "" unless it did."""


class ModelSummary(_Answer):
    """A model, in a list."""

    name: str
    version: int | None
    """The default version: the one labelled "stable", or else the newest."""
    versions: list[VersionSummary]
    features: list[str]
    context_features: list[str]
    description: str
    fault: str | None = None
    """Why the model cannot be used, if it cannot."""


class ModelList(_Answer):
    """The models of the store."""

    models: list[ModelSummary]


class ModelAnswer(ModelSummary):
    """One version of a model: what its manifest says."""

    created: str
    exact: bool
    """Whether log-densities are exact up to solver error."""
    divergence: Literal["closed_form", "forward_mode", "hutchinson"]
    t_base: float
    t_data: float
    solver: dict[str, Any]
    """Defaults of the integration."""
    certificate: dict[str, Any]
    """Error of log p, measured at publishing."""
    calibration_rows: int
    smallest_p_value: float
    """The least p-value that the calibration rows can give."""
    metrics: dict[str, float]
    training: dict[str, Any]
    data: dict[str, Any]


class Health(_Answer):
    """State of the server."""

    status: Literal["live", "ready"]


class Problem(_Answer):
    """An error, as RFC 9457 has it (application/problem+json)."""

    model_config = ConfigDict(extra="allow")

    type: str
    """A URI for the kind of error: ``urn:pushforward:error:`` and the code."""
    title: str
    status: int
    """The HTTP status."""
    detail: str
    """What was wrong, and what would be right."""
    code: str
    """The kind of error, for programs."""
    where: str | None = None
    """The place in the request, such as ``x[3][1]``, ``rows[0].age`` or ``rtol``."""
    request_id: str
    """The id under which the server logged the request; also in the header ``X-Request-Id``."""
