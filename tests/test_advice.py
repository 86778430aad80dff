"""Few images and robustness that does not come are said once, in words."""

from types import SimpleNamespace

import pytest
import torch

from timm_robust.training.advice import chance, few_images, images_per_class, near_chance
from timm_robust.training.recipe import Recipe

RECIPE = Recipe(eps='8/255', model='resnet18_silu')
LABELS = torch.arange(100) % 4


def a_run(rows, recipe=RECIPE, labels=LABELS, total=90):
    data = SimpleNamespace(labels=labels, num_classes=4, classes=('ant', 'bee', 'cat', 'dog'))
    batches, clock = SimpleNamespace(data=data), SimpleNamespace(budget=None)
    data = {'batches': batches, 'held_out': data, 'world': SimpleNamespace(size=1)}
    return SimpleNamespace(recipe=recipe, clock=clock, total_steps=total, history=rows, **data)


def rows(*accuracies):
    return [{'step': 10 * (n + 1), 'val_pgd_acc': accuracy} for n, accuracy in enumerate(accuracies)]


def test_chance_is_that_of_the_most_frequent_class_and_its_error():
    assert chance(LABELS, 4) == pytest.approx(0.25 + 2 * (0.25 * 0.75 / 100) ** 0.5)
    uneven = torch.tensor([0] * 90 + [1] * 10)
    assert chance(uneven, 4) == pytest.approx(0.9 + 2 * (0.9 * 0.1 / 100) ** 0.5)


def test_a_run_that_stays_near_chance_is_told_once_when_a_third_is_over():
    assert near_chance(a_run(rows(0.25, 0.2))) is None  # too early
    line = near_chance(a_run(rows(0.25, 0.2, 0.3)))
    assert 'near chance (30.0%)' in line and '--eps-warmup 0.5' in line and '--initial-checkpoint' in line
    assert near_chance(a_run(rows(0.25, 0.2, 0.3, 0.3))) is None  # it was said
    assert near_chance(a_run(rows(0.25, 0.5, 0.3))) is None  # it had learned something
    assert near_chance(a_run(rows(0.25, 0.2, 0.3), Recipe(loss='clean'))) is None


def test_the_advice_leaves_out_what_was_done():
    recipe = Recipe(eps_warmup=0.5, initial_checkpoint='a.pth.tar')
    line = near_chance(a_run(rows(0.25, 0.2, 0.3), recipe))
    assert 'smaller --eps' in line and '--eps-warmup' not in line and '--initial-checkpoint' not in line


def test_classes_with_few_images_are_named():
    labels = torch.cat([torch.arange(400) % 4, torch.zeros(10, dtype=torch.int64)])
    assert images_per_class(a_run([], labels=labels).batches.data).tolist() == [110, 100, 100, 100]
    assert few_images(a_run([], labels=labels)) == []
    assert len(few_images(a_run([], labels=labels[1:]))) == 0 and len(few_images(a_run([], labels=labels[2:]))) == 1
    (line,) = few_images(a_run([], labels=labels[labels != 2]))
    assert line.startswith("class 'cat' has 0 training images")
