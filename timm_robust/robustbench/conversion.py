"""RobustBench's checkpoints to ours, and back."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..files import atomic_file
from ..models import load_model as load_any
from ..models import read_weights
from ..release import write_model
from .package import robustbench
from .zoo import ZooEntry, check_network, entry_of, to_ours, to_theirs


def convert(name: str, source: str | Path, target: str | Path) -> Path:
    """A checkpoint of RobustBench's zoo as a folder that timm loads ('local-dir:'), or the way back.

    Args:
        name: the entry of the zoo (CIFAR-10 Linf), see zoo.LINF.
        source: RobustBench's .pt file; or, for the way back, our folder, checkpoint or .safetensors file.
        target: the folder to write; or, for the way back, the .pt file.

    Raises:
        ValueError: if the entry does not convert, the weights or the network are not its, or the target exists.
        FileNotFoundError: if the source does not exist.
    """
    entry, target = entry_of(name), Path(target)
    if target.exists():
        raise ValueError(f'{target} exists; name a new one, or remove it')
    if target.suffix == '.pt':
        return _to_robustbench(name, entry, source, target)
    weights = to_ours(read_weights(source), entry)
    statistics = {'mean': entry.mean, 'std': entry.std}
    model = timm.create_model(entry.arch, pretrained_cfg_overlay=statistics, **entry.model_kwargs)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f'{source} is not {name}: {" ".join(str(error).split())[:400]}') from None
    write_model(model, target, release_name(name, entry), entry.model_kwargs, source=f'RobustBench {name}')
    return target


def _to_robustbench(name: str, entry: ZooEntry, source: str | Path, target: Path) -> Path:
    """Our weights as RobustBench would publish them: a state dict that its class loads strictly."""
    robustbench()  # imported first: what it makes on import must not land on 'meta'
    path = Path(source)
    model = load_any(path if path.exists() else str(source))
    check_network(model, name, entry)
    with torch.device('meta'):
        theirs = zoo_network(name)
    weights = to_theirs(model.state_dict(), list(theirs.state_dict()), entry)
    try:
        theirs.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f'{source} is not {name}: {" ".join(str(error).split())[:400]}') from None
    with atomic_file(target) as file:
        torch.save({key: value.contiguous() for key, value in theirs.state_dict().items()}, file)
    return target


def release_name(name: str, entry: ZooEntry) -> str:
    """An entry of the zoo as a name of ours: 'wrn34_10_relu.jia2022lasat_cifar10_linf'."""
    return f'{entry.arch}.{re.sub("[^a-z0-9]", "", name.partition("_")[0].lower())}_cifar10_linf'


def zoo_network(name: str) -> nn.Module:
    """RobustBench's network of an entry of its zoo, CIFAR-10 Linf, with random weights."""
    return _in_their_zoo(name)['model']()


def _in_their_zoo(name: str) -> dict[str, Any]:
    """What RobustBench's own table holds of a CIFAR-10 Linf entry: its class and its file on Google Drive."""
    zoo = robustbench().model_zoo
    return zoo.model_dicts[zoo.enums.BenchmarkDataset.cifar_10][zoo.enums.ThreatModel.Linf][name]


def fetch(name: str, target: str | Path) -> Path:
    """Download an entry of the zoo with RobustBench's own link, and convert it.

    Raises:
        ConnectionError: if the file cannot be had.
        ValueError: if what came is not the checkpoint, such as a web page, or the target is no new folder.
    """
    entry_of(name)
    if Path(target).exists() or Path(target).suffix == '.pt':
        raise ValueError(f'{target} exists, or is no name of a folder; name a new folder')
    drive_id = _in_their_zoo(name)['gdrive_id']
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'{name}.pt'
        try:
            robustbench().utils.download_gdrive_new(drive_id, path)
        except Exception as error:  # of requests, or gdown's own
            raise ConnectionError(
                f'{name} (drive id {drive_id}) cannot be fetched: {type(error).__name__}; download it elsewhere and '
                f'type: timm-robust robustbench convert {name} FILE.pt {target}'
            ) from None
        if not path.is_file():
            raise ConnectionError(
                f'{name} (drive id {drive_id}) did not arrive; download it in a browser, then convert'
            )
        return convert(name, path, target)
