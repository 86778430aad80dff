"""What cards cite, and of what."""

import itertools
import re

import pytest
import yaml

from timm_robust import activations
from timm_robust.attacks import TRAINING_ATTACKS
from timm_robust.release.papers import EXTRA_DATA, METHODS, extra_data_of, paper_link, papers_of
from timm_robust.training import LOSSES
from timm_robust.training.recipe import Recipe
from timm_robust.weights.releases import STAGED

RECIPES = sorted((STAGED.parent / 'train/recipes').glob('*.*.yaml'))


def cited(name, **settings):
    hyper = {'loss': 'pgd_at', 'attack': 'pgd'} | settings
    return {where for _, where in papers_of(name, hyper)}


def test_every_activation_has_its_paper():
    assert [name for name, act in activations.ACTIVATIONS.items() if not act.papers] == ['relu']
    for act in ('psilu', 'psoftplus', 'prelu', 'pprelu', 'pelu', 'reblu'):
        assert '2110.05626' in cited(f'resnet18_{act}.at_cifar10_linf')
    assert '2006.14536' in cited('resnet18_smoothrelu.at_cifar10_linf')
    assert '2110.05626' in cited('resnet50.at_imagenet_linf', act='pssilu')  # put into a network of timm


def test_every_paper_has_an_address():
    papers = [*METHODS.values(), *itertools.chain(*(act.papers for act in activations.ACTIVATIONS.values()))]
    papers += [kind.paper for kind in (*LOSSES.values(), *TRAINING_ATTACKS.values()) if kind.paper]
    papers += itertools.chain(*(extra.papers for extra in EXTRA_DATA.values()))
    assert all(re.fullmatch(r'https://\S+', paper_link(where)) for _, where in papers)


def test_training_is_cited():
    assert cited('resnet18_relu.at_cifar10_linf') == {'1706.06083', '2003.01690'}
    settings = {'loss': 'trades', 'awp_gamma': 0.005, 'eps_warmup': 0.75, 'update_grad': 'smooth'}
    found = cited('resnet18_relu.x_cifar10_linf', **settings)
    assert found == {'1901.08573', '2004.05884', '2210.15318', '2006.14536', '2003.01690'}


@pytest.mark.parametrize(
    ('part', 'expected'),
    [
        ('ddpm6m', {'2010.08127', '2006.11239'}),
        ('edm1m', {'2302.04638', '2206.00364'}),
        ('edm20m', {'2302.04638', '2206.00364'}),
    ],
)
def test_extra_data_is_cited_where_it_was_used(part, expected):
    name = f'wrn28_10_pssilu.trades_{part}_cifar10_linf'
    assert expected <= cited(name, extra_data='x.npz')
    assert not expected & cited(name, extra_data=None)
    assert extra_data_of('net.at_cifar10_linf', {'extra_data': 'mine.npz'}).text == 'images of `mine.npz`'


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipes_name_their_extra_data_in_the_tag(path):
    extra = extra_data_of(path.stem, vars(Recipe.from_yaml(path)))
    if 'extra_data' in yaml.safe_load(path.read_text()):
        assert extra in EXTRA_DATA.values()
    else:
        assert extra is None
