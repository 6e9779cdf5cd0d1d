"""What an engine has done, in numbers: fills ``messages.Counts``."""

from __future__ import annotations

from bisect import bisect_left

from pushforward.engine.request import Answer
from pushforward.messages import NFE, OCCUPANCY, STEP_SECONDS, Counts

__all__ = ["count_rows", "count_step"]


def count_step(counts: Counts, rows: int, seconds: float) -> None:
    """Count a step of a batch."""
    counts.step_seconds[bisect_left(STEP_SECONDS, seconds)] += 1
    counts.step_seconds_sum += seconds
    counts.occupancy[bisect_left(OCCUPANCY, rows)] += 1
    counts.occupancy_sum += rows


def count_rows(counts: Counts, answer: Answer) -> None:
    """Count the rows of an answer.

    Lists, not arrays: chunks of one row are what must be fast, and few numbers are distinct in the others.
    """
    nfes, statuses = answer.nfe.tolist(), answer.status.tolist()
    for nfe in set(nfes):
        counts.nfe[bisect_left(NFE, nfe)] += nfes.count(nfe)
    counts.nfe_sum += sum(nfes)
    for status in set(statuses):
        counts.status[status] = counts.status.get(status, 0) + statuses.count(status)
    accepted = sum(answer.accepted.tolist())
    counts.accepted += accepted
    counts.rejected += sum(answer.steps.tolist()) - accepted
