"""Entries of RobustBench's zoo (CIFAR-10) whose networks are ours by another name, and how their weights are called.

Kinds: 'trades' (Zhang et al. 2019: pre-activation, weights block1.layer.0...), 'deepmind' (Gowal et al. 2020: the same
blocks with SiLU, strided convolutions padded as TensorFlow's SAME), 'paf' (Dai et al. 2021: TRADES' network with one
PSSiLU, listed under every block's name), 'resnet' (post-activation ResNet-18).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

import timm
import torch

from ..models import cifar_resnet, other_function, wide_resnet

_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


@dataclass(frozen=True)
class ZooEntry:
    """A network of RobustBench's zoo in our terms.

    Args:
        arch: its name in timm's registry.
        kind: 'trades', 'deepmind', 'paf' or 'resnet'.
        mean: what the network subtracts from pixels in [0, 1].
        std: what it divides by.
    """

    arch: str
    kind: str
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """What timm.create_model needs besides the name."""
        return {'same_padding': True} if self.kind == 'deepmind' else {}

    @property
    def family(self) -> Any:
        """The module of its network."""
        return cifar_resnet if self.kind == 'resnet' else wide_resnet


def _entries(arch: str, kind: str, names: str, *statistics: tuple[float, ...]) -> dict[str, ZooEntry]:
    return {name: ZooEntry(arch, kind, *statistics) for name in names.split()}


LINF = {
    'Dai2021Parameterizing': ZooEntry('wrn28_10_pssilu', 'paf'),
    **_entries(
        'wrn28_10_relu',
        'trades',
        'Carmon2019Unlabeled Sehwag2020Hydra Wang2020Improving Wu2020Adversarial_extra Zhang2020Geometry '
        'Sridhar2021Robust Standard',
    ),
    **_entries('wrn28_10_relu', 'trades', 'Hendrycks2019Using', (0.5,) * 3, (0.5,) * 3),
    **_entries(
        'wrn34_10_relu',
        'trades',
        'Zhang2019Theoretically Huang2020Self Zhang2019You Zhang2020Attacks Wu2020Adversarial Sehwag2021Proxy '
        'Sitawarin2020Improving Cui2020Learnable_34_10 Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 '
        'Jia2022LAS-AT_34_10 Addepalli2022Efficient_WRN_34_10 Cui2023Decoupled_WRN-34-10 Chen2024Data_WRN_34_10',
    ),
    **_entries('wrn34_10_relu', 'trades', 'Chen2020Efficient', *_CIFAR10),
    **_entries('wrn70_16_relu', 'trades', 'Jia2022LAS-AT_70_16'),
    **_entries(
        'wrn28_10_silu',
        'deepmind',
        'Gowal2020Uncovering_28_10_extra Rebuffi2021Fixing_28_10_cutmix_ddpm Rade2021Helper_ddpm '
        'Gowal2021Improving_28_10_ddpm_100m Pang2022Robustness_WRN28_10 Wang2023Better_WRN-28-10 '
        'Xu2023Exploring_WRN-28-10 Cui2023Decoupled_WRN-28-10',
        *_CIFAR10,
    ),
    **_entries('wrn34_10_silu', 'deepmind', 'Rade2021Helper_extra', *_CIFAR10),
    **_entries(
        'wrn70_16_silu',
        'deepmind',
        'Gowal2020Uncovering_70_16 Gowal2020Uncovering_70_16_extra Rebuffi2021Fixing_70_16_cutmix_ddpm '
        'Rebuffi2021Fixing_70_16_cutmix_extra Gowal2021Improving_70_16_ddpm_100m Pang2022Robustness_WRN70_16 '
        'Wang2023Better_WRN-70-16',
        *_CIFAR10,
    ),
    **_entries('resnet18_relu', 'resnet', 'Sehwag2021Proxy_R18 Addepalli2021Towards_RN18 Addepalli2022Efficient_RN18'),
}
"""Name in RobustBench's zoo, CIFAR-10 Linf -> what it is here."""


