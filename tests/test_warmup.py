"""What happens before the first step costs time and nothing else; simulated durations show what a budget does."""

import copy
import itertools
import math
import time
from functools import partial
from typing import NamedTuple

import numpy
import pytest
import torch
from tiny_runs import Killed, draw_pictures, tiny

from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.training import builder as module
from timm_robust.training import loop as engine
from timm_robust.training import state, warmup
from timm_robust.training import step as step_module
from timm_robust.training.batches import make_batches, read_data
from timm_robust.training.builder import build
from timm_robust.training.loop import Stopped, fit
from timm_robust.training.planning import plan
from timm_robust.training.state import save
from timm_robust.training.step import StepOutput
from timm_robust.training.warmup import Timing, untouched, warm_up
from timm_robust.training.watchdog import Diverged

SHORT = {'model_kwargs': {'width': 2}, 'eval_steps': 1, 'epochs': 2, 'max_steps': 3, 'batch_size': 50}
SHORT |= {'lr': 0.2, 'warmup_epochs': 0.5, 'ema_bn_batches': 2, 'log_interval': 20}


def short(folder, **changes):
    return tiny(folder, **SHORT | changes)


def bits(value):
    """Every tensor and number of a nested state, by its path."""
    if isinstance(value, dict):
        return {f'{key}.{path}': leaf for key, item in value.items() for path, leaf in bits(item).items()}
    if isinstance(value, (list, tuple)):
        return bits(dict(enumerate(value)))
    return {'': value}


def state_of(run):
    """All that a warm-up might change."""
    step = run.train_step
    parts = {'model': run.model.state_dict(), 'ema': run.ema.module.state_dict(), 'step': run.step}
    parts |= {'optimizer': step.optimizer.state_dict()}
    parts['parameters'] = {name: [p.grad, p.requires_grad] for name, p in run.model.named_parameters()}
    parts['modes'] = {name: m.training for name, m in run.model.named_modules()}
    parts['random'] = [torch.get_rng_state(), *map(str, numpy.random.get_state())]
    return copy.deepcopy(bits(parts))


def differing(a, b):
    """Names of the entries that are not equal, bit for bit."""
    return [
        key
        for key in a.keys() | b.keys()
        if not (torch.equal(a[key], b[key]) if isinstance(a.get(key), torch.Tensor) else a.get(key) == b.get(key))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    'settings',
    [
        {'late_steps': 2, 'late_start': 0.3, 'awp_gamma': 0.01, 'awp_start': 0.6},
        {'attack_bn': 'train', 'mixup': 0.5, 'opt': 'adamw', 'lr': 0.001, 'clip_grad': 1.0},
    ],
    ids=['late steps and weight perturbation', 'train mode, mixup, adamw'],
)
def test_a_warm_up_leaves_no_trace(tmp_path, settings):
    ends = []
    for warmed in (False, True):
        folder = tmp_path / str(warmed)
        for steps in (2, 4):  # afresh, and resumed
            run = build(short(folder, max_steps=steps, resume='auto', allow_changes=True, **settings))
            if warmed:
                before = state_of(run)
                assert warm_up(run).steps.keys() == set(run.recipe.turning_points)
                assert not differing(before, state_of(run))
            fit(run)
        ends.append(load_checkpoint(folder / 'run/last.pth.tar'))
    names = ('state_dict', 'state_dict_ema', 'optimizer', 'step', 'best')
    assert not differing(*(bits({name: end[name] for name in names}) for end in ends))
    for key in ('train_loss', 'train_acc', 'val_clean_acc', 'val_pgd_acc'):
        assert [row.get(key) for row in ends[0]['history']] == [row.get(key) for row in ends[1]['history']]


def test_a_warm_up_that_fails_leaves_no_trace_either(tmp_path):
    run = build(short(tmp_path, mixup=0.5))
    before = state_of(run)
    with pytest.raises(KeyboardInterrupt), untouched(run):
        run.train_step(*run.batches[0], 0)
        changed = differing(before, state_of(run))
        raise KeyboardInterrupt
    assert {key.split('.')[0] for key in changed} >= {'model', 'ema', 'optimizer', 'parameters', 'random'}
    assert not differing(before, state_of(run))


