import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import app
import attack
import gpu_smoke
import numpy as np
import pytest
import timm
import torch
import train_step
import turns
from peers import Peer, pgd_at_step

import timm_robust  # noqa: F401

SERVE = f'import json, sys\nsys.path.insert(0, {str(Path(turns.__file__).parent)!r})\nfrom turns import serve\n'


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'resnet18_silu', 'resnet18_relu', 'wrn28_10_pssilu'])
def test_the_peers_network_is_ours(name):
    torch.manual_seed(0)
    kwargs = {'width': 8} if name.startswith('resnet18') else {}
    peer = Peer(name, **kwargs).eval()
    model = timm.create_model(name, **kwargs).eval()
    if name.endswith('pssilu'):
        with torch.no_grad():
            peer.act.alpha.fill_(1.3), peer.act.beta.fill_(0.2)
    model.load_state_dict(peer.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(peer(x), model(x), atol=1e-5, rtol=1e-4)


def test_a_missing_peer_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchattacks', None)
    with pytest.raises(ImportError, match=r'pip install --no-deps --target .*peers torchattacks'):
        pgd_at_step(torch.nn.Linear(1, 1), None, torch.zeros(1), torch.zeros(1), 1)


@pytest.mark.slow
def test_cases_take_turns_in_processes_of_their_own(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        f'{SERVE}import os\n'
        'def build(case):\n'
        '    if case["value"] < 0: sys.exit("negative")\n'
        '    count = []\n'
        '    def measure():\n'
        '        count.append(1)\n'
        '        return {"value": case["value"] * len(count), "pid": os.getpid()}\n'
        '    return measure\n'
        'serve(json.loads(sys.argv[2]), build)\n'
    )
    found = turns.take_turns(str(script), {'a': {'value': 1}, 'b': {'value': 10}}, repeats=3)
    assert [one['value'] for one in found['a']] == [2, 3, 4]  # the first is the warm-up
    assert turns.spread([one['value'] for one in found['b']]) == {'median': 30, 'min': 20, 'max': 40}
    assert len({one['pid'] for turns in found.values() for one in turns}) == 2
    with pytest.raises(ChildProcessError, match='ended early'):
        turns.take_turns(str(script), {'a': {'value': -1}}, repeats=1)


def test_a_case_gives_its_memory_back_before_it_answers(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: order.append('emptied'))
    monkeypatch.setattr('builtins.print', lambda text, **_: order.append(json.loads(text)))
    monkeypatch.setattr(sys, 'stdin', ['go', 'go'])
    turns.serve({}, lambda case: lambda: order.append('measured') or {'value': 1})
    assert order == ['measured', 'emptied', {'ready': True, 'value': 1}, *['measured', 'emptied', {'value': 1}] * 2]


@pytest.mark.slow
def test_turns_end_with_the_time_but_there_is_one(tmp_path, capsys):
    script = tmp_path / 'script.py'
    script.write_text(f'{SERVE}serve(json.loads(sys.argv[2]), lambda case: lambda: {{"value": 1}})\n')
    found = turns.take_turns(str(script), {'a': {}, 'b': {}}, repeats=5, until=time.perf_counter() - 1)
    assert found == {'a': [{'value': 1}], 'b': [{'value': 1}]}
    assert 'time is over after 1 of 5 turns' in capsys.readouterr().err


def test_each_table_is_written_when_it_is_done(tmp_path, monkeypatch, capsys):
    def take_turns(script, cases, repeats, until):
        if 'breaks' in cases:
            raise RuntimeError('a case ended early')
        return {name: [{'images_per_s': 2.0}] for name in cases}

    def tables():
        for name in ('first', 'breaks', 'never'):
            yield train_step.Table(name, 'a title', {name: {}}, lambda cases, found: {'rate': len(found)})

    monkeypatch.setattr(train_step, 'take_turns', take_turns)
    args = argparse.Namespace(repeats=5, seconds=100, output=str(tmp_path))
    with pytest.raises(RuntimeError, match='ended early'):
        train_step.measure_tables(tables(), args)
    assert [file.name.partition('-cpu')[0] for file in tmp_path.iterdir()] == ['train_step-first']
    record = json.loads(next(tmp_path.iterdir()).read_text())
    assert record['title'] == 'a title' and record['repeats'] == 1 and record['rows'] == {'rate': 1}
    args.seconds = -1
    train_step.measure_tables(tables(), args)
    assert 'breaks: not begun, for --seconds -1 are over' in capsys.readouterr().out


def test_results_name_hardware_versions_and_commit(tmp_path):
    (tmp_path / 'results').mkdir()
    turns.write('x', {'rows': {}}, str(tmp_path / 'results'), torch.device('cpu'))
    record = json.loads((tmp_path / 'results' / 'x-cpu.json').read_text())
    assert record['benchmark'] == 'x' and record['versions']['torch'] and record['hardware'] and record['rows'] == {}
    turns.write('y', {}, '', torch.device('cpu'))
    assert [file.name for file in (tmp_path / 'results').iterdir()] == ['x-cpu.json']


def test_every_attack_of_the_page_is_timed(capsys):
    assert app.main(['test_resnet', '--repeats', '1']) == 0
    rows = capsys.readouterr().out.splitlines()[-len(app.ATTACKS) :]
    assert [row[:24].strip() for row in rows] == list(app.ATTACKS)
    assert all(float(seconds) >= 0 for row in rows for seconds in row[24:].split())


def test_arithmetic_of_a_step():
    forward = train_step.flops_an_image('resnet18_relu', None, 'pgd_at', 10) / 23
    assert forward == pytest.approx(1.11e9, rel=0.01)  # 0.56 G multiply-adds
    assert train_step.flops_an_image('resnet18_relu', None, 'trades', 10) == 27 * forward
    found = {'a': [{'images_per_s': 2.0}, {'images_per_s': 9.0}], 'b': [{'images_per_s': 1.0}, {'images_per_s': 3.0}]}
    assert train_step.ratio(found, 'a', 'b') == 2.5 and train_step.ratio(found, 'a', 'c') is None


def test_attack_times_are_read_from_what_either_side_says():
    clock = attack.Clock(('robust accuracy after ', ':'))
    clock('apgd-ce - 1/1 - 3 out of 8 successfully perturbed')
    assert not clock.seconds
    clock('robust accuracy after APGD-CE: 62.50% (total time 0.1 s)')
    clock('robust accuracy after APGD-T: 50.00% (total time 0.2 s)')
    assert list(clock.seconds) == ['apgd-ce', 'apgd-t'] and min(clock.seconds.values()) >= 0


def test_attack_report_counts_the_differing_images(capsys):
    found = {
        'peer': [{'seconds': {'apgd-ce': 3.0, 'total': 4.0}, 'robust': [1, 0, 1]}] * 2,
        'ours folded': [
            {'seconds': {'apgd-ce': 1.0, 'total': 2.0}, 'robust': [1, 0, 1]},
            {'seconds': {'apgd-ce': 2.0, 'total': 4.0}, 'robust': [0, 1, 1]},
        ],
    }
    rows = attack.report(found, ('apgd-ce', 'square'), 6)
    ours = rows['ours folded']
    assert ours['differing'] == [0, 2] and ours['robust'] == [2, 2] and ours['x_peer'] == 1.5
    assert ours['seconds']['total'] == {'median': 3, 'min': 2, 'max': 4} and ours['images_per_s'] == 2
    assert ours['seconds']['square']['median'] == 0  # no image was left
    assert '2.00 to 4.00' in capsys.readouterr().out
    assert attack.differing([1, 1], [1, 1]) == 0


def test_both_sides_attack_the_same_images_and_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(attack, 'keep_freed_memory', lambda: False)  # it would hold for the tests that follow
    monkeypatch.setitem(attack.VERSIONS, 'benchmark', ())
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((4, 3, 32, 32), dtype=np.float32))
    case = {'model': 'resnet18_pssilu', 'model_kwargs': {'width': 4}, 'eps': '0.1/255', 'attacks': ['apgd-ce']}
    case |= {'batch_size': 4, 'images': str(tmp_path / 'images.npz')}
    torch.manual_seed(0)
    labels = timm.create_model('resnet18_pssilu', width=4).eval()(x).argmax(1)
    np.savez(case['images'], x=x.numpy(), y=labels.numpy())
    verdicts = {}
    for side in ('peer', 'peer, our network', 'ours folded', 'ours model'):
        once = attack.measure(case | {'side': side})
        assert once() == {}  # the warm-up
        found = once()
        assert set(found['seconds']) == {'apgd-ce', 'total'} and any(found['robust'])
        verdicts[side] = found['robust']
    assert all(flags == verdicts['peer'] for flags in verdicts.values())


