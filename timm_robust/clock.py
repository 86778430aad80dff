"""How far a run is: by steps, or by the time on the wall."""

from __future__ import annotations

import re
import time


def parse_duration(text: str) -> float:
    """Seconds in '25m', '1.5h', '1h30m', '90s' or '90'.

    Raises:
        ValueError: for anything else, and for no time at all.
    """
    number = r'(\d+(?:\.\d*)?)'
    match = re.fullmatch(rf'(?:{number}h)?(?:{number}m)?(?:{number}s?)?', text.strip().lower())
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if not seconds > 0:
        raise ValueError(f"{text!r} is no time; write for example '25m', '1.5h', '1h30m' or '90s'")
    return seconds


class Clock:
    """The share of a run that is done, in [0, 1]; schedules of rate, eps and attack steps follow it.

    Without a budget it is step / total_steps. With one it is time spent / (budget - reserve), over all sessions of the
    run: the schedule reaches its end on time whatever the machine's speed.

    Args:
        total_steps: steps of the whole run, where there is no budget.
        budget: seconds of the whole run, everything included; None for none.
        spent: seconds that earlier sessions took.
    """

    def __init__(self, total_steps: int, budget: float | None = None, spent: float = 0.0) -> None:
        self.total_steps, self.budget, self.spent, self.reserve = total_steps, budget, spent, 0.0
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds spent, in this session and those before."""
        return self.spent + time.perf_counter() - self.started

    def restart(self, spent: float) -> None:
        """Count this session from now on, behind so many seconds."""
        self.spent, self.started = spent, time.perf_counter()

    def keep(self, seconds: float) -> None:
        """Keep so much of the budget for what comes after the last step: validation and saving."""
        self.reserve = max(self.reserve, seconds)

    def progress(self, step: int) -> float:
        """The share that is done before this step."""
        if self.budget is None:
            return step / self.total_steps
        return min(self.elapsed() / max(self.budget - self.reserve, 1e-9), 1.0)

    def done(self, step: int) -> bool:
        """Whether the run is over."""
        return self.progress(step) >= 1

    def left(self, step: int, steps_per_second: float) -> float:
        """Estimated seconds to the end of the last step."""
        if self.budget is not None:
            return max(self.budget - self.reserve - self.elapsed(), 0.0)
        return (self.total_steps - step) / steps_per_second
