"""The C library's memory allocator, told to keep what is freed: on a CPU large tensors come and go at every layer."""

from __future__ import annotations

import ctypes
import platform

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
