"""RobustBench's load_model and benchmark on our models and local images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..data import ImageData
from ..threat_model import LEADERBOARD_EPS, ThreatModel, parse_eps
from ..weights import RELEASES
from .package import SETTINGS, robustbench


def load_model(
    name: str, dataset: str = 'cifar10', threat_model: str = 'Linf', norm: str | None = None, **options: Any
) -> nn.Module:
    """RobustBench's load_model, which finds our models too: 'wrn28_10_pssilu', or with its tag, in full or in part.

    Args:
        name: a model of RobustBench's zoo, '<arch>', '<arch>.<method>' or '<arch>.<tag>'.
        dataset: 'cifar10', ...
        threat_model: 'Linf', 'L2' or 'corruptions'.
        norm: RobustBench's older word for threat_model; where both are given, this one counts, as there.
        options: further arguments of RobustBench's own load_model.

    Raises:
        ImportError: if RobustBench is missing.
        ValueError: if no model has that name.
    """
    package, threat_model = robustbench(), norm or threat_model
    end = f'_{dataset}_{threat_model}'.lower()
    name = name.removesuffix(end)
    zoo = package.model_zoo.model_dicts
    enums = package.model_zoo.enums
    known = zoo[enums.BenchmarkDataset(dataset)].get(enums.ThreatModel(threat_model), {})
    ours = f'{name.lower().replace("-", "_")}{end}'
    if name not in known and not (timm.models.is_model_pretrained(ours) if '.' in ours else timm.is_model(ours)):
        raise ValueError(
            f'{name!r} is no model of RobustBench for {dataset} {threat_model}, and none of ours: '
            f'{", ".join(RELEASES) or "nothing is released yet"}'
        )
    return package.utils.load_model(name, dataset=dataset, threat_model=threat_model, **options)


@contextmanager
def _images(package: Any, data: ImageData) -> Iterator[None]:
    """Let RobustBench read these images instead of downloading its own."""
    loaders = package.data._clean_dataset_loaders
    key = package.model_zoo.enums.BenchmarkDataset(data.name)
    kept = loaders[key]
    loaders[key] = lambda n, data_dir, prepr: (data.first(n).pixels(), data.labels[:n])
    try:
        yield
    finally:
        loaders[key] = kept


def benchmark(
    model: nn.Module,
    data: ImageData,
    *,
    norm: str = 'Linf',
    eps: float | str | None = None,
    n: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str = 'cpu',
) -> dict[str, Any]:
    """What RobustBench itself measures, on local images, with a fixed seed and batch size.

    Args:
        model: images in [0, 1] -> logits.
        data: test images of cifar10 or cifar100.
        norm: 'Linf' or 'L2'.
        eps: radius in pixels; the leaderboard's if None.
        n: the first n images; all if None.
        batch_size: AutoAttack's random numbers depend on it.
        seed: of AutoAttack.
        device: where to run.

    Returns:
        'clean_acc' and 'autoattack_acc' as RobustBench computes them, and 'robust', the verdict on every image [n].

    Raises:
        ImportError: if RobustBench is missing.
        ValueError: for a radius that cannot be meant.
    """
    threat_model = ThreatModel(norm, parse_eps(LEADERBOARD_EPS[norm] if eps is None else eps))
    threat_model.check_scale()
    package, n = robustbench(), len(data) if n is None else n
    SETTINGS.seed, SETTINGS.x_adv = seed, []
    model = model.to(device).eval()
    with _images(package, data):
        clean, robust = package.eval.benchmark(
            model,
            n_examples=n,
            dataset=data.name,
            threat_model=norm,
            device=torch.device(device),
            batch_size=batch_size,
            eps=threat_model.eps,
        )
    y = data.labels[:n]
    with torch.no_grad():
        verdicts = [model(part.to(device)).argmax(1).cpu() for part in SETTINGS.x_adv[-1].split(batch_size)]
    return {'clean_acc': clean, 'autoattack_acc': robust, 'robust': torch.cat(verdicts) == y.cpu()}


def corruptions(
    model: nn.Module, folder: str | Path, *, n: int = 10_000, batch_size: int = 250, device: torch.device | str = 'cpu'
) -> dict[str, Any]:
    """Accuracy on CIFAR-10-C: 15 corruptions, 5 severities, through RobustBench's loader and its clean_accuracy.

    RobustBench's own path ends in a TypeError (it passes prepr= to a loader that names that argument _), and behind it
    asks for AlexNet's accuracies, which no file of it holds for CIFAR-10: so the loop is run here, without the mCE.

    Args:
        model: images in [0, 1] -> logits.
        folder: holds CIFAR-10-C/ with 15 .npy files and labels.npy (Zenodo record 2535967).
        n: the first n images of each corruption and severity.
        batch_size: images a batch.
        device: where to run.

    Returns:
        'corruptions_acc', the mean, and 'accuracies', {corruption: [of severity 1, ..., 5]}.

    Raises:
        FileNotFoundError: naming the file that is missing, before anything runs.
    """
    package = robustbench()
    names, folder = package.data.CORRUPTIONS, Path(folder)
    for name in (*names, 'labels'):
        if not (folder / 'CIFAR-10-C' / f'{name}.npy').is_file():
            raise FileNotFoundError(
                f'{folder / "CIFAR-10-C" / name}.npy is missing; unpack CIFAR-10-C.tar of https://zenodo.org/records/2535967'
            )
    model = model.to(device).eval()
    accuracies: dict[str, list[float]] = {}
    for name in names:
        accuracies[name] = []
        for severity in range(1, 6):
            x, y = package.data.load_cifar10c(n, severity, str(folder), False, [name])
            share = package.utils.clean_accuracy(model, x, y, batch_size, torch.device(device))
            accuracies[name].append(share)
    return {
        'corruptions_acc': sum(sum(row) for row in accuracies.values()) / (5 * len(names)),
        'accuracies': accuracies,
    }
