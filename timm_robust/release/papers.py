"""The papers behind a model: of its activation, its training and its extra data. Cards and submissions name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..activations import ACTIVATIONS, Activation
from ..attacks import TRAINING_ATTACKS
from ..training import LOSSES

Paper = tuple[str, str]
"""Who and when, and the arXiv number or another address."""

METHODS: dict[str, Paper] = {
    'awp': ('Wu, Xia, Wang 2020', '2004.05884'),
    'eps_warmup': ('Addepalli, Jain, Babu 2022', '2210.15318'),
    'smooth': ('Xie et al. 2020', '2006.14536'),
    'autoattack': ('Croce, Hein 2020', '2003.01690'),
}
"""What a recipe switches on beside activation, loss and attack, which name their own -> paper."""


@dataclass(frozen=True)
class ExtraData:
    """Images that were mixed into the training set.

    Args:
        text: what they are.
        count: how many, as RobustBench's footnotes write it; '' if unknown.
        papers: of whoever generated them.
        hub: id of the data set on the Hub; '' if it has none.
    """

    text: str
    count: str = ''
    papers: tuple[Paper, ...] = ()
    hub: str = ''


_WANG = (('Wang et al. 2023', '2302.04638'), ('Karras et al. 2022', '2206.00364'))
_WANG_HUB = 'P2333/DM-Improves-AT'

EXTRA_DATA = {
    'ddpm6m': ExtraData(
        'about 6 million images of a denoising diffusion model (CIFAR-5m)',
        '~6M',
        (('Nakkiran, Neyshabur, Sedghi 2020', '2010.08127'), ('Ho, Jain, Abbeel 2020', '2006.11239')),
    ),
    'edm1m': ExtraData('1 million images of a diffusion model (EDM)', '1M', _WANG, _WANG_HUB),
    'edm20m': ExtraData('20 million images of a diffusion model (EDM)', '20M', _WANG, _WANG_HUB),
}
"""The extra data that a tag may name, as in `trades_edm1m_cifar10_linf`."""


def extra_data_of(name: str, hyper: dict[str, Any]) -> ExtraData | None:
    """What was mixed into the training of a model; None if nothing was.

    Args:
        name: `<arch>.<tag>`; the tag names known extra data.
        hyper: every setting of the training.
    """
    if not hyper.get('extra_data'):
        return None
    known = [EXTRA_DATA[part] for part in name.partition('.')[2].split('_') if part in EXTRA_DATA]
    return known[0] if known else ExtraData(f'images of `{hyper["extra_data"]}`')


def papers_of(name: str, hyper: dict[str, Any]) -> list[Paper]:
    """The papers behind a model, each once: of activation, loss, attack, extra data, and of AutoAttack.

    Args:
        name: `<arch>.<tag>`.
        hyper: every setting of the training.
    """
    activation = ACTIVATIONS.get(hyper.get('act') or name.partition('.')[0].rpartition('_')[2], Activation)
    methods = (LOSSES[hyper['loss']].paper, TRAINING_ATTACKS[hyper['attack']].paper)
    papers = [*activation.papers, *filter(None, methods)]
    used = [key for key, on in (('awp', 'awp_gamma'), ('eps_warmup', 'eps_warmup')) if hyper.get(on)]
    if 'smooth' in (hyper.get('attack_grad'), hyper.get('update_grad')):
        used.append('smooth')
    papers += [METHODS[key] for key in used]
    extra = extra_data_of(name, hyper)
    papers += extra.papers if extra else ()
    return list(dict.fromkeys([*papers, METHODS['autoattack']]))


def paper_link(where: str) -> str:
    """The address of a paper: its number on arXiv, or the address itself."""
    return f'https://arxiv.org/abs/{where}' if where[0].isdigit() else where
