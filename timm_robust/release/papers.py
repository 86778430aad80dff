"""The papers behind a model: of its activation, its training and its extra data. Cards and submissions name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Paper = tuple[str, str]
"""Who and when, and the arXiv number or another address."""

_DAI: Paper = ('Dai, Mahloujifar, Mittal 2021', '2110.05626')
_XIE: Paper = ('Xie et al. 2020', '2006.14536')

ACTIVATIONS: dict[str, tuple[Paper, ...]] = {
    **dict.fromkeys(('pssilu', 'psilu', 'psoftplus', 'prelu', 'pprelu', 'pelu', 'reblu'), (_DAI,)),
    **dict.fromkeys(('smoothrelu', 'softplus10', 'softplus'), (_XIE,)),
    'silu': (('Elfwing, Uchibe, Doya 2017', '1702.03118'), _XIE),
    'gelu': (('Hendrycks, Gimpel 2016', '1606.08415'), _XIE),
    'elu': (('Clevert, Unterthiner, Hochreiter 2015', '1511.07289'), _XIE),
}
"""Activation -> where it comes from, or was studied under attack. ReLU needs none."""

METHODS: dict[str, Paper] = {
    'pgd_at': ('Madry et al. 2018', '1706.06083'),
    'trades': ('Zhang et al. 2019', '1901.08573'),
    'mart': ('Wang et al. 2020', 'https://openreview.net/forum?id=rklOg6EFwS'),
    'n_fgsm': ('de Jorge et al. 2022', '2202.01181'),
    'fgsm': ('Wong, Rice, Kolter 2020', '2001.03994'),
    'awp': ('Wu, Xia, Wang 2020', '2004.05884'),
    'eps_warmup': ('Addepalli, Jain, Babu 2022', '2210.15318'),
    'smooth': _XIE,
    'autoattack': ('Croce, Hein 2020', '2003.01690'),
}
"""Loss, attack and what else a recipe switches on -> paper."""


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
    activation = hyper.get('act') or name.partition('.')[0].rpartition('_')[2]
    used = [hyper['loss'], hyper['attack']]
    used += [key for key, on in (('awp', 'awp_gamma'), ('eps_warmup', 'eps_warmup')) if hyper.get(on)]
    if 'smooth' in (hyper.get('attack_grad'), hyper.get('update_grad')):
        used.append('smooth')
    papers = [*ACTIVATIONS.get(activation, ()), *[METHODS[key] for key in used if key in METHODS]]
    extra = extra_data_of(name, hyper)
    papers += extra.papers if extra else ()
    return list(dict.fromkeys([*papers, METHODS['autoattack']]))


def paper_link(where: str) -> str:
    """The address of a paper: its number on arXiv, or the address itself."""
    return f'https://arxiv.org/abs/{where}' if where[0].isdigit() else where
