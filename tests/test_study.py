"""Studies: what their files mean, what they train and measure, and what they say was found."""

import csv
import json
import os
import re
import runpy
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import warm
from tiny_runs import tiny

from timm_robust.results import mean_interval
from timm_robust.study import command, plots, points
from timm_robust.study.design import read_study
from timm_robust.study.findings import by_seed, differences, findings, read_points, write_findings
from timm_robust.training import build, fit
from timm_robust.training.watchdog import Diverged

ROOT = Path(__file__).parents[1]
SCRIPT = ['-m', 'timm_robust.cli', 'study']


@pytest.mark.parametrize('path', sorted((ROOT / 'train/studies').glob('*.yaml')), ids=lambda path: path.stem)
def test_the_studies_that_we_ship_are_read(path):
    study = read_study(path)
    assert len(study.points) >= 15 and len(study.seeds) >= 2


STUDY = """
recipe: {model: resnet18, model_kwargs: {width: 2}, dataset: digits, val_size: 20, eps: 0.1,
  steps: 1, eval_steps: 1, epochs: 2, max_steps: 3, batch_size: 700, checkpoint_hist: 1}
measure: {n: 6, attack: pgd, square_queries: 5}
seeds: [0]
sweeps:
  - {act: psilu, alpha: [2, 8]}
  - {act: pssilu, alpha: [1.5], learned: true}
  - {act: relu, loss: [clean, pgd_at]}
"""


