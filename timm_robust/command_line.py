"""The edge of every command: what its user did wrong is one line and status 2, a fault of ours a traceback."""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import difflib
import functools
import io
import multiprocessing
import os
import platform
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

_INPUT = (ValueError, OSError, ImportError, MemoryError)


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Make a function of argv the main of a command: the one place that turns errors into an exit status.

    ValueError, OSError (no file, no connection, no process), ImportError (a library of the extras) and a lack of memory
    are what this package raises for its input, with a text that says what was given, what is allowed and what to
    type: 'error: ...' on one line of stderr, and status 2, as for argparse's own errors. Everything else, such as a
    TypeError, KeyError or RuntimeError, is a fault of ours and goes on with its traceback; so what another library
    raises for an input is turned into a ValueError where that library is called.

    Args:
        main: returns the exit status, or None for 0.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except KeyboardInterrupt:
            print('interrupted', file=sys.stderr)
            return 130
        except Exception as error:
            if not is_input_error(error):
                raise
            print(f'error: {_one_line(error)}', file=sys.stderr)
            return 2

    return run


def is_input_error(error: Exception) -> bool:
    """Whether what was given, or the machine, is at fault; torch says in RuntimeErrors that there is no memory."""
    known = isinstance(error, (*_INPUT, torch.cuda.OutOfMemoryError))
    return known or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _one_line(error: Exception) -> str:
    text = ' '.join(str(error).split())
    if not isinstance(error, _INPUT) or (isinstance(error, MemoryError) and not text):
        return 'out of memory; type a smaller --batch-size, or name a smaller model'
    return text or type(error).__name__


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest of its options for one that it does not know."""

    called_as: str | None = None
    """What the user typed, where it was `timm-robust`: the next parser's program."""

    def __init__(self, prog: str | None = None, *args: Any, **options: Any) -> None:
        prog, Parser.called_as = Parser.called_as or prog, None
        super().__init__(prog, *args, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options.

        Raises:
            SystemExit: with status 2, for wrong ones.
        """
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split('=')[0], self._option_string_actions, 1)
            hint = f'did you mean {near[0]!r}? ' if near else ''
            self.error(f'unknown argument {unknown[0]!r}; {hint}{self.prog} --help lists them')
        return found

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f'error: {" ".join(message.split())}\n')


class KeyValue(argparse.Action):
    """Reads `key=value ...` into a dict, each value as a Python literal where it is one (timm's --model-kwargs)."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        """Set the dict."""
        read = {}
        for item in values:
            key, equals, value = item.partition('=')
            if not equals or not key:
                parser.error(f'argument {option}: {item!r} is not of the form key=value')
            try:
                read[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                read[key] = value
        setattr(namespace, self.dest, read)


def whole_number(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """A type of argparse: a whole number of low to high."""

    def read(text: str) -> int:
        allowed = f'{low} to {high}' if high < 2**63 - 1 else f'{low} and more'
        if not text.removeprefix('-').isdecimal() or len(text) > 19 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f'{text!r} is not allowed; allowed: whole numbers, {allowed}')
        return int(text)

    return read


count = whole_number(1)
"""A type of argparse: how many."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Reuse freed memory instead of handing it back to the system, which clears each page that it lends again.

    For programs, not for libraries: it holds for the whole process, whose memory then stays at its peak. Only glibc
    has it; elsewhere, and with another allocator preloaded, nothing happens.

    Returns:
        Whether the allocator took it.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def say(message: str) -> None:
    """A line on stderr, at once; a log that cannot be written, as on a full disk, ends nothing."""
    with contextlib.suppress(OSError, ValueError):  # closed: ValueError
        print(message, file=sys.stderr, flush=True)


def run_quietly(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> tuple[int, str]:
    """Run a command within this process: its exit status, and the last line of what it wrote to stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            status = main(argv)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, ''.join(errors.getvalue().strip().splitlines()[-1:])


def start_worker(threads: int) -> None:
    """A process beside a command's own: it has so many threads, and ends when the one that started it is gone."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
