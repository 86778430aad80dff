"""RobustBench's package, imported beside the timm of today.

RobustBench 1.1.1 asks for a timm of 2024 and imports two modules that a fresh environment lacks: pkg_resources, and
autoattack, which the package index does not have. Both are stood in for, in this process alone.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.resources
import importlib.util
import sys
import types
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluation import upstream

_VERSION = '1.1.1'
_INSTALL = f"in a checkout, type: pip install -e '.[robustbench]' && pip install --no-deps robustbench=={_VERSION}"


def robustbench() -> Any:
    """The package, importable.

    Raises:
        ImportError: if it, or something that it needs, is missing or of another version, with what to type.
    """
    if 'robustbench' not in sys.modules:
        _check_version()
    if _absent('pkg_resources'):
        sys.modules['pkg_resources'] = _pkg_resources()
    if _absent('autoattack'):
        sys.modules |= _autoattack_modules()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)  # it imports from timm's old places
            package = importlib.import_module('robustbench')
            evaluation = importlib.import_module('robustbench.eval')
    except ImportError as error:
        raise ImportError(f'RobustBench cannot be imported ({error}); {_INSTALL}') from error
    evaluation.AutoAttack = AutoAttack  # type: ignore[attr-defined]  # also where an autoattack is installed: no seed there
    return package


def _check_version() -> None:
    """Refuse another RobustBench than the one known here; torchattacks' wheel lays one of 2022 over it, file by file.

    Raises:
        ImportError: naming what is there, where it comes from, and what to type.
    """
    spec = importlib.util.find_spec('robustbench')
    if spec is None:
        return  # the import says what is missing
    others = [
        str(other.metadata['Name'])
        for other in metadata.distributions()
        if other.metadata['Name'] != 'robustbench' and any(file.parts[0] == 'robustbench' for file in other.files or ())
    ]
    mend = f'type: pip install --force-reinstall --no-deps robustbench=={_VERSION}'
    if others:
        names = ' '.join(others)
        mend = f'{names} laid it there; {mend.replace("type: ", f"type: pip uninstall -y {names} && ")}'
    try:
        found = metadata.distribution('robustbench')
    except metadata.PackageNotFoundError:
        found = None
    if found is None or found.version != _VERSION:
        what = f'is {found.version}' if found else f'in {spec.origin} is of no known version'
    elif any(file.suffix == '.py' and not _is_intact(file) for file in found.files or ()):
        what = f'is not the {_VERSION} that was installed: files of it were overwritten'
    elif spec.origin and Path(spec.origin).parent != Path(str(found.locate_file('robustbench'))):
        what, mend = f'comes from {Path(spec.origin).parent}', 'take that folder off PYTHONPATH'
    else:
        return
    raise ImportError(f'robustbench {what}, needed is {_VERSION}; {mend}')


def _is_intact(file: metadata.PackagePath) -> bool:
    """Whether an installed file has the hash that was noted at its installation, if any was."""
    if file.hash is None:
        return True
    try:
        digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(digest).rstrip(b'=').decode() == file.hash.value


def _absent(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name) is None


def _pkg_resources() -> types.ModuleType:
    """What RobustBench uses of setuptools' former module: where a package keeps its files."""
    module = types.ModuleType('pkg_resources')

    def resource_filename(package: str, name: str) -> str:
        return str(importlib.resources.files(package.rpartition('.')[0] or package).joinpath(name))

    module.resource_filename = resource_filename  # type: ignore[attr-defined]
    # pytest's monkeypatch.syspath_prepend calls it wherever the module is there
    module.fixup_namespace_packages = lambda path, parent=None: None  # type: ignore[attr-defined]
    return module


@dataclass
class _Settings:
    """What RobustBench does not let its user choose, and what it does not hand out."""

    seed: int = 0
    x_adv: list[torch.Tensor] = field(default_factory=list)


SETTINGS = _Settings()


class AutoAttack:
    """The interface of the autoattack package of 2021, over pyautoattack, with a fixed seed."""

    def __init__(self, model: nn.Module, norm: str = 'Linf', eps: float = 8 / 255, **options: Any) -> None:
        options = {key: options[key] for key in ('version', 'device') if options.get(key) is not None}
        self.runner = upstream().AutoAttack(model, norm=norm, eps=eps, seed=SETTINGS.seed, **options)

    def run_standard_evaluation(
        self, x: torch.Tensor, y: torch.Tensor, bs: int = 250, state_path: Any = None
    ) -> torch.Tensor:
        """Adversarial images [N, C, H, W]; those that resist come back as they were."""
        if state_path is not None:
            raise ValueError('RobustBench cannot resume; use timm-robust evaluate --state-dir')
        x_adv, _ = self.runner.run_standard_evaluation(x, y, batch_size=bs)
        SETTINGS.x_adv.append(x_adv)
        return torch.as_tensor(x_adv)


class EvaluationState:
    """Imported by RobustBench; never used without a state path."""


def _autoattack_modules() -> dict[str, types.ModuleType]:
    package, state = types.ModuleType('autoattack'), types.ModuleType('autoattack.state')
    package.AutoAttack, state.EvaluationState = AutoAttack, EvaluationState  # type: ignore[attr-defined]
    package.state = state  # type: ignore[attr-defined]
    return {'autoattack': package, 'autoattack.state': state}