def test_each_kind_of_step_is_warmed_up(tmp_path):
    recipe = short(tmp_path, steps=2, late_steps=3, late_start=0.4, awp_gamma=0.01, awp_start=0.7)
    run = build(recipe)
    kinds, take = [], run.train_step.perturb

    def perturb(x, y, progress):
        kinds.append((recipe.attack_schedule.at(progress).keywords['steps'], progress >= recipe.awp_start))
        return take(x, y, progress)

    run.train_step.perturb = perturb
    warm_up(run)
    assert kinds == [(2, False), (3, False), (3, True)]


@pytest.mark.parametrize(('settings', 'warmed'), [({}, 0), ({'torchcompile': True}, 0), ({'budget': '1h'}, 1)])
def test_a_run_warms_up_where_it_pays(tmp_path, settings, warmed, monkeypatch):
    calls = []
    monkeypatch.setattr(engine, 'warm_up', lambda run: calls.append(run.step) or Timing({0.0: 1.0}, 1.0))
    for place in (module, step_module):
        monkeypatch.setattr(place, 'compiled', lambda net, *args: net)
    run = build(short(tmp_path, max_steps=None, **settings))
    engine.make_folder(run)
    engine.prepare(run)
    run.writer.wait()
    assert len(calls) == warmed and (run.folder / 'last.pth.tar').is_file()
    assert not list(run.folder.glob('.saving*'))


class Stream:
    """Pictures that each process takes `seconds` a batch to read, after a start-up of 10 s."""

    def __init__(self, n, workers, wall, seconds=3.0, iterable=False):
        self.n, self.readers, self.wall, self.seconds, self.iterable = n, workers, wall, seconds, iterable

    def __len__(self):
        return self.n

    def probe(self, n):
        return Stream(min(n, self.n), min(self.readers, 1) if self.iterable else self.readers, self.wall, self.seconds)

    def batches(self, size):
        self.wall[0] += 10
        for number in range(math.ceil(self.n / size)):
            self.wall[0] += 0 if number % max(self.readers, 1) else self.seconds
            yield number


@pytest.mark.parametrize('iterable', [False, True])
@pytest.mark.parametrize('workers', [0, 1, 4])
def test_the_reading_of_a_stream_is_told_from_its_first_batches(monkeypatch, workers, iterable):
    wall = [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: wall[0])
    for n in (8, 80, 800):
        expected = 10 + 3 * math.ceil(n / 8 / max(workers, 1))
        assert warmup.reading_seconds(Stream(n, workers, wall, iterable=iterable), 8) == pytest.approx(expected, abs=3)


def test_a_validation_of_streamed_images_is_not_taken_for_its_start_up(tmp_path):
    pictures = draw_pictures(tmp_path / 'pictures', n=60)
    settings = {'dataset': 'folder', 'data_dir': str(pictures), 'val_size': 0.5, 'img_size': 32, 'workers': 2}
    run = build(short(tmp_path, max_steps=None, epochs=1, batch_size=4, ema_bn_batches=0, **settings))
    calls, validate = [], warmup.validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, 'reading_seconds', lambda *_: 7.0)
        patch.setattr(warmup, 'validate', lambda run, part: calls.append(type(part).__name__) or validate(run, part))
        assert warm_up(run).validation >= 7 and set(calls) == {'ImageData'}


