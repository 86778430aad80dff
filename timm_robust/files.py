"""Files of a run: written while training goes on, given further names, swept when their process was killed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

import yaml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = 'run.lock'
_TEMPORARY = re.compile(r'\.(?:.+\.pth\.tar\.(\d{1,9})\.tmp|(?:args\.yaml|summary\.csv|wandb_id\.txt)\.\w+)')
_YAML_BYTES, _YAML_LEVELS, _YAML_VALUES = 100_000, 20, 10_000
logger = logging.getLogger('timm_robust')


class _Loader(yaml.SafeLoader):
    """PyYAML's, which stops at a depth rather than at the end of Python's stack."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.level += 1
        if self.level > _YAML_LEVELS:
            raise ValueError(f'more than {_YAML_LEVELS} levels of nesting')
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def read_yaml(path: str | Path) -> tuple[Any, dict[str, int]]:
    """What a YAML file says (None if nothing), and the line of each key on its first level. No code in it runs.

    Raises:
        FileNotFoundError: if there is no such file; it lists those in the folder.
        IsADirectoryError: if it is a folder.
        ValueError: naming file and line: for what is no YAML, a key given twice, and more bytes, levels or values than
            a person writes, a value counted as often as an alias repeats it.
    """
    path = Path(path)
    if not path.exists():
        others = ', '.join(sorted(file.name for file in path.parent.glob('*.yaml'))) or 'no .yaml file'
        raise FileNotFoundError(f'{path} does not exist; its folder holds {others}')
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a directory; name a file in it')
    with open(path, 'rb') as file:
        content = file.read(_YAML_BYTES + 1)
    if len(content) > _YAML_BYTES:
        raise ValueError(f'{path} has more than {_YAML_BYTES:,} bytes; it is no file of settings')
    try:
        loader = _Loader(content.decode('utf-8-sig'))
        root = loader.get_single_node()
        lines = _check_nodes(root)
        return (None if root is None else loader.construct_document(root)), lines
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not a text file in UTF-8: {error}') from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, 'problem_mark', None)
        line = f':{mark.line + 1}' if mark else ''
        raise ValueError(f'{path}{line}: not valid YAML: {getattr(error, "problem", None) or error}') from None


def _check_nodes(root: yaml.Node | None) -> dict[str, int]:
    """Refuse keys that are given twice and what aliases repeat too often; the line of each key of the root."""
    lines: dict[str, int] = {}
    stack, seen = [] if root is None else [(root, 1)], 0
    while stack:
        node, level = stack.pop()
        seen += 1
        if seen > _YAML_VALUES or level > _YAML_LEVELS:
            raise ValueError(f'more than {_YAML_VALUES:,} values with what its aliases repeat; write them out')
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            keys: set[Any] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in keys:
                    problem = f'key {key.value!r} is given twice'
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                keys.add(key.value)
                if node is root:
                    lines[key.value] = key.start_mark.line + 1
            parts = [part for pair in node.value for part in pair]
        if not isinstance(node, yaml.ScalarNode):
            stack += [(part, level + 1) for part in parts]
    return lines


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


def new_folder(path: Path) -> Path:
    """Make a folder of this name; where there is one already, whoever made it, another with -2, -3, ... behind it."""
    for suffix in chain([''], (f'-{number}' for number in count(2))):
        folder = path.with_name(path.name + suffix)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError('count has no end')


def lock_folder(folder: Path) -> IO[str] | None:
    """Hold a run's folder until the file that is returned is closed, or the process ends, in whatever way.

    The lock belongs to the process alone, not to the workers that it forks; the file tells others who holds it.

    Returns:
        The open file; None, with a warning, where the disk knows no locks.

    Raises:
        BlockingIOError: if another process holds it, with its host, number and start.
    """
    file = open(folder / LOCK, 'a+', encoding='utf-8')  # noqa: SIM115  # it is the lock
    try:
        if fcntl is None:
            raise OSError('this system has no such locks')
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or 'another process'
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(
                f'{folder} is held by {holder}; wait for its end (then --resume auto), stop it, or name another '
                '--experiment'
            ) from None
        logger.warning('%s cannot be locked (%s): let no other run write there', folder, error)
        return None
    with contextlib.suppress(OSError):  # of a full disk: it only tells
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
        file.flush()
    return file


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
