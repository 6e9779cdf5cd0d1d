"""What a request body must be. The checks and the OpenAPI document are both made from these models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, FailFast, Field, Tag
from pydantic.types import JsonValue

from pushforward.dataplane import Options
from pushforward.noise import MAX_SEED

__all__ = ["AnomalyRequest", "DensityRequest", "SampleRequest", "TransportRequest"]


class _FailFast(FailFast):
    """The first fault ends the check, however many a large body has."""

    __hash__ = object.__hash__  # so that the types it marks may stand in a union


# A number is a JSON number: neither "1.5" nor true. NaN and infinities pass here, to be refused afterwards
# with the names of their columns.
Row = Annotated[list[float], _FailFast()]
Matrix = Annotated[list[Row], _FailFast()]
NamedRow = Annotated[dict[str, float], _FailFast()]
NamedRows = Annotated[list[NamedRow], _FailFast()]


def _form(rows: Any) -> str:
    """Which form of rows was meant, so that a fault is reported for that one alone."""
    return "names" if isinstance(rows, list) and rows and isinstance(rows[0], dict) else "numbers"


EitherRows = Annotated[
    Annotated[Matrix, Tag("numbers")] | Annotated[NamedRows, Tag("names")], Discriminator(_form)
]


def _one_of(*names: str) -> dict[str, JsonValue]:
    """JSON schema: exactly one of these lists is given, and no field that is not declared."""
    forms: list[JsonValue] = [
        {
            "required": [one],
            "properties": {name: {"type": "array" if name == one else "null"} for name in names},
        }
        for one in names
    ]
    return {"additionalProperties": False, "oneOf": forms}


class _Request(Options):
    # Unknown fields are refused by ``wire``: pydantic would make an error of each, however many there are.
    model_config = ConfigDict(extra="allow")

    context: EitherRows | None = None
    """For a conditional model: one row for all, or one for each; numbers in order, or named."""


class _RowsRequest(_Request):
    x: Matrix | None = None
    """Rows of numbers, in the order of the model's features."""
    rows: NamedRows | None = None
    """Rows that name their numbers, in any order; instead of ``x``."""


class DensityRequest(_RowsRequest):
    """Rows to find the log-density of."""

    model_config = ConfigDict(
        json_schema_extra=_one_of("x", "rows") | {"examples": [{"x": [[0.5, 0.25], [1.0, -0.5]]}]}
    )


class AnomalyRequest(_RowsRequest):
    """Rows to score."""

    model_config = ConfigDict(
        json_schema_extra=_one_of("x", "rows")
        | {"examples": [{"x": [[0.5, 0.25]], "alpha": 0.01, "explain": True}]}
    )

    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of ordinary rows that may be flagged: a row is when its p-value ≤ alpha. 0.01 by default."""
    fdr: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of alpha: flag by Benjamini–Hochberg over these rows, at this false discovery rate."""
    two_sided: bool = False
    """Whether rows that are too likely count as unusual as well as those that are too unlikely."""
    explain: bool = False
    """Whether to say how much more likely each row would be were one of its features typical."""


class SampleRequest(_Request):
    """How many samples, and of what kind."""

    model_config = ConfigDict(
        json_schema_extra={
            "additionalProperties": False,
            "examples": [{"n": 3, "seed": 7, "return_log_density": True}],
        }
    )

    n: Annotated[int, Field(ge=1)] = 1
    """How many."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Equal requests with equal seeds give equal samples, a smaller n the first ones; fresh by default."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Standard deviation of the base noise: below 1, samples nearer to the modes."""
    return_log_density: bool = False
    """Whether to answer log p of the samples too. Its tolerance then has a say in the steps, and so in the
    last digits of the samples."""


class TransportRequest(_RowsRequest):
    """Points to carry from data to base (``x`` or ``rows``) or from base to data (``z``)."""

    model_config = ConfigDict(
        json_schema_extra=_one_of("x", "rows", "z")
        | {"examples": [{"x": [[0.5, 0.25]]}, {"z": [[0.0, 1.0]], "times": [0.0, 0.5, 1.0]}]}
    )

    z: Matrix | None = None
    """Points of the base distribution."""
    times: Annotated[list[float], Field(min_length=1, max_length=10_000)] | None = None
    """Times of the flow at which to answer where the points are, instead of where they end."""
    return_log_density: bool = False
    """Whether to answer log p of the points at the data end too; not with ``times``."""
