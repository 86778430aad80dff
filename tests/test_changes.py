import dataclasses
from pathlib import Path

import pytest

from timm_robust.training.changes import FREE, check_changes, check_equal, check_processes, find_changes
from timm_robust.training.recipe import SETTINGS, Recipe

PATH = Path('run/last.pth.tar')


def changes(recipe, was=None, **then):
    return find_changes({'recipe': dataclasses.asdict(was or Recipe()) | then}, recipe, {})


def test_every_setting_changes_what_a_run_is_unless_it_is_listed_as_free():
    other = {bool: lambda value: not value, float: lambda value: value + 0.25, int: lambda value: value + 1}
    seen = set()
    for name in SETTINGS:
        then = other.get(type(getattr(Recipe(), name)), lambda value: 'another')(getattr(Recipe(), name))
        if name in ('eps', 'step_size', 'eval_step_size'):
            then = 0.5
        if changes(Recipe(), **{name: then}):
            seen.add(name)
    assert seen == set(SETTINGS) - set(FREE)
    assert {'eps', 'norm', 'loss', 'weight_decay', 'img_size', 'epochs', 'opt', 'amp'} <= seen
    assert set(FREE) <= set(SETTINGS)


def test_what_means_the_same_is_no_change():
    assert not changes(Recipe(eps='8/255', extra_data='here/edm.npz'), eps=8 / 255, extra_data='there/edm.npz')
    lacking = dataclasses.asdict(Recipe())
    del lacking['eval_steps']  # a setting that came later had its default
    assert not find_changes({'recipe': lacking, 'images': {}}, Recipe(), {'training data': '5 images #1'})
    assert find_changes({'recipe': lacking}, Recipe(eval_steps=3), {}) == {'eval_steps': [10, 3]}
    there = {'recipe': lacking, 'images': {'training data': '6 images #2'}}
    assert find_changes(there, Recipe(), {'training data': '5 images #1'}) == {
        'training data': ['6 images #2', '5 images #1']
    }


def test_a_budget_may_be_another_but_not_taken_away():
    assert not changes(Recipe(budget='2h'), budget='25m') and not changes(Recipe(budget='2h'))
    found = changes(Recipe(), budget='25m')
    assert found == {'budget': ['25m', None]}
    with pytest.raises(ValueError, match='trained with budget 25m, now none: go on with --budget 25m'):
        check_changes(PATH, found, allowed=False)


def test_changes_are_refused_with_what_to_type():
    found = changes(Recipe(eps=0.1, amp=True, model_kwargs={'width': 4}), eps='8/255', model_kwargs={'width': 8})
    with pytest.raises(ValueError) as error:
        check_changes(PATH, found, allowed=False)
    text = str(error.value)
    assert 'run/last.pth.tar was trained with ' in text and 'eps 8/255, now 0.1' in text
    assert 'go on with --model-kwargs width=8 --eps 8/255 --no-amp' in text and '--allow-changes' in text
    assert '\n' not in text and '--data-dir' not in text
    with pytest.raises(ValueError, match='training data 6, now 5: name the right --data-dir, begin a new run by ano'):
        check_changes(PATH, {'training data': ['6', '5']}, allowed=False)
    check_changes(PATH, found, allowed=True)
    check_changes(PATH, {'seed': [1, 2]}, allowed=False)  # of another order and other noise, as a rollback draws them


class Pair:
    """The first of two processes; the other says what it was given."""

    size, rank = 2, 0

    def __init__(self, theirs):
        self.theirs = theirs

    def gather(self, items):
        return {**items, 1: self.theirs}


def test_processes_with_different_settings_or_images_are_refused():
    recipe = Recipe(eps=0.1)
    other = dataclasses.asdict(dataclasses.replace(recipe, eps=0.03, workers=5, data_dir='elsewhere'))
    with pytest.raises(ValueError, match=r'^eps 0.1 in process 0, 0.03 in process 1: .* same settings; start all by'):
        check_processes(Pair(other), recipe)
    check_processes(Pair(other | {'eps': 0.1}), recipe)
    with pytest.raises(ValueError, match=r'training data 5 in process 0, 6 in process 1: the processes .* same images'):
        check_equal(Pair({'training data': '6'}), {'training data': '5'}, 'images')