def smoke(*words):
    return gpu_smoke.main(['--toy', '--device', 'cpu', '--only', *words])


def rows_of(text):
    """Name of the check -> its result."""
    return {line[:58].strip(): line[58:].split()[0] for line in text.splitlines() if line.startswith(KINDS)}


KINDS = ('kernels: ', 'step: ', 'resume: ', 'validate: ', 'autoattack: ', 'compile: ')


@pytest.mark.slow
def test_the_smoke_test_passes_here(capsys):
    name = 'resnet18_pssilu.fast_cifar10_linf'
    assert smoke('kernels', name) == 0
    rows = rows_of(capsys.readouterr().out)
    assert set(rows.values()) == {'ok'}
    assert {f'{kind}{name}' for kind in KINDS[1:]} < set(rows) and len(rows) == 6 + len(KINDS) - 1


def test_the_smoke_test_steps_with_every_recipe():
    args = argparse.Namespace(toy=True, device='cpu', data_dir=None, batch=8)
    names = [name for name, _ in gpu_smoke.checks(args, Path()) if name.startswith('step: ')]
    assert sorted(names) == sorted(f'step: {path.stem}' for path in gpu_smoke.RECIPES.glob('*.*.yaml'))


def test_a_wrong_kernel_fails_the_smoke_test(monkeypatch, capsys):
    right = gpu_smoke.pssilu
    monkeypatch.setattr(gpu_smoke, 'pssilu', lambda x, alpha, beta: right(x, alpha, beta * 1.001))
    assert smoke('kernels: pssilu eager') == 1
    out = capsys.readouterr().out
    assert rows_of(out) == {'kernels: pssilu eager float32': 'FAILED', 'kernels: pssilu eager bfloat16': 'ok'}
    assert 'value is' in out and '1 of 2 checks failed' in out


