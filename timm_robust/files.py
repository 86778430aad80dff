"""Files: written whole or not at all, exchanged in one step, locked, given further names, swept, read with bounds."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml

logger = logging.getLogger('timm_robust')

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK, WRITER = 'run.lock', '.lock'
_TEMPORARY = re.compile(r'\..+\.(\d{1,9})\.[0-9a-f]{8}\.tmp')
_YAML_BYTES, _YAML_LEVELS, _YAML_VALUES = 100_000, 20, 10_000


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
        try:
            return (None if root is None else loader.construct_document(root)), lines
        except (LookupError, AttributeError, TypeError) as error:  # PyYAML's, of a value that its tag does not fit
            raise ValueError(f'a value is not what its tag says ({type(error).__name__})') from None
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


def new_folder(path: Path) -> Path:
    """Make a folder of this name; where there is one already, whoever made it, another with -2, -3, ... behind it."""
    folder, number = path, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f'{path.name}-{number}')


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


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold a folder; whoever wants it meanwhile waits. Where there can be no lock nobody does. Not to be nested."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no such folder, a lock of somebody else, a disk without locks
            file = stack.enter_context(open(folder / WRITER, 'a', encoding='utf-8'))
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, atomically: a hard link, or a copy where the disk has none."""
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, 'rb') as old, atomic_file(target) as new:
            shutil.copyfileobj(old, new)
        return
    try:
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # of two names of one file a rename leaves both
            temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    """A hidden name beside a file, with this process's number, by which `sweep_temporaries` knows it."""
    return target.with_name(f'.{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp')


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power failure, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some network disks sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep_temporaries(folder: Path) -> None:
    """Delete the hidden files that killed processes left in a run's folder, half written.

    Files of a process that lives on this machine stay.
    """
    for path in folder.glob('.*'):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    """Whether another process has this number."""
    if pid == os.getpid() or os.name != 'posix':  # elsewhere, to ask is to kill
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_output(path: str | os.PathLike[str], is_older: Callable[[Path], bool] | None = None) -> None:
    """Refuse, before the work, a file that could not be written after it, or that would replace something else.

    Args:
        path: of the file.
        is_older: whether the file that stands there is of this kind; an empty one may always be replaced.

    Raises:
        OSError: if the folder is missing, or the disk refuses.
        FileExistsError: if another kind of file stands there.
    """
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        raise FileNotFoundError(f'cannot write {target}; type mkdir -p {target.parent}, and name a file there')
    if is_older and target.exists() and not (target.is_file() and (not target.stat().st_size or is_older(target))):
        raise FileExistsError(f'{target} is something else, and stays; name another file, or delete it')
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f'.{target.name}.') as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise OSError(f'cannot write {target}: {error.strerror}; name a file in a folder that can be written') from None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], size: int | None = None) -> Iterator[IO[bytes]]:
    """Open a binary file beside path that takes its place when the body ends, and vanishes if it fails.

    What stands there is the old file or the new one, whole, even if power fails meanwhile.

    Args:
        path: of the file.
        size: about how many bytes it will have, for the message.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if the disk refuses (full, read-only), naming the file.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f'folder {str(target.parent)!r} does not exist; type: mkdir -p {target.parent}')
    temporary = _temporary(target)
    try:
        with open(temporary, 'xb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):  # a failed write knows no file
            told = '' if size is None else f'; it needs about {size:,} bytes'
            with contextlib.suppress(OSError):  # the folder may be gone
                told += f'; {shutil.disk_usage(target.parent).free:,} bytes are free'
            raise OSError(f'cannot write {target}: {error.strerror or error}{told}') from error
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A text in UTF-8 as `atomic_file` writes it: the file is the old one or the whole new one."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside path that takes its place when the body ends, and vanishes if it fails.

    Where the system cannot exchange two names in one step, a kill between two renames leaves the old folder under a
    hidden name beside it, where `recover_folder` finds it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
    new, old = temporary / 'new', temporary / 'old'
    try:
        new.mkdir()
        yield new
        for file in filter(Path.is_file, new.rglob('*')):
            with open(file, 'rb' if os.name == 'posix' else 'r+b') as written:  # Windows syncs what can be written
                os.fsync(written.fileno())
        if not target.exists():
            new.rename(target)
        elif not _exchange(new, target):
            target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                old.rename(target)
                raise
    finally:
        if target.exists() or not old.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Give a folder its name back that an `atomic_folder` killed between two renames took from it."""
    for old in sorted(target.parent.glob(f'.{glob.escape(target.name)}.*/old')):
        if not target.exists():
            old.rename(target)
            shutil.rmtree(old.parent, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change their names in one step, where the system can (Linux, on most disks)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # no such function, or Windows
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)
