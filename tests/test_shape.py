import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_robust import study as module
from timm_robust.activations.modules import PSSiLU, get_activation
from timm_robust.evaluation.shape import curve_facts, local_lipschitz, minimal_radii, set_shape, square_success
from timm_robust.training.recipe import Recipe
from timm_robust.training.watchdog import Diverged

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def study():
    return module


@pytest.mark.parametrize('path', sorted((ROOT / 'train/studies').glob('*.yaml')), ids=lambda path: path.stem)
def test_the_studies_that_we_ship_are_read(study, path):
    settings, measure, points = study.read_study(path)
    assert len({point.name for point in points}) == len(points) > 10
    assert {point.loss for point in points} == {'pgd_at', 'clean'} and measure['attack'] == 'autoattack'
    Recipe(**{**settings, 'model': 'resnet18_relu'})


def linear(outputs=2, seed=0):
    """A linear classifier of 3 x 4 x 4 images around middle grey, where [0, 1] does not bind."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs)).eval()


def test_minimal_radii_of_a_linear_model_are_margin_over_l1_norm():
    model = linear()
    x = 0.5 + 0.02 * torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(x)
        y = logits.argmax(1)
        weight = model[1].weight
        expected = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).abs().sum()
    y[0] = 1 - y[0]
    expected[0] = 0  # wrong from the start
    found = minimal_radii(model, x, y, largest=0.3, rounds=14, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(found, expected, atol=2 * 0.3 / 2**14 + 1e-5)
    resists = minimal_radii(model, x, y, largest=expected.max().item() / 2, rounds=3)
    assert resists.max().item() == pytest.approx(expected.max().item() / 2)


def test_local_lipschitz_of_a_linear_model_with_one_output_is_its_l1_norm():
    model = linear(outputs=1)
    x = torch.full((3, 3, 4, 4), 0.5)
    found = local_lipschitz(model, x, 0.05, generator=torch.Generator().manual_seed(0))
    assert found == pytest.approx(model[1].weight.abs().sum().item(), rel=1e-3)


def test_square_breaks_all_or_nothing_by_radius():
    model = linear()
    x = 0.5 + 0.02 * torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    assert square_success(model, x, y, eps=0.45, queries=1000) == 1.0
    assert square_success(model, x, y, eps=1e-5, queries=20) == 0.0
    assert square_success(model, x, 1 - y, eps=0.3) == 0.0  # nothing was right


def test_set_shape_freezes_or_lets_learn():
    act = PSSiLU()
    set_shape(act, {'alpha': 3.0})
    assert act.values() == {'alpha': 3.0, 'beta': pytest.approx(1e-8)}
    assert not any(parameter.requires_grad for parameter in act.parameters())
    set_shape(act, {}, learned=True)
    assert all(parameter.requires_grad for parameter in act.parameters())
    with pytest.raises(ValueError, match="PSSiLU has no parameter 'gamma'; it has alpha, beta"):
        set_shape(act, {'gamma': 1.0})


def test_curve_facts_say_what_the_curve_does():
    facts = curve_facts(get_activation('softplus10')())
    assert facts['max_curvature'] == 2.5 and facts['f(-5)'] == pytest.approx(0, abs=1e-6)
    assert curve_facts(get_activation('relu')())['max_curvature'] == float('inf')


STUDY = """
recipe: {model: resnet18, model_kwargs: {width: 2}, dataset: digits, val_size: 20, eps: 0.1,
  steps: 1, eval_steps: 1, epochs: 2, max_steps: 3, batch_size: 700, checkpoint_hist: 1}
measure: {n: 6, attack: pgd, square_queries: 5}
seeds: [0]
sweeps:
  - {act: psilu, parameter: alpha, values: [2, 8]}
  - {act: pssilu, parameter: alpha, values: [1.5], learned: true}
  - {act: relu, loss: [clean, pgd_at]}
