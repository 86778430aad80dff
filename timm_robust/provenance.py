"""Where numbers come from: hardware, versions, commit; and names without the paths of a machine."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__version__ = '0.1.0'
PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / 'train/recipes').is_dir() else None
"""The repository that the package is used from; None where it is installed."""
RECIPES = CHECKOUT / 'train/recipes' if CHECKOUT else PACKAGE / 'recipes'
"""The recipes that the package brings, NAME.yaml each."""
_SOURCES = ('hf-hub:', 'hf_hub:', 'local-dir:')  # of timm


def public_name(spec: str) -> str:
    """A model's name without the machine's paths: 'a/b/run/best.pth' -> 'run/best.pth'; 'hf-hub:org/repo' stays."""
    prefix = next((prefix for prefix in _SOURCES if spec.startswith(prefix)), '')
    path = Path(spec.removeprefix(prefix))
    parts = [part for part in path.parts if part not in (path.anchor, '.', '..', '~')]
    if path.expanduser().parent == Path.home():
        parts = parts[-1:]
    return prefix + '/'.join(parts[-2:])


def environment(device: str | torch.device = 'cpu') -> dict[str, Any]:
    """What a measurement on device runs on: 'hardware', a text, and 'versions', package -> version or None."""
    device = torch.device(device)
    affinity = getattr(os, 'sched_getaffinity', None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    name = torch.cuda.get_device_name(device) + ', ' if device.type == 'cuda' else f'{_cpu_name()}, '
    versions: dict[str, str | None] = {'python': platform.python_version(), 'torch': str(torch.__version__)}
    for package in ('timm', 'timm_robust', 'pyautoattack'):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = __version__ if package == 'timm_robust' else None  # run from a checkout
    return {'hardware': f'{name}{cores} CPU core{"s" * (cores != 1)}', 'versions': versions}


def git_commit(folder: str | os.PathLike[str] = PACKAGE) -> str | None:
    """The git commit of the code in a folder (ours), with '+dirty' if files there changed; None outside git."""
    git = ['git', '--no-optional-locks', '-C', os.fspath(folder)]
    try:
        tracked = subprocess.run([*git, 'ls-files'], capture_output=True, text=True, timeout=30)
        commit = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=30)
        status = subprocess.run([*git, 'status', '--porcelain', '.'], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode or not tracked.stdout.strip():
        return None
    return commit.stdout.strip() + ('+dirty' if status.stdout.strip() else '')


def _cpu_name() -> str:
    """The CPU's model name as Linux tells it, else its architecture."""
    with contextlib.suppress(OSError):
        if found := re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE):
            return found.group(1).strip()
    return platform.processor() or platform.machine()