def test_nothing_is_compiled_after_the_warm_up(tmp_path, monkeypatch):
    """Late steps, weight perturbation, smaller images, statistics of the average, and an incomplete batch included."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
    monkeypatch.setattr(engine, 'warm_up', lambda run: None)
    settings = {'late_steps': 2, 'late_start': 0.3, 'awp_gamma': 0.01, 'awp_start': 0.6, 'batch_size': 40}
    settings |= {'model': 'resnet18_relu', 'progressive_resizing': {16: 1, 32: 1}}
    run = build(short(tmp_path, torchcompile=True, max_steps=4, **settings))
    graphs = torch._dynamo.utils.counters['stats']
    graphs.clear()
    warm_up(run)
    before = graphs['unique_graphs']
    fit(run)
    assert graphs['unique_graphs'] == before > 2 and len(run.held_out) == 50


class Seen(NamedTuple):
    """A training step: its number, the share of the run before it, and what that makes of rate and eps."""

    number: int
    share: float
    rate: float
    eps: float


class Batches:
    """Training batches without images; the first one takes 5 s."""

    def __init__(self, batches, simulation):
        self.data, self.steps_per_epoch = batches.data, batches.steps_per_epoch
        self.simulation, self.wait = simulation, 5

    def __getitem__(self, number):
        self.wait = self.simulation.after(self.wait, 0)
        return None, number


class Simulation:
    """Runs whose parts take set times on a clock that only they move; no image is looked at.

    In each session reading the data takes 50 s, the first batch 5 s, and compilation a minute for each kind of step and
    for validation; saving takes 3 s.

    Args:
        monkeypatch: pytest's.
        step: share of the run -> seconds of a training step.
        validation: number of a validation -> its seconds.
    """

    def __init__(self, monkeypatch, step=lambda progress: 1.0, validation=lambda number: 8.0):
        self.now, self.step, self.validation, self.validations = 0.0, step, validation, 0
        self.seen = []  # in all sessions
        self.compiled = set()
        monkeypatch.setattr(time, 'perf_counter', lambda: self.now)
        for place in (module, state):
            monkeypatch.setattr(place, 'perf_counter', lambda: self.now)
        for place in (module, step_module):
            monkeypatch.setattr(place, 'compiled', lambda net, *args: net)
        monkeypatch.setattr(module, 'read_data', lambda *args: self.after(50, read_data(*args)))
        for place in (engine, warmup):
            monkeypatch.setattr(place, 'save', self.save)
            monkeypatch.setattr(place, 'validate', self.validate)
        for place in (module, state):
            monkeypatch.setattr(place, 'make_batches', lambda *args: Batches(make_batches(*args), self))

    def after(self, seconds, result=None):
        self.now += seconds
        return result

    def save(self, run, *args, **kwargs):
        save(run, *args, **kwargs)
        run.writer.wait()  # before this clock moves on
        self.now += 3

    def compile(self, what):
        self.now += 0 if what in self.compiled else 60
        self.compiled.add(what)

    def validate(self, *args):
        self.compile('validation')
        self.validations += 1
        found = {'val_clean_acc': 0.9, 'val_pgd_acc': 0.5}
        return self.after(self.validation(self.validations), found)

    def session(self, recipe, kill_at=None, stop_at=None):
        """One process; returns its run and, if it was not killed before a step or stopped after one, its result."""
        run = self.prepare(recipe, kill_at, stop_at)
        try:
            return run, fit(run)
        except (Killed, Stopped):
            return run, None

    def prepare(self, recipe, kill_at=None, stop_at=None):
        """A run of simulated parts."""
        self.compiled = set()
        run, simulation = build(recipe), self
        take = run.train_step

        class Step:
            def __getattr__(self, name):
                return getattr(take, name)

            def __call__(self, x, y, number, progress):
                if number == kill_at and x is None:
                    raise Killed
                simulation.compile(sum(progress >= point for point in recipe.turning_points))
                if x is None:  # not in the warm-up
                    rate = take.optimizer.param_groups[0]['lr']
                    eps = recipe.attack_schedule.at(progress).keywords['threat_model'].eps
                    simulation.seen.append(Seen(number, progress, rate, eps))
                    run.stop = number == stop_at
                return simulation.after(simulation.step(progress), StepOutput(torch.tensor(1.0), torch.tensor(5)))

        run.train_step = Step()
        return run


BUDGET = 1500


def budgeted(folder, **changes):
    settings = {'budget': f'{BUDGET}s', 'max_steps': None, 'eps_warmup': 0.75, 'late_steps': 2, 'late_start': 0.5}
    settings |= {'epochs': 80, 'warmup_epochs': 8, 'val_interval': 4, 'model_ema': False, 'torchcompile': True}
    return short(folder, resume='auto', **settings | changes)


def speeds(seen, step):
    """From step to step of an epoch, the growth of the share of the run in a second of training."""
    return [(b.share - a.share) / step(a.share) for a, b in itertools.pairwise(seen) if b.number == a.number + 1]


@pytest.mark.parametrize(
    'durations',
    [
        {},
        {'step': lambda share: 1.0 if share < 0.5 else 2.5},
        {'validation': lambda number: 80.0 if number == 5 else 8.0},
    ],
    ids=['even', 'late steps are dearer', 'one slow validation'],
)
def test_a_budget_begins_at_the_beginning_and_ends_in_time(tmp_path, monkeypatch, durations):
    simulation = Simulation(monkeypatch, **durations)
    run, line = simulation.session(budgeted(tmp_path))
    first, last = simulation.seen[0], simulation.seen[-1]
    assert (first.number, first.share, first.rate, first.eps) == (0, 0.0, 0.0, 0.0)  # rate and eps grow from 0
    assert last.share > 0.98 and last.rate < 0.02 * run.recipe.lr and last.eps == 0.1
    speed = speeds(simulation.seen, simulation.step)
    assert 0 < max(speed) < 1.3 * min(speed)
    assert simulation.now == line['seconds'] and 0.9 * BUDGET < line['seconds'] < BUDGET
    assert 'val_pgd_acc' in run.history[-1] and line['steps'] == len(simulation.seen) > 200


@pytest.mark.parametrize('end', ['kill_at', 'stop_at'])
def test_a_resumed_budget_does_not_jump(tmp_path, monkeypatch, end):
    simulation, expected = Simulation(monkeypatch), {0: 0.0}
    for at in (40, 100, None):
        begun, count = simulation.now, len(simulation.seen)
        run, line = simulation.session(budgeted(tmp_path), **{end: at})
        part = simulation.seen[count:]
        assert part[0].share == pytest.approx(expected[part[0].number], abs=1e-9)  # as if it had never been away
        assert min(speeds(part, simulation.step)) > 0
        expected = {seen.number: seen.share for seen in part} | {run.step: run.clock.progress(run.step)}
        assert simulation.now - begun > 200  # its start-up alone
    assert part[-1].share > 0.98 and part[-1].rate < 0.02 * run.recipe.lr
    assert 0.9 * BUDGET < line['seconds'] < BUDGET


def test_a_rollback_takes_the_schedule_back_with_the_weights(tmp_path, monkeypatch):
    simulation = Simulation(monkeypatch)
    found = iter([Diverged('the loss jumped')])
    real = engine.check_epoch

    def check(row, history):
        real(row, history)
        if len(history) == 5:
            for fault in found:
                raise fault

    monkeypatch.setattr(engine, 'check_epoch', check)
    run, line = simulation.session(budgeted(tmp_path))
    again = [seen for seen in simulation.seen if seen.number == 4 * run.batches.steps_per_epoch]  # it was saved there
    assert line['rollbacks'] == 1 and len(again) == 2 and again[0].share == pytest.approx(again[1].share, abs=1e-9)
    assert simulation.seen[-1].share > 0.98 and 0.9 * BUDGET < line['seconds'] < BUDGET


@pytest.mark.parametrize('late', [1.0, 4.0])
def test_a_plan_counts_what_is_no_training_and_what_late_steps_cost(tmp_path, monkeypatch, late):
    lines = []
    for number, budget in enumerate((BUDGET, None)):
        simulation = Simulation(monkeypatch, step=lambda share: 1.0 if share < 0.5 else late)
        recipe = budgeted(tmp_path / str(number), budget=budget and f'{budget}s')
        planned = plan(simulation.prepare(recipe))
        run, line = simulation.session(recipe)
        epochs = line['steps'] / run.batches.steps_per_epoch
        assert planned['epochs'] == pytest.approx(
            epochs, rel=0.03 * late**0.5
        )  # a dearer validation interval is not foreseen
        assert planned['hours'] * 3600 == pytest.approx(line['seconds'], rel=0.05)
        lines.append(planned)
    mean = {1.0: (1000, 1000), 4.0: (1600, 2500)}[late]  # half of the time, or half of the steps
    for planned, step_ms in zip(lines, mean, strict=True):
        assert planned['step_ms'] == pytest.approx(step_ms)
        assert (planned['validation_s'], planned['saving_s']) == (8.0, 3.0)
        assert planned['start_up_s'] > 230
    assert not any(path.name.startswith('.saving') for path in tmp_path.rglob('*'))
