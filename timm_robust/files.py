"""Files of a run: written while training goes on, given further names, swept when their process was killed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_TEMPORARY = re.compile(r'\.(?:.+\.pth\.tar\.(\d{1,9})\.tmp|(?:args\.yaml|summary\.csv|wandb_id\.txt)\.\w+)')
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


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, atomically: a hard link, or a copy where the disk has none."""
    temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, 'rb') as old, open(temporary, 'wb') as new:
                shutil.copyfileobj(old, new)
                new.flush()
                os.fsync(new.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # of two names of one file a rename leaves both
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power failure, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some network disks sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep_temporaries(folder: str | Path) -> list[Path]:
    """Delete the hidden files that killed processes left in a run's folder, half written.

    Returns:
        What was deleted; files of a process that lives on this machine stay.
    """
    removed = []
    for path in Path(folder).glob('.*'):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or (match[1] and _is_alive(int(match[1]))):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(path)
    return removed


def _is_alive(pid: int) -> bool:
    """Whether another process has this number."""
    if pid == os.getpid() or os.name != 'posix':  # elsewhere, to ask is to kill
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
