"""Writing in a thread, while training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

logger = logging.getLogger('timm_robust')


class Writer:
    """One job at a time in a thread; what goes wrong there is raised where the next job, or the end, waits for it.

    `with writer:` ends when the last job has; the program itself does not exit before.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, 'writer')
        self.job: Future[None] | None = None
        self.seconds = 0.0
        """What the last job took."""

    def start(self, work: Callable[[], None]) -> None:
        """Begin a job, when the one before has ended.

        Raises:
            Exception: whatever the job before raised.
        """
        self.wait()
        self.job = self.pool.submit(self._time, work)

    def wait(self) -> None:
        """Wait for the job, if there is one.

        Raises:
            Exception: whatever it raised.
        """
        job, self.job = self.job, None
        if job is not None:
            job.result()

    def check(self) -> None:
        """Raise what went wrong with a job that has ended; waits for nothing."""
        if self.job is not None and self.job.done():
            self.wait()

    def __enter__(self) -> Writer:
        """The writer itself."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for the job; another exception on its way goes first."""
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            logger.warning('%s', error)

    def _time(self, work: Callable[[], None]) -> None:
        started = time.perf_counter()
        work()
        self.seconds = time.perf_counter() - started
