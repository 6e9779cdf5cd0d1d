"""What a fit tells while it runs: a live bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Check", "Lines", "Live", "Quiet", "Watch", "watch_for"]


@dataclass(frozen=True)
class Check:
    """One look at the validation rows.

    Attributes:
        step: after how many steps.
        loss: of that step's batch.
        held_out: mean log-density of the validation rows, nats, each clipped below at the 5th percentile.
    """

    step: int
    loss: float
    held_out: float


class Watch:
    """Is told of every step and check of a fit, between ``with`` and its end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take down what ``start`` put up."""

    def start(self, step: int, steps: int, history: Sequence[Check]) -> None:
        """The fit begins after ``step`` of ``steps``, with the checks made so far."""

    def step(self, step: int, loss: float) -> None:
        """A step was made."""

    def check(self, check: Check) -> None:
        """A check was made."""


class Quiet(Watch):
    """Says nothing."""


class Lines(Watch):
    """A line per check."""

    def __init__(self, console: Console) -> None:
        self.console, self.steps, self.first, self.began = console, 0, 0, 0.0

    def start(self, step: int, steps: int, history: Sequence[Check]) -> None:
        """See the class."""
        self.steps, self.first, self.began = steps, step, time.monotonic()

    def check(self, check: Check) -> None:
        """See the class."""
        rate = (check.step - self.first) / max(1e-9, time.monotonic() - self.began)
        left = (self.steps - check.step) / rate
        self.console.print(
            f"step {check.step}/{self.steps}  loss {check.loss:.4f}  "
            f"held-out log-density {check.held_out:.3f}  {rate:.0f} steps/s  {left:.0f} s left",
            highlight=False,
        )


class Live(Watch):
    """A bar with loss, held-out log-density, rate and time left."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]}  held-out log-density {task.fields[held_out]}  {task.fields[rate]}"
            ),
            TimeRemainingColumn(),
            console=console,
        )
        self.smooth = self.began = 0.0
        self.first = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        self.progress.stop()

    def start(self, step: int, steps: int, history: Sequence[Check]) -> None:
        """See the class."""
        best = f"{max(check.held_out for check in history):.3f}" if history else "-"
        self.task = self.progress.add_task(
            "training", total=steps, completed=step, loss="-", held_out=best, rate=""
        )
        self.first, self.began = step, time.monotonic()
        self.progress.start()

    def step(self, step: int, loss: float) -> None:
        """See the class."""
        self.smooth = loss if step == self.first + 1 else 0.98 * self.smooth + 0.02 * loss
        if step % 10 == 0:
            rate = (step - self.first) / max(1e-9, time.monotonic() - self.began)
            self.progress.update(
                self.task, completed=step, loss=f"{self.smooth:.4f}", rate=f"{rate:.0f} steps/s"
            )

    def check(self, check: Check) -> None:
        """See the class."""
        self.progress.update(self.task, completed=check.step, held_out=f"{check.held_out:.3f}")


def watch_for(console: Console) -> Watch:
    """A live bar on a terminal, lines elsewhere."""
    return Live(console) if console.is_terminal else Lines(console)
