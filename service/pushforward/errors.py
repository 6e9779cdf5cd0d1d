"""Everything that Pushforward raises on purpose, as one tree.

    PushforwardError          internal-error      the root: catch this to catch them all
    ├── InvalidInput          invalid-input       a value that cannot be answered; ``where`` is its place
    ├── LimitExceeded         limit-exceeded      well formed, but more than is allowed; says how much is
    ├── NotFound              not-found           no such model, version or label; says which there are
    ├── Conflict              conflict            the request contradicts what exists already
    ├── InvalidModel          invalid-model       a stored version is broken or hostile; names the file
    ├── SolveFailed           solve-failed        an integration did not reach its end; says what to change
    ├── DeadlineExceeded      deadline-exceeded   the answer was not ready in time
    ├── Unauthorized          unauthorized        no key, or none that is known
    ├── Forbidden             forbidden           the key is known, and not for this; names the scope
    ├── QuotaExceeded         quota-exceeded      more than the key may ask for now; says which limit
    ├── Unavailable           unavailable         cannot take the work now; trying again later may help
    ├── TrainingFailed        training-failed     the loss diverged, or nothing could be learnt
    ├── PublishFailed         publish-failed      a version could not be written, or missed its own checks
    └── UsageError            usage-error         a command line or setting that makes no sense

An error is a sentence for a person, a stable ``code`` for a program, and a ``detail`` of JSON values
for whoever wants more. How an error is shown (a status code, an exit code) is decided where it is
shown. An error that crosses a process boundary travels as (code, message, detail): see ``from_code``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

__all__ = [
    "Conflict",
    "DeadlineExceeded",
    "Forbidden",
    "InvalidInput",
    "InvalidModel",
    "LimitExceeded",
    "NotFound",
    "PublishFailed",
    "PushforwardError",
    "QuotaExceeded",
    "SolveFailed",
    "TrainingFailed",
    "Unauthorized",
    "Unavailable",
    "UsageError",
    "brief",
    "from_code",
]


class PushforwardError(Exception):
    """The root of the tree.

    Args:
        message: one or two full sentences: what was wrong, and what would be right.
        detail: further facts as JSON values; copied.
    """

    code: ClassVar[str] = "internal-error"

    def __init__(self, message: str, *, detail: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail: dict[str, Any] = dict(detail or {})


class InvalidInput(PushforwardError):
    """A value that cannot be answered.

    Args:
        where: the place of the value, as a path (``x[3][1]``, ``rows[0].age``, ``rtol``) or a column name;
            kept in ``detail["where"]``.

    >>> InvalidInput("x[3][1] is not a number.", where="x[3][1]").where
    'x[3][1]'
    """

    code = "invalid-input"

    def __init__(
        self, message: str, *, where: str | None = None, detail: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, detail=_with(detail, where=where))

    @property
    def where(self) -> str | None:
        """The place of the value, or None when it is the input as a whole."""
        return self.detail.get("where")


class LimitExceeded(PushforwardError):
    """Well formed, but more than is allowed.

    Args:
        limit: the most that is allowed, in the unit the message names; kept in ``detail["limit"]``.
        where: as for ``InvalidInput``.
    """

    code = "limit-exceeded"

    def __init__(
        self,
        message: str,
        *,
        limit: float | None = None,
        where: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, detail=_with(detail, limit=limit, where=where))

    @property
    def limit(self) -> float | None:
        """The most that is allowed, if one number says it."""
        return self.detail.get("limit")


class NotFound(PushforwardError):
    """No such model, version or label.

    Args:
        known: what does exist, nearest first; kept in ``detail["known"]``.
    """

    code = "not-found"

    def __init__(
        self, message: str, *, known: Iterable[str] | None = None, detail: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, detail=_with(detail, known=None if known is None else list(known)))

    @property
    def known(self) -> list[str]:
        """What does exist."""
        return list(self.detail.get("known", ()))


class Conflict(PushforwardError):
    """The request contradicts what exists already, such as publishing a version twice."""

    code = "conflict"


class InvalidModel(PushforwardError):
    """A stored version that is truncated, edited, mislabelled or hostile.

    Args:
        file: the offending file; kept in ``detail["file"]``.
    """

    code = "invalid-model"

    def __init__(
        self, message: str, *, file: str | None = None, detail: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, detail=_with(detail, file=file))

    @property
    def file(self) -> str | None:
        """The offending file, if one file is to blame."""
        return self.detail.get("file")


class SolveFailed(PushforwardError):
    """An integration did not reach its end where every row was needed."""

    code = "solve-failed"


class DeadlineExceeded(PushforwardError):
    """The answer was not ready in time; the rows have left the batch."""

    code = "deadline-exceeded"


class Unauthorized(PushforwardError):
    """Nobody says who asks: there is no key, or none that is known and has not expired."""

    code = "unauthorized"


class Forbidden(PushforwardError):
    """The key is known, but not for this.

    Args:
        scope: the one that it lacks; kept in ``detail["scope"]``.
    """

    code = "forbidden"

    def __init__(
        self, message: str, *, scope: str | None = None, detail: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, detail=_with(detail, scope=scope))


class QuotaExceeded(PushforwardError):
    """More than a key may ask for now.

    Args:
        retry_after: as for ``Unavailable``.
    """

    code = "quota-exceeded"

    def __init__(
        self, message: str, *, retry_after: float | None = None, detail: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, detail=_with(detail, retry_after=retry_after))


class Unavailable(PushforwardError):
    """The work cannot be taken now.

    Args:
        retry_after: seconds after which trying again is sensible; kept in ``detail["retry_after"]``.
    """

    code = "unavailable"

    def __init__(
        self, message: str, *, retry_after: float | None = None, detail: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, detail=_with(detail, retry_after=retry_after))

    @property
    def retry_after(self) -> float | None:
        """Seconds after which trying again is sensible, if that is known."""
        return self.detail.get("retry_after")


class TrainingFailed(PushforwardError):
    """Training produced nothing that could be published."""

    code = "training-failed"


class PublishFailed(PushforwardError):
    """A version or label could not be written, or a version did not pass the checks of publishing."""

    code = "publish-failed"


class UsageError(PushforwardError):
    """A command line or a setting that makes no sense as given."""

    code = "usage-error"


def from_code(code: str, message: str, detail: Mapping[str, Any] | None = None) -> PushforwardError:
    """Rebuild an error from what crossed a process boundary; an unknown code becomes the root.

    >>> from_code("not-found", "There is no model 'moon'.", {"known": ["moons"]}).known
    ['moons']
    """
    # a subclass without a code of its own (of another room) is not what its parent's code means
    kinds = {kind.code: kind for kind in PushforwardError.__subclasses__() if "code" in vars(kind)}
    return kinds.get(code, PushforwardError)(message, detail=detail)


def brief(error: BaseException) -> str:
    """What a library said, fit to be told to anyone: its first line, without the folders of files.

    >>> brief(OSError("cannot open /srv/models/m/1/a.onnx: no memory"))
    'cannot open a.onnx: no memory'
    """
    line = str(error).strip().split("\n", 1)[0]
    return _FOLDERS.sub("", line)[:300]


_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/'\":,]+/)*(?=[^\s/'\":,])")


def _with(detail: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    return {**(detail or {}), **{key: value for key, value in named.items() if value is not None}}