"""


@pytest.mark.slow
def test_a_study_trains_measures_and_draws_and_goes_on_where_it_was(study, tmp_path, capsys):
    (tmp_path / 'study.yaml').write_text(STUDY)
    arguments = [str(tmp_path / 'study.yaml'), '-o', str(tmp_path / 'out'), '--publish', str(tmp_path / 'published')]
    assert study.main(arguments) == 0
    rows = list(csv.DictReader((tmp_path / 'published/results.csv').open()))
    assert [(row['act'], row['value'], row['loss']) for row in rows] == [
        ('psilu', '2', 'pgd_at'), ('psilu', '8', 'pgd_at'), ('pssilu', '1.5', 'pgd_at'), ('relu', '', 'clean'),
        ('relu', '', 'pgd_at'),
    ]  # fmt: skip
    assert [row['max_curvature'] for row in rows[:2]] == ['1.0', '4.0'] and rows[3]['max_curvature'] == ''
    assert [row['final_alpha'] for row in rows[:2]] == ['2.0', '8.0']  # frozen
    learned = json.loads((tmp_path / 'out/pssilu-alpha1.5-learned-pgd_at-s0.json').read_text())
    assert learned['final_alpha'] != 1.5 and len(learned['path']['alpha']) == 2
    names = {path.name for path in (tmp_path / 'published').iterdir()}
    assert names == {'results.csv', 'environment.json', 'curves.png', 'curvature.png', 'paths.png'}
    assert json.loads((tmp_path / 'published/environment.json').read_text())['hardware']
    kept = tmp_path / 'out/psilu-alpha2-frozen-pgd_at-s0.json'
    before = kept.stat().st_mtime_ns
    (tmp_path / 'out/relu-frozen-clean-s0.json').unlink()
    assert study.main(arguments) == 0
    assert kept.stat().st_mtime_ns == before and (tmp_path / 'out/relu-frozen-clean-s0.json').is_file()
    assert capsys.readouterr().err.count('5/5 ') == 2


def test_lines_and_kinks_have_places_of_their_own(study, tmp_path, monkeypatch):
    def row(act, curvature, seed=0):
        key = {'act': act, 'parameter': 'alpha', 'value': 1, 'learned': act == 'pssilu', 'loss': 'clean', 'seed': seed}
        return {**key, 'max_curvature': curvature, 'radius': 0.1}

    study.plot_curvature([row('relu', None)], tmp_path / 'kinks.png')  # no curvature that is finite
    figures = []
    monkeypatch.setattr(study, 'save', lambda figure, path: figures.append(figure))
    rows = [row('relu', None), row('psilu', 0.0), row('pssilu', 0.5), row('pssilu', 2.0, seed=1)]
    study.plot_curvature(rows, tmp_path / 'all.png')
    [axis] = figures[0].axes
    places = {c.get_label(): c.lines[0].get_xdata()[0] for c in axis.containers}
    assert places['psilu'] < 0.5 and places['pssilu'] == pytest.approx(1.0) and places['relu'] > 2.0


@pytest.mark.slow
def test_two_points_at_a_time_give_the_same_table(study, tmp_path):
    (tmp_path / 'study.yaml').write_text(STUDY)
    tables = []
    for jobs in ('1', '2'):
        script, out = str(ROOT / 'train/shape_study.py'), tmp_path / jobs
        command = [sys.executable, script, str(tmp_path / 'study.yaml'), '-o', str(out), '--jobs', jobs]
        run = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert run.returncode == 0, run.stderr
        assert '5/5 relu-frozen-pgd_at-s0: clean' in run.stderr
        rows = list(csv.DictReader((out / 'results.csv').open()))
        tables.append([[row[key] for key in ('act', 'value', 'loss', 'n', 'f(-1)', 'max_curvature')] for row in rows])
    assert tables[0] == tables[1] and len(tables[0]) == 5


@pytest.mark.slow
def test_a_point_that_diverges_is_a_result_and_other_settings_are_refused(study, tmp_path, capsys, monkeypatch):
    train = study.train

    def diverge(point, *args):
        if point.name == 'psilu-alpha8-frozen-pgd_at-s0':
            raise Diverged('the loss is nan at step 1; the run stops')
        return train(point, *args)

    monkeypatch.setattr(study, 'train', diverge)
    (tmp_path / 'study.yaml').write_text(STUDY.replace('[clean, pgd_at]', 'pgd_at'))
    arguments = [str(tmp_path / 'study.yaml'), '-o', str(tmp_path / 'out')]
    assert study.main(arguments) == 0
    assert '2/4 psilu-alpha8-frozen-pgd_at-s0: diverged' in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / 'out/results.csv').open()))
    assert [row['clean_acc'] != '' for row in rows] == [True, False, True, True]
    (tmp_path / 'study.yaml').write_text(STUDY.replace('eps: 0.1', 'eps: 0.2'))
    assert study.main(arguments) == 2
    assert 'was measured with other settings; name another folder with -o' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('parameter: alpha, values: [2, 8]', 'psilu has no parameter'),
        ('seeds: [0]', 'unknown key seed; allowed: recipe, measure, seeds, sweeps'),
        ('loss: [clean, pgd_at]', 'a sweep: unknown key los; allowed: act, parameter'),
        ('attack: pgd', "attack 'fab' is unknown; allowed: autoattack, apgd, pgd"),
        ('values: [2, 8]}', 'needs act, and parameter and values together or neither'),
    ],
)
def test_what_a_study_cannot_mean_is_refused(study, tmp_path, capsys, change, message):
    wrong = {'parameter: alpha, values: [2, 8]': 'parameter: gamma, values: [2, 8]', 'seeds: [0]': 'seed: [0]',
             'attack: pgd': 'attack: fab', 'values: [2, 8]}': 'value: 2}'}  # fmt: skip
    text = STUDY.replace(change, wrong.get(change, 'los: [clean, pgd_at]'))
    (tmp_path / 'study.yaml').write_text(text)
    assert study.main([str(tmp_path / 'study.yaml'), '-o', str(tmp_path / 'out')]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(f'/proc/self/task/{os.getpid()}/children').is_file(), reason='needs /proc/PID/task/PID/children'
)
def test_workers_end_with_a_study_that_is_killed(tmp_path):
    (tmp_path / 'study.yaml').write_text(STUDY.replace('epochs: 2, max_steps: 3', 'epochs: 10000'))
    command = [sys.executable, str(ROOT / 'train/shape_study.py'), str(tmp_path / 'study.yaml'), '--jobs', '2', '-o']
    with (tmp_path / 'log').open('w') as log:
        run = subprocess.Popen([*command, str(tmp_path / 'out')], stderr=log)
    try:
        wait_for(lambda: len(list(tmp_path.glob('out/*/args.yaml'))) == 2, run)
    finally:
        workers = Path(f'/proc/{run.pid}/task/{run.pid}/children').read_text().split()
        run.kill()
        run.wait()
    assert len(workers) >= 2
    wait_for(lambda: not any(alive(pid) for pid in workers))


def wait_for(happened, run=None):
    for _ in range(1200):
        if happened():
            return
        assert run is None or run.poll() is None, 'the study ended'
        time.sleep(0.1)
    raise AssertionError('it did not happen in two minutes')


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError):
        return False