def entry_of(name: str) -> ZooEntry:
    """The entry of that name.

    Raises:
        ValueError: if it does not convert, with those near it that do.
    """
    if name not in LINF:
        near = ', '.join(difflib.get_close_matches(name, LINF, 3)) or ', '.join(LINF)
        raise ValueError(
            f'{name} does not convert: its network is none of ours, or no CIFAR-10 Linf entry has that name; '
            f'near it, these do: {near}'
        )
    return LINF[name]


def to_ours(weights: dict[str, torch.Tensor], entry: ZooEntry) -> dict[str, torch.Tensor]:
    """RobustBench's weights under our names; copies of one parameter become one.

    Raises:
        ValueError: if copies differ, the statistics of the inputs are others than the entry's, or the names are those
            of another code's network: shapes alone do not tell DeepMind's activation and padding from TRADES'.
    """
    weights = dict(weights)
    if all(key.startswith('model.') for key in weights):  # Chen2020Efficient's file
        weights = {key.removeprefix('model.'): value for key, value in weights.items()}
    others = {kind for kind in map(_kind_of, weights) if kind} - {'trades' if entry.kind == 'paf' else entry.kind}
    if others:
        raise ValueError(
            f"its weights are named as those of a network of kind {', '.join(sorted(others))}; the entry's is "
            f'{entry.kind}, with another activation or padding: is it the file of another entry?'
        )
    for name, expected in (('mu', entry.mean), ('sigma', entry.std)):  # buffers of some networks
        found = weights.pop(name, torch.tensor(expected))
        if not torch.allclose(found.flatten(), torch.tensor(expected), atol=1e-4):
            raise ValueError(f'{name} is {found.flatten().tolist()}, expected {list(expected)}; is it another entry?')
    return entry.family.checkpoint_filter_fn(weights, torch.nn.Identity())


def _kind_of(name: str) -> str | None:
    """Whose blocks a weight's name belongs to: 'trades', 'deepmind', 'resnet' or 'timm_robust'; None outside blocks."""
    if re.match(r'(sub_)?block\d\.layer\.', name):
        return 'trades'
    if re.match(r'layer\.\d\.block\.', name):
        return 'deepmind'
    if name.startswith('stages.'):
        return 'timm_robust'
    return 'resnet' if re.match(r'layer\d\.', name) else None


def check_network(model: torch.nn.Module, name: str, entry: ZooEntry) -> None:
    """Refuse a network that computes another function than the entry's with the same weights.

    Raises:
        ValueError: naming what differs: a layer, its padding, or the statistics of the inputs.
    """
    statistics = {'mean': entry.mean, 'std': entry.std}
    with torch.device('meta'):
        expected = timm.create_model(entry.arch, pretrained_cfg_overlay=statistics, **entry.model_kwargs)
    if found := other_function(expected, model):
        raise ValueError(
            f'the model given computes otherwise than {name}, {entry.arch}: {found[0]}; name the entry that it was '
            'converted from'
        )


def to_theirs(weights: dict[str, torch.Tensor], names: list[str], entry: ZooEntry) -> dict[str, torch.Tensor]:
    """Our weights under RobustBench's names.

    Args:
        weights: ours.
        names: every name in the state dict of RobustBench's network; those of one parameter get the same values, and
            TRADES' second block1, which never runs, those of the first.
        entry: what the network is.

    Raises:
        ValueError: if a weight of theirs is none of ours, or one of ours none of theirs, as of a deeper network.
    """
    out, left = {}, dict(weights)
    for name in names:
        if name in ('mu', 'sigma'):  # statistics that some networks keep as buffers
            out[name] = torch.tensor(entry.mean if name == 'mu' else entry.std).view(1, 3, 1, 1)
            continue
        ours = entry.family.own_key(name.replace('sub_block1.', 'block1.'))
        if ours not in weights:
            raise ValueError(f'{name} of RobustBench has no counterpart here; is this {entry.arch}?')
        out[name] = weights[ours].clone()
        left.pop(ours, None)
    if left:
        raise ValueError(f"{next(iter(left))} has no counterpart in RobustBench's network; is this {entry.arch}?")
    return out
