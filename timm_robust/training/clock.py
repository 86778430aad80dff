"""How far a run is: by steps, or by the time on the wall."""

from __future__ import annotations

import math
import re
import time
from statistics import median


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

    Without a budget it is step / total_steps. With one it grows with the seconds of training, and stands still through
    everything else: start-up, reading, compilation, validation, saving. Whenever training goes on, what is left of the
    schedule is spread evenly over what is left of the budget for training. So the share is 0 at the first step, never
    jumps, and reaches 1 in time, whatever the machine's speed and however often the run was resumed.

    Args:
        total_steps: steps of the whole run, where there is no budget.
        budget: seconds of the whole run, everything included; None for none.
        spent: seconds that earlier sessions took.

    Attributes:
        validations: seconds that each validation took, with saving.
        breaks: seconds that were no training, from each validation to the next.
        estimated: seconds that the last validation may take, with saving, until one like it was timed.
        saving: seconds of the save before it.
        interval: seconds of training between two validations; 0: not known.
        last_step: seconds that the last step may take.
    """

    def __init__(self, total_steps: int, budget: float | None = None) -> None:
        self.total_steps, self.budget, self.spent = total_steps, budget, 0.0
        self.validations: list[float] = []
        self.breaks: list[float] = []
        self.interval = self.last_step = self.estimated = self.saving = 0.0
        self.started = time.perf_counter()
        self._share = 0.0  # when training went on last
        self._since: float | None = None  # then; None: the clock is stopped
        self._seconds = 0.0  # that were left for training then
        self._stopped: float | None = None  # when it was stopped last, start-up aside
        self._break = self._trained = 0.0  # seconds that were no training, and those that were, since a validation

    def elapsed(self) -> float:
        """Seconds spent, in this session and those before."""
        return self.spent + time.perf_counter() - self.started

    def restart(self, spent: float, share: float | None = None) -> None:
        """Stop, and count this session from now on, behind so many seconds and that share of the schedule.

        A share of None is that of the seconds in the budget, as checkpoints without a share had it.
        """
        self.spent, self.started, self._since, self._stopped = spent, time.perf_counter(), None, None
        self._break = self._trained = 0.0
        if share is None:
            share = min(spent / self.budget, 1.0) if self.budget else 0.0
        self._share = share

    def go(self) -> None:
        """Training goes on, unless it does so already."""
        if self._since is None:
            self._note_break()
            self._since, self._seconds, self._stopped = time.perf_counter(), self.training_seconds(), None

    def stop(self) -> None:
        """What follows is no training."""
        if self._since is not None:
            self._trained += time.perf_counter() - self._since
        self._share, self._since = self._passed(), None
        if self._stopped is None:
            self._stopped = time.perf_counter()

    def expect(self, validation: float, saving: float, interval: float) -> None:
        """What is known before the first validation: seconds of the last one, of a save, of training between two."""
        self.estimated, self.saving, self.interval = validation + saving, saving, interval
        self.breaks.append(self.estimated)  # at most: a thread writes

    def note_validation(self, seconds: float, interval: float, like_the_last: bool = True) -> None:
        """A validation has ended.

        Args:
            seconds: that it took, with saving.
            interval: seconds of training from one to the next, as fast as training is now.
            like_the_last: whether the last one of the run does the same, on images of the same size: its estimate has
                had its day.
        """
        self._note_break()
        self.estimated = 0.0 if like_the_last else self.estimated
        self.validations.append(seconds)
        self.breaks.append(self._break)
        self.interval, self._break, self._trained = interval, 0.0, 0.0

    def _note_break(self) -> None:
        """Count the time since the clock was stopped."""
        if self._stopped is not None:
            now = time.perf_counter()
            self._break, self._stopped = self._break + now - self._stopped, now

    def training_seconds(self, elapsed: float | None = None) -> float:
        """Seconds left for training after those elapsed: without the breaks to come, and what ends the run.

        A validation that would leave no time for another step is taken for the last one.
        """
        if self.budget is None:
            return math.inf
        left = self.budget - (self.elapsed() if elapsed is None else elapsed) - self.closing
        if self.breaks and self.interval:
            pause = median(self.breaks)
            left += self._trained  # as if the last validation had just ended
            count = max(left, 0.0) // (self.interval + pause)
            left = min(left - count * pause, (count + 1) * self.interval) - self._trained
        return max(left, 0.0)

    @property
    def closing(self) -> float:
        """Seconds from where the share reaches 1 to the end of the run: a tenth more than the longest validation."""
        return self.last_step + 1.1 * (max(*self.validations, self.estimated, 0.0) + self.saving)

    def _passed(self) -> float:
        """The share by the clock."""
        if self._since is None:
            return self._share if self.training_seconds() > 0 else 1.0
        trained = time.perf_counter() - self._since
        return self._share + (1 - self._share) * trained / self._seconds if trained < self._seconds else 1.0

    def progress(self, step: int) -> float:
        """The share that is done before this step."""
        return step / self.total_steps if self.budget is None else self._passed()

    def left(self, step: int, steps_per_second: float) -> float:
        """Estimated seconds to the end of the last step."""
        if self.budget is not None:
            return max(self.budget - self.closing - self.elapsed(), 0.0)
        return (self.total_steps - step) / steps_per_second