def test_a_wrong_compiler_fails_the_smoke_test(monkeypatch, capsys):
    monkeypatch.setattr(torch, 'compile', lambda net, **_: lambda *args: 1.1 * net(*args))
    assert smoke('compile: resnet18', 'kernels: pssilu compiled') == 1
    assert list(rows_of(capsys.readouterr().out).values()) == ['FAILED'] * 3


def test_a_resumed_run_that_differs_fails_the_smoke_test(monkeypatch, capsys):
    def build_otherwise(recipe, build=gpu_smoke.build):
        other = {'lr': 1.1 * recipe.lr, 'allow_changes': True} if recipe.resume else {}
        return build(dataclasses.replace(recipe, **other))

    monkeypatch.setattr(gpu_smoke, 'build', build_otherwise)
    assert smoke('resume: resnet18_pssilu.fgsm') == 1
    assert 'weights differ by' in capsys.readouterr().out


def test_a_check_that_breaks_hides_no_other(monkeypatch, capsys):
    def broken(*args):
        raise ValueError('no such thing')

    monkeypatch.setattr(gpu_smoke, 'build', broken)
    assert smoke('step: resnet18_silu.fgsm', 'kernels: pssilu eager', 'validate: resnet18_pssilu.fgsm') == 1
    out = capsys.readouterr().out
    assert list(rows_of(out).values()) == ['ok', 'ok', 'FAILED', 'FAILED'] and 'ValueError: no such thing' in out
    assert smoke('nothing of this name') == 2
