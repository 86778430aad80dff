import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from timm_robust import files
from timm_robust.files import atomic_file, atomic_folder, recover_folder
from timm_robust.provenance import environment, git_commit, public_name
from timm_robust.results import _T, RobustnessResult, mean_interval


def result(**changes) -> RobustnessResult:
    values = {
        'model': 'resnet18_pssilu.at_cifar10_linf', 'dataset': 'cifar10', 'split': 'test', 'n': 1000,
        'norm': 'Linf', 'eps': 8 / 255, 'eps_text': '8/255', 'attack': 'autoattack', 'attack_version': 'standard',
        'steps': 10, 'step_size': 2 / 255, 'restarts': 1, 'clean_acc': 0.84, 'pgd_acc': 0.52, 'apgd_acc': 0.5,
        'autoattack_acc': 0.485, 'seed': 0, 'batch_size': 250, 'dtype': 'float32', 'wall_time_s': 12.5,
        'images_per_s': 80.0, 'hardware': 'a CPU, 2 CPU cores', 'versions': {'torch': '2.4', 'pyautoattack': None},
        'commit': None, 'date': '2026-01-01T00:00:00+00:00', 'per_attack': {'apgd-ce': 0.51, 'apgd-t': 0.5},
        'warnings': ['it seems to be a dynamic defense!'], 'rejected': 2, 'mean_distance': 0.03, 'max_distance': 0.0314,
    }  # fmt: skip
    return RobustnessResult(**(values | changes))


def test_json_round_trip_is_exact(tmp_path):
    path = tmp_path / 'results.json'
    path.write_text('old')
    result().to_json(path)
    assert RobustnessResult.from_json(path) == result()
    assert list(json.loads(path.read_text())) == [f.name for f in dataclasses.fields(RobustnessResult)]
    assert [p.name for p in tmp_path.iterdir()] == ['results.json']
    assert json.loads(result().to_line()) == json.loads(path.read_text()) and '\n' not in result().to_line()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'results.json'
    path.write_text('old')
    with pytest.raises(ValueError, match='JSON compliant'):
        result(wall_time_s=float('nan')).to_json(path)
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b'half')
        raise KeyboardInterrupt
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError, match='mkdir -p'):
        result().to_json(tmp_path / 'none' / 'results.json')


def replace_folder(target):
    with atomic_folder(target) as new:
        (new / 'file').write_text('new')


@pytest.mark.parametrize('exchange', [True, False], ids=['exchanged', 'renamed'])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    target = tmp_path / 'a[b].c'
    if not exchange:
        monkeypatch.setattr(files, '_exchange', lambda *paths: False)
    for _ in range(2):
        replace_folder(target)
        (target / 'file').write_text('old')
    replace_folder(target)
    assert (target / 'file').read_text() == 'new' and [path.name for path in tmp_path.iterdir()] == ['a[b].c']
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as new:
        (new / 'file').write_text('half')
        raise KeyboardInterrupt
    assert (target / 'file').read_text() == 'new' and [path.name for path in tmp_path.iterdir()] == ['a[b].c']


@pytest.mark.parametrize('step', [1, 2])
def test_a_rename_that_fails_or_is_killed_leaves_the_old_folder(tmp_path, monkeypatch, step):
    target, count = tmp_path / 'a[b].c', []
    rename = Path.rename

    def failing(path, to):
        count.append(path)
        if len(count) == step:
            raise OSError('refused')
        return rename(path, to)

    def killed(path, to):
        count.append(path)
        if len(count) == step:
            os._exit(9)
        return rename(path, to)

    replace_folder(target)
    (target / 'file').write_text('old')
    monkeypatch.setattr(files, '_exchange', lambda *paths: False)
    with monkeypatch.context() as patch, pytest.raises(OSError, match='refused'):
        patch.setattr(Path, 'rename', failing)
        replace_folder(target)
    assert (target / 'file').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
    count.clear()
    if not (child := os.fork()):
        Path.rename = killed
        replace_folder(target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert target.exists() == (step == 1)
    recover_folder(target)
    assert (target / 'file').read_text() == 'old'
    replace_folder(target)
    assert (target / 'file').read_text() == 'new'


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no renameat2')
def test_here_two_folders_change_names_in_one_step(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'file').write_text(name)
    assert files._exchange(tmp_path / 'a', tmp_path / 'b') and (tmp_path / 'a/file').read_text() == 'b'
    assert not files._exchange(tmp_path / 'a', tmp_path / 'absent')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{', 'is not JSON'),
        ('[]', 'holds a list'),
        ('{"clean_ac": 0.5}', "'clean_ac' is unknown; did you mean 'clean_acc'"),
        ('{"model": "m"}', 'lacks dataset, split, n, '),
    ],
)
def test_reading_is_strict(tmp_path, text, message):
    path = tmp_path / 'results.json'
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        RobustnessResult.from_json(path)


def test_values_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match='pgd_acc must be a fraction'):
        result(pgd_acc=52.0)
    with pytest.raises(ValueError, match='apgd-t must be a fraction'):
        result(per_attack={'apgd-t': -0.1})
    with pytest.raises(ValueError, match='allowed: autoattack, apgd, pgd, none'):
        result(attack='fgsm')
    with pytest.raises(dataclasses.FrozenInstanceError):
        result().n = 5