@pytest.mark.slow
def test_a_study_trains_measures_and_draws_and_goes_on_where_it_was(tmp_path, capsys):
    (tmp_path / 'study.yaml').write_text(STUDY)
    arguments = [str(tmp_path / 'study.yaml'), '-o', str(tmp_path / 'out'), '--publish', str(tmp_path / 'published')]
    assert command.main(arguments) == 0
    rows = list(csv.DictReader((tmp_path / 'published/results.csv').open()))
    assert [row['arm'] for row in rows] == [
        'psilu-alpha2-frozen-pgd_at', 'psilu-alpha8-frozen-pgd_at', 'pssilu-alpha1.5-learned-pgd_at',
        'relu-frozen-clean', 'relu-frozen-pgd_at',
    ]  # fmt: skip
    assert [row['max_curvature'] for row in rows[:2]] == ['1.0', '4.0'] and rows[3]['max_curvature'] == ''
    assert [row['final_alpha'] for row in rows[:2]] == ['2.0', '8.0']  # frozen
    points = [json.loads(line) for line in (tmp_path / 'published/points.jsonl').read_text().splitlines()]
    learned = points[2]
    assert learned['final_alpha'] != 1.5 and len(learned['path']['alpha']) == 2
    names = {path.name for path in (tmp_path / 'published').iterdir()}
    assert names == {'points.jsonl', 'results.csv', 'findings.md', 'accuracy.png', 'curves.png', 'curvature.png',
                     'paths.png'}  # fmt: skip
    robust, clean = (by_seed('relu-frozen-pgd_at', points, key)[0] for key in ('robust', 'clean_correct'))
    assert robust.shape == clean.shape == (6,) and robust.mean() == pytest.approx(float(rows[4]['pgd_acc']))
    assert (robust <= clean).all()
    assert learned['commits'] == [learned['environment']['commit']]
    assert learned['environment']['hardware'] and rows[0]['rollbacks'] == '0' and rows[3]['max_curvature'] == ''
    lines = (tmp_path / 'published/points.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'published/points.jsonl').write_text(''.join(lines[:3] + lines[4:]))
    (tmp_path / 'published/findings.md').unlink()
    shutil.rmtree(tmp_path / 'out')  # what is published is enough to go on
    assert command.main(arguments) == 0
    again = (tmp_path / 'published/points.jsonl').read_text().splitlines(keepends=True)
    assert again[:3] + again[4:] == lines[:3] + lines[4:] and json.loads(again[3])['arm'] == 'relu-frozen-clean'
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['relu-frozen-clean-s0']
    assert command.main(arguments) == 0 and capsys.readouterr().err.count('5/5 ') == 2


def test_lines_and_kinks_have_places_of_their_own(tmp_path, monkeypatch):
    def row(act, curvature, seed=0):
        key = {'arm': act, 'act': act, 'learned': act == 'pssilu', 'loss': 'clean', 'seed': seed}
        return {**key, 'max_curvature': curvature, 'radius': 0.1}

    plots.plot_curvature([row('relu', None)], tmp_path / 'kinks.png')  # no curvature that is finite
    figures = []
    monkeypatch.setattr(plots, 'save_figure', lambda figure, path, dpi: figures.append(figure))
    rows = [row('relu', None), row('psilu', 0.0), row('pssilu', 0.5), row('pssilu', 2.0, seed=1)]
    plots.plot_curvature(rows, tmp_path / 'all.png')
    [axis] = figures[0].axes
    places = {c.get_label(): c.lines[0].get_xdata()[0] for c in axis.containers}
    assert places['psilu'] < 0.5 and places['pssilu'] == pytest.approx(1.0) and places['relu'] > 2.0
    for curvatures in ((0.5, 0.8), (3.0, 20.0)):  # all on one side of a claim
        rows = [row(f'act{number}', value) for number, value in enumerate(curvatures)]
        plots.plot_curvature(rows, tmp_path / 'one_side.png')
        bars = [line.get_xdata() for line in figures[-1].axes[0].lines if line.get_linewidth() == 3]
        assert len(bars) == 3 and all(left < right for left, right in bars)
        assert [tuple(bars[0]), bars[1][1], bars[2][0]] == [(4, 10), 1, 1]


@pytest.mark.slow
def test_two_points_at_a_time_give_the_same_table(tmp_path):
    less = STUDY.replace('  - {act: psilu, alpha: [2, 8]}\n', '').replace('square_', 'landscape: false, square_')
    (tmp_path / 'study.yaml').write_text(less)
    words, tables = [str(tmp_path / 'study.yaml'), '-o'], []
    assert command.main([*words, str(tmp_path / '1')]) == 0
    run = warm.run([*SCRIPT, *words, tmp_path / '2', '--jobs', '2'], timeout=500)
    assert run.returncode == 0, run.stderr
    assert '3/3 ' in run.stderr and ' relu-frozen-pgd_at-s0: clean' in run.stderr
    for out in (tmp_path / '1', tmp_path / '2'):
        rows = list(csv.DictReader((out / 'results.csv').open()))
        tables.append([[row[key] for key in ('arm', 'loss', 'n', 'f(-1)', 'max_curvature')] for row in rows])
    assert tables[0] == tables[1] and len(tables[0]) == 3


@pytest.mark.slow
def test_a_point_that_diverges_is_a_result_and_other_settings_are_refused(tmp_path, capsys, monkeypatch):
    train = points.train

    def diverge(arm, *args):
        if arm.name == 'psilu-alpha8-frozen-pgd_at':
            raise Diverged(f'{tmp_path} holds the last good state') from Diverged('the loss is nan at step 1')
        return train(arm, *args)

    monkeypatch.setattr(points, 'train', diverge)
    (tmp_path / 'study.yaml').write_text(STUDY.replace('[clean, pgd_at]', 'pgd_at'))
    arguments = [str(tmp_path / 'study.yaml'), '-o', str(tmp_path / 'out')]
    assert command.main(arguments) == 0
    assert '2/4 psilu-alpha8-frozen-pgd_at-s0: diverged' in capsys.readouterr().err
    kept = (tmp_path / 'out/points.jsonl').read_text()
    assert '"diverged": "the loss is nan at step 1"' in kept and str(tmp_path) not in kept
    rows = list(csv.DictReader((tmp_path / 'out/results.csv').open()))
    assert [row['clean_acc'] != '' for row in rows] == [True, False, True, True]
    (tmp_path / 'study.yaml').write_text(STUDY.replace('eps: 0.1', 'eps: 0.2'))
    assert command.main(arguments) == 2
    assert 'points.jsonl, line 1: psilu-alpha2-frozen-pgd_at-s0 comes from other settings' in capsys.readouterr().err


SMALL = {
    'recipe': '{model: resnet18, model_kwargs: {width: 2}, dataset: digits, eps: 0.1}',
    'measure': '{n: 2, attack: pgd}',
    'seeds': '[0, 1]',
    'sweeps': '[{act: psilu, alpha: [2]}, {act: relu, name: plain, settings: {epochs: 3}}]',
    'claims': '[{claim: it helps, more: psilu-alpha2-frozen-pgd_at, than: plain}]',
}


def small(tmp_path, **changes):
    path = tmp_path / 'study.yaml'
    path.write_text(''.join(f'{name}: {text}\n' for name, text in (SMALL | changes).items()))
    return path


def test_values_of_two_parameters_go_together(tmp_path):
    study = read_study(small(tmp_path, sweeps='[{act: pssilu, alpha: [1, 0.9], beta: [0.3, 0.1]}]', claims='[]'))
    assert [arm.shape for arm in study.arms] == [{'alpha': 1, 'beta': 0.3}, {'alpha': 0.9, 'beta': 0.1}]
    assert study.arms[1].name == 'pssilu-alpha0.9-beta0.1-frozen-pgd_at'


def test_a_seed_is_finished_before_the_next_and_an_arm_has_settings_of_its_own(tmp_path):
    study = read_study(small(tmp_path), 'elsewhere')
    names = [f'{arm.name}-s{seed}' for arm, seed in study.points]
    psilu = 'psilu-alpha2-frozen-pgd_at'
    assert names == [f'{psilu}-s0', 'plain-s0', f'{psilu}-s1', 'plain-s1']
    other, plain = study.arms
    assert plain.recipe == {**other.recipe, 'model': 'resnet18_relu', 'epochs': 3}
    assert plain.recipe['data_dir'] == 'elsewhere'
    same = read_study(small(tmp_path, seeds='[0]', claims='[]'))
    assert [same.settings(arm) for arm in same.arms] == [study.settings(arm) for arm in study.arms]
    changed = read_study(small(tmp_path, measure='{n: 3, attack: pgd}'))
    assert changed.settings(changed.arms[0]) != study.settings(other)


def test_findings_pair_by_seed_and_image(tmp_path):
    study = read_study(small(tmp_path, measure='{n: 1000, attack: apgd}', seeds='[0, 1, 2]'))
    rng, rows = np.random.default_rng(0), []

    def row(arm, seed, robust):
        return {'arm': arm, 'seed': seed, 'clean_correct': '1' * 1000, 'robust': ''.join('01'[bit] for bit in robust)}

    for seed in (0, 1, 2):
        plain = rng.random(1000) < 0.4 + 0.1 * seed  # seeds differ by much more than the arms
        better = plain | (rng.random(1000) < 0.03)
        rows += [row('plain', seed, plain * 1), row('psilu-alpha2-frozen-pgd_at', seed, better * 1)]
    text = '\n'.join(findings(study, rows))
    effect = np.mean(
        [int(a != b) for i in (0, 2, 4) for a, b in zip(rows[i]['robust'], rows[i + 1]['robust'], strict=True)]
    )
    arms = 'psilu-alpha2-frozen-pgd_at - plain'
    assert f'| it helps | {arms} | 3 of 3 | +0.0 (+0.0 to +0.0) | +{100 * effect:.1f} (' in text
    assert text.startswith(
        'Robust: still right under APGD-CE + APGD-T, Linf 25.5/255, on the first 1000 images of digits, test'
    )
    assert 'Of 1 such claims about\n0.05 would be, on average' in text
    assert '| shown |\n\nIntervals are 95 %' in text and '| plain | 3 | 100.0 (' in text
    turned = [{**r, 'arm': {'plain': 'psilu-alpha2-frozen-pgd_at'}.get(r['arm'], 'plain')} for r in rows]
    assert '| contradicted |' in '\n'.join(findings(study, turned))
    alone = '\n'.join(findings(study, rows[:1]))
    assert '| 0 of 3 |  |  | not yet |' in alone and '| psilu-alpha2-frozen-pgd_at | 0 |  |  |  |' in alone
    places = {'environment': {'commit': 'b'}, 'commits': ['a', 'b']}, {'environment': {'commit': None}}
    resumed = [row | place for row, place in zip(rows, places, strict=False)]
    assert 'Networks by commit: 1 at a and b, 1 at none.' in findings(study, resumed)
    same = [{**rows[0], 'arm': r['arm'], 'seed': r['seed']} for r in rows]
    assert '| 3 of 3 | +0.0 (+0.0 to +0.0) | +0.0 (+0.0 to +0.0) | not shown |' in '\n'.join(findings(study, same))


def test_a_claim_waits_for_every_pair_and_is_not_shown_where_a_seed_is_lost(tmp_path):
    study = read_study(small(tmp_path, seeds='[0, 1, 2]'))
    psilu = {'arm': 'psilu-alpha2-frozen-pgd_at', 'clean_correct': '1111', 'robust': '1110'}
    plain = {'arm': 'plain', 'clean_correct': '1111', 'robust': '1000'}
    rows = [{**arm, 'seed': seed} for seed in (0, 1, 2) for arm in (psilu, plain)]
    equal = '\n'.join(findings(study, rows))
    assert '| 3 of 3 | +0.0 (+0.0 to +0.0) | +50.0 (-41.9 to +141.9) | not shown |' in equal  # the images differ
    assert '| 2 of 3 | +0.0 | +50.0 | not yet |' in '\n'.join(findings(study, rows[:5]))
    two = read_study(small(tmp_path, seeds='[0, 1]'))
    few = [
        {**row, 'robust': '1' * 990 + 10 * str(row['seed']) if row['arm'] != 'plain' else '0' * 1000}
        for row in rows[:4]
    ]
    assert mean_interval(differences(two.claims[0], few[:4], 'robust'), other_images=True)[1] > 0.9  # by chance of two
    assert '| +99.5 | not shown (2 of the 3 seeds that a claim takes) |' in '\n'.join(findings(two, few[:4]))
    for lost in (4, 5):  # of the arm that is said to be better, and of the other
        fallen = [*rows[:lost], {'arm': rows[lost]['arm'], 'seed': 2, 'diverged': 'the loss is nan'}, *rows[lost + 1 :]]
        text = '\n'.join(findings(study, fallen))
        assert '| 2 of 3 | +0.0 | +50.0 | not shown (1 seed lost) |' in text
        assert f'Diverged: {rows[lost]["arm"]}-s2.' in text


def test_a_network_without_an_activation_of_its_own_is_refused(tmp_path):
    words = 'model: resnet50, dataset: digits, img_size: 32, batch_size: 4, val_size: 20, eps: 0.1'
    path = tmp_path / 'imagenet.yaml'
    path.write_text(f'recipe: {{{words}}}\nseeds: [0]\nsweeps: [{{act: silu}}]\n')
    with pytest.raises(ValueError, match=r'resnet50_silu has no one activation .*as resnet18_silu has; change model'):
        points.run_point(read_study(path), read_study(path).arms[0], 0, tmp_path / 'out')


def test_a_training_goes_on_in_its_own_folder_alone(tmp_path, monkeypatch):
    def begin(changed):
        [arm] = read_study(small(tmp_path, sweeps=changed, claims='[]')).arms
        points.train(arm, 0, 'one-s0', tmp_path)

    monkeypatch.setattr(points, 'build', lambda recipe: 1 / 0)
    sweeps = '[{name: one, act: psilu, alpha: [2], learned: true}]'
    for _ in range(2):  # it begins, and goes on
        with pytest.raises(ZeroDivisionError):
            begin(sweeps)
    for changed in (sweeps.replace('[2]', '[3]'), sweeps.replace('true', 'false')):
        with pytest.raises(ValueError, match='one-s0 holds a training with other settings; delete it, or name'):
            begin(changed)


def test_images_are_held_against_what_is_kept_before_the_first_training(tmp_path, capsys):
    study = read_study(small(tmp_path))
    plain = {'arm': 'plain', 'seed': 0}
    points.check_images(study, [])
    points.check_images(study, [plain | {'diverged': 'the loss is nan'}])
    with pytest.raises(ValueError, match='psilu-alpha2-frozen-pgd_at-s0 and plain-s0 are of different images'):
        points.check_images(study, [plain | {'data_sha256': 'of others'}])
    for measure, match in (('{n: 361}', 'cannot take the first 361'), ('{split: validation}', 'split .* is unknown')):
        assert command.main([str(small(tmp_path, measure=measure)), '-o', str(tmp_path / 'out')]) == 2
        assert re.search(match, capsys.readouterr().err) and not any((tmp_path / 'out').iterdir())


def test_what_another_process_publishes_meanwhile_stays(tmp_path, monkeypatch):
    study, out = read_study(small(tmp_path)), tmp_path / 'out'
    bits = {'clean_acc': 1.0, 'attack': 'pgd', 'pgd_acc': 0.5, 'clean_correct': '11', 'robust': '10'}
    rows = [{'arm': 'plain', 'seed': seed, **bits, 'settings': study.settings(study.arms[1])} for seed in (0, 1)]

    def run(*_):
        write_findings(study, rows[1:], out)  # as another process would
        yield rows[0]

    monkeypatch.setattr(command, 'run_points', run)
    monkeypatch.setattr(command, 'draw', lambda *_: None)
    assert command.main([str(tmp_path / 'study.yaml'), '-o', str(out)]) == 0
    assert read_points(study, out / 'points.jsonl') == rows


def test_points_of_other_settings_and_damaged_lines_are_refused(tmp_path):
    study = read_study(small(tmp_path))
    row = {'arm': 'plain', 'seed': 1, 'attack': 'pgd', 'clean_correct': '11', 'robust': '10'}
    row['settings'] = study.settings(study.arms[1])
    write_findings(study, [row], tmp_path)
    path = tmp_path / 'points.jsonl'
    assert read_points(study, path) == [row] and read_points(study, tmp_path / 'none.jsonl') == []
    for changed in ({'settings': 'old'}, {'seed': 2}, {'arm': 'gone'}):
        path.write_text(json.dumps(row) + '\n' + json.dumps(row | changed) + '\n')
        name = '{arm}-s{seed}'.format(**row | changed)
        with pytest.raises(
            ValueError, match=rf'points\.jsonl, line 2: {name} comes from other settings than the study'
        ):
            read_points(study, path)
    path.write_text(2 * (json.dumps(row) + '\n'))  # as of files that were put together
    with pytest.raises(ValueError, match='line 2: plain-s1 stands there twice; delete one'):
        read_points(study, path)
    for spoiled in ({'robust': '1'}, {'robust': 'yes'}, {'clean_correct': None}, {'attack': None}):
        kept = {key: value for key, value in (row | spoiled).items() if value is not None}
        path.write_text(json.dumps(kept) + '\n')
        with pytest.raises(ValueError, match='plain-s1 lacks results, or those of 2 images; delete the line'):
            read_points(study, path)
    path.write_text(json.dumps({key: row[key] for key in ('arm', 'seed', 'settings')} | {'diverged': 'nan'}) + '\n')
    assert len(read_points(study, path)) == 1
    for text in ('3', '{"arm": "plain"}', '{"arm": "pl'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r'points\.jsonl, line 1 is no point of a study; delete the line'):
            read_points(study, path)


@pytest.mark.slow
def test_runs_that_held_out_other_images_are_not_paired(tmp_path, monkeypatch, capsys):
    script = str(ROOT / 'train/studies/progressive_resizing/measure.py')
    for seed in (0, 1):
        fit(build(tiny(tmp_path, seed=seed, experiment=f's{seed}', max_steps=1)))
    monkeypatch.setattr(sys, 'argv', [script, str(tmp_path / 's0'), str(tmp_path / 's1'), '--data-dir', 'none'])
    with pytest.raises(SystemExit, match='held out different images'):
        runpy.run_path(script)


@pytest.mark.parametrize(
    ('key', 'value', 'match'),
    [
        ('seed', '[0]', 'unknown key seed; allowed: recipe, measure, seeds, sweeps, claims'),
        ('recipe', 'null', 'lacks recipe'),
        ('recipe', '[1]', 'it needs model'),
        ('recipe', '{model: null}', 'it needs model'),
        ('recipe', '{model: nobody}', "'nobody_psilu' is no model in the timm registry"),
        ('recipe', '{model: resnet18, esp: 0.1}', "unknown key 'esp'; did you mean 'eps'"),
        ('recipe', '{model: resnet18, eps: null}', 'eps None is of the wrong kind'),
        ('recipe', '{model: resnet18, seed: 3}', 'seed is set by the study itself'),
        ('measure', 'null', 'None is no mapping of n, attack'),
        ('measure', '{n: null}', 'n None is not allowed; allowed: whole numbers, 1 and more'),
        ('measure', '{attack: fab}', "attack 'fab' is unknown; allowed: autoattack, apgd, pgd"),
        ('measure', '{attack: [1]}', r'attack \[1\] is unknown'),
        ('measure', '{split: 3}', 'split 3 is not allowed; allowed: test, validation'),
        ('measure', '{landscape: 3}', 'landscape 3 is not allowed; allowed: true, false'),
        ('seeds', '3', r'seeds 3 is no list; write seeds: \[...\]'),
        ('seeds', '[null]', 'seed None is of the wrong kind'),
        ('seeds', '[0, 0]', 'seed 0 is given twice'),
        ('sweeps', '[null]', 'sweep None is not of the form'),
        ('sweeps', '[{act: [relu]}]', 'needs act'),
        ('sweeps', '[{act: relu, los: clean}]', 'sweep of relu: unknown key los; allowed: act, learned'),
        ('sweeps', '[{act: relu}, {act: relu}]', 'arm relu-frozen-pgd_at is given twice'),
        ('sweeps', '[{act: psilu, gamma: [2]}]', 'sweep of psilu: unknown key gamma; allowed: act, .*, name, alpha'),
        ('sweeps', '[{act: psilu, alpha: [x]}]', 'allowed: finite numbers, as a list'),
        ('sweeps', '[{act: psilu, alpha: []}]', 'allowed: finite numbers, as a list'),
        ('sweeps', '[{act: pssilu, alpha: [1, 2], beta: [0.1]}]', 'alpha and beta of pssilu go together'),
        ('sweeps', '[{act: relu, loss: null}]', 'loss None is of the wrong kind'),
        ('sweeps', '[{act: relu, learned: 3}]', 'learned 3 is not allowed; allowed: true, false'),
        ('sweeps', '[{act: relu, settings: 3}]', 'settings 3 is no mapping of settings of the recipe'),
        ('sweeps', '[{act: relu, settings: {seed: 3}}]', 'seed is no setting of a sweep; leave it out'),
        ('sweeps', '[{act: relu, settings: {esp: 3}}]', "unknown key 'esp'; did you mean 'eps'"),
        ('sweeps', '[{act: relu, name: ../up}]', "name '../up' is not allowed; allowed: letters, digits"),
        ('sweeps', '[{act: psilu, name: two, learned: [true, false]}]', 'for a sweep of one arm'),
        ('sweeps', '[{act: relu, learned: true}]', 'relu has no parameters to learn; leave learned out'),
        (
            'sweeps',
            '[{act: psilu, learned: true}, {act: psilu, alpha: [1], learned: true}]',
            'psilu-alpha1-learned-pgd_at is the same training as psilu-learned-pgd_at; leave one out',
        ),
        (
            'sweeps',
            '[{act: relu}, {act: silu, settings: {eps: 0.2}}]',
            r'silu-frozen-pgd_at is trained and attacked at Linf 51/255, relu-frozen-pgd_at at Linf 25\.5/255',
        ),
        ('sweeps', '[{act: relu, loss: []}]', 'hold no point'),
        ('claims', '[3]', 'a claim: 3 is no mapping of claim, more, than'),
        ('claims', '[{claim: x, more: plain}]', 'a claim lacks than; write {claim: TEXT, more: ARM, than: ARM}'),
        ('claims', '[{claim: x, more: plain, than: plain}]', 'plain cannot be more robust than itself; name two arms'),
        ('claims', '[{claim: x, more: plain, than: silu}]', "no arm is called 'silu'; there are psilu-alpha2-frozen"),
    ],
)
def test_what_a_study_cannot_mean_is_one_line(key, value, match, tmp_path, capsys):
    assert command.main([str(small(tmp_path, **{key: value})), '-o', str(tmp_path / 'out')]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and error.startswith('error: ') and not (tmp_path / 'out').exists()
    assert re.search(match, error), error


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(f'/proc/self/task/{os.getpid()}/children').is_file(), reason='needs /proc/PID/task/PID/children'
)
def test_workers_end_with_a_study_that_is_killed(tmp_path):
    (tmp_path / 'study.yaml').write_text(STUDY.replace('epochs: 2, max_steps: 3', 'epochs: 10000'))
    words = [*SCRIPT, str(tmp_path / 'study.yaml'), '--jobs', '2', '-o', str(tmp_path / 'out')]
    with (tmp_path / 'log').open('w') as log:
        run = warm.Popen(words, stderr=log)
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


def test_a_fault_of_one_network_lets_the_others_end_and_begins_no_more(tmp_path, monkeypatch):
    study, begun, heard = read_study(small(tmp_path, seeds='[0, 1, 2]')), [], threading.Event()

    def run_point(_, arm, seed, output):
        begun.append((arm.name, seed))
        if (arm, seed) == study.points[0]:
            raise ValueError('it does not fit')
        assert heard.wait(60)
        return {'arm': arm.name, 'seed': seed}

    monkeypatch.setattr(points, 'run_point', run_point)
    monkeypatch.setattr(points._logger, 'warning', lambda *_: heard.set())
    monkeypatch.setattr(points, 'ProcessPoolExecutor', lambda jobs, **_: ThreadPoolExecutor(jobs))
    rows = []
    with pytest.raises(ValueError, match='it does not fit'):
        rows.extend(row['arm'] for row in points.run_points(study, [], tmp_path, 2))
    assert rows == ['plain'] and len(begun) == 2


def test_settings_that_recipes_had_not_yet_are_taken_for_their_defaults(tmp_path):
    study = read_study(small(tmp_path))
    kept = study.settings(study.arms[1])
    assert kept['recipe']['momentum'] == 0.9 and kept['recipe']['epochs'] == 3  # of no line of the file, and of one
    assert study.accepts(study.arms[1], kept)
    del kept['recipe']['momentum']
    assert study.accepts(study.arms[1], kept)
    for name in ('epochs', 'model_kwargs'):  # which the study has set since
        less = {key: value for key, value in kept['recipe'].items() if key != name}
        assert not study.accepts(study.arms[1], kept | {'recipe': less})
    for name, value in (('weight_decay', 0.1), ('gone_since', 1)):
        assert not study.accepts(study.arms[1], kept | {'recipe': kept['recipe'] | {name: value}})