def test_models_are_named_without_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', '/home/alice')
    names = {
        'resnet18_pssilu.at_cifar10_linf': 'resnet18_pssilu.at_cifar10_linf',
        'hf-hub:org/repo': 'hf-hub:org/repo',
        '/data/runs/out/run1/best.pth.tar': 'run1/best.pth.tar',
        './best.pth': 'best.pth',
        '../best.pth': 'best.pth',
        '/home/alice/best.pth': 'best.pth',
        '~/best.pth': 'best.pth',
        '~/run/best.pth': 'run/best.pth',
        'local-dir:/data/a/b': 'local-dir:a/b',
        '/best.pth': 'best.pth',
        '/home/alice/run:1/best.pth': 'run:1/best.pth',
    }
    for spec, name in names.items():
        assert public_name(spec) == name == public_name(name)
    assert result(model=str(tmp_path / 'run' / 'best.pth')).model == 'run/best.pth'


def test_the_table_shows_what_was_measured():
    text = result().table()
    for part in (
        '84.00 %  (840 of 1000)',
        'PGD-10 ',
        '48.50 %',
        'Linf 8/255',
        'after apgd-t',
        'dynamic',
        '2 adversarial',
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
    assert 'AutoAttack' not in result(autoattack_acc=None).table()


def test_environment_names_hardware_and_versions(monkeypatch):
    found = environment('cpu')
    assert re.search(r', \d+ CPU cores?$', found['hardware'])
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {3}, raising=False)
    assert environment('cpu')['hardware'].endswith(', 1 CPU core')
    assert set(found['versions']) == {'python', 'torch', 'timm', 'timm_robust', 'pyautoattack'}
    assert found['versions']['timm'] and type(found['versions']['torch']) is str
    json.dumps(found)


def test_git_commit_knows_a_change(tmp_path):
    def git(*command: str) -> None:
        who = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
        subprocess.run(['git', '-C', str(tmp_path), *who, *command], check=True, capture_output=True)

    assert git_commit(tmp_path) is None
    git('init')
    package = tmp_path / 'package'
    package.mkdir()
    (package / 'a.py').write_text('1')
    assert git_commit(package) is None
    git('add', '.')
    git('commit', '-m', 'first')
    commit = git_commit(package)
    assert commit is not None and len(commit) == 40
    Path(tmp_path / 'notes').write_text('outside the package')
    assert git_commit(package) == commit
    (package / 'a.py').write_text('2')
    assert git_commit(package) == commit + '+dirty'
    (tmp_path / 'installed').mkdir()
    assert git_commit(tmp_path / 'installed') is None


def test_an_interval_over_trainings_covers_what_they_and_their_verdicts_differ_by():
    rng = np.random.default_rng(3)
    for trainings, deviation in ((3, 0.0), (3, 0.04), (5, 0.01)):
        covered = 0
        for _ in range(400):
            shares = 0.6 + deviation * rng.normal(size=(trainings, 1))
            values = (rng.random((trainings, 500)) < shares).astype(float)
            mean, low, high = mean_interval(values)
            covered += low <= 0.6 <= high
            assert mean == pytest.approx(values.mean())
        assert 370 <= covered <= 392  # 380, and 2.3 standard errors more or less
    assert mean_interval(np.array([[0.0, 1.0], [1.0, 1.0]])) == pytest.approx(
        (0.75, 0.75 - 12.706 / 4, 0.75 + 12.706 / 4)
    )
    assert mean_interval(np.ones((30, 2))) == mean_interval(np.ones((30, 2)), other_images=True) == (1, 1, 1)
    mean, low, high = mean_interval(np.ones((1, 4)))
    assert mean == 1 and np.isnan([low, high]).all()
    with pytest.raises(ValueError, match=r'shape \[3\] are not'):
        mean_interval(np.ones(3))


def test_an_interval_for_other_images_covers_what_images_differ_by():
    rng, covered, narrow = np.random.default_rng(4), 0, 0
    for _ in range(400):
        gain = rng.normal(0, 0.6, size=300)  # of an image, by one arm against the other; 0 in the mean of all images
        hardness = rng.normal(0, 1.5, size=300)
        left, right = (
            hardness + side * gain / 2 + rng.normal(0, 0.05, size=(5, 1)) + rng.normal(0, 0.4, size=(5, 300)) > 0
            for side in (1, -1)
        )
        values = left.astype(float) - right
        mean, low, high = mean_interval(values, other_images=True)
        covered += low <= 0 <= high
        assert mean == pytest.approx(values.mean())
        _, low, high = mean_interval(values)
        narrow += low <= 0 <= high
    assert 370 <= covered <= 398 and narrow < 350


def test_an_interval_for_other_images_by_hand():
    values = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 4.0]])
    # rows 1, 7/3 and columns 1, 1, 3 around 5/3: mean squares of trainings 8/3, images 8/3, residuals 2/3
    square, free = 8 / 3 + 8 / 3 - 2 / 3, (14 / 3) ** 2 / ((8 / 3) ** 2 + (8 / 3) ** 2 / 2 + (2 / 3) ** 2 / 2)
    around = {1: 12.706, 2: 4.303}[int(free)] * (square / 6) ** 0.5
    assert mean_interval(values, other_images=True) == pytest.approx((5 / 3, 5 / 3 - around, 5 / 3 + around))


def test_the_table_of_students_t_is_right():
    stats = pytest.importorskip('scipy.stats')
    assert stats.t.ppf(0.975, range(1, len(_T) + 1)) == pytest.approx(_T, abs=5e-4)
