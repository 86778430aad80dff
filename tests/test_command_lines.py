"""Bad command lines of every entry point: one line on stderr, status 2; in one process, for Python starts slowly."""

import argparse
import importlib
import re

import numpy as np
import pytest
import torch

from timm_robust.command_line import Parser, command, count, whole_number

SCRIPTS = ('activation', 'attack', 'train_step', 'gpu_smoke')


def load(name):
    """A script, or a module of the package."""
    if name in SCRIPTS:
        return importlib.import_module(name)
    return importlib.import_module(f'timm_robust.{name}' + ('.__main__' if name == 'robustbench' else ''))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Files that a stranger may hand in."""
    folder = tmp_path_factory.mktemp('strange')
    labels = {'one': [0] * 8, 'many': [0, 300_000_000] * 4, 'huge': np.array([0, 2**63] * 4, dtype=np.uint64)}
    for name, values in labels.items():
        (folder / name).mkdir()
        for split in ('train', 'test'):
            np.savez(folder / name / f'{split}.npz', image=np.zeros((8, 8, 8, 3), np.uint8), label=np.array(values))
    levels = ''.join(f'  l{i}: &l{i} [' + ', '.join([f'*l{i - 1}'] * 9) + ']\n' for i in range(1, 12))
    texts = {
        'laughs': 'model_kwargs:\n  l0: &l0 [1, 2]\n' + levels,
        'loop': 'model_kwargs: &a {a: *a}\n',
        'deep': 'model: ' + '[' * 3000 + ']' * 3000,
        'long': 'lr: 0.1\n#' + 'x' * 200_000,
    }
    for name, text in texts.items():
        (folder / f'{name}.yaml').write_text(text)
    return folder


DIGITS = ['--dataset', 'digits', '--model', 'resnet18_relu', '--val-size', '20', '--experiment', 'run']
NPZ = ['--model', 'resnet18_relu', '--model-kwargs', 'width=2', '--dataset', 'npz', '--data-dir']
MEASURE = ['resnet18_relu', '--dataset', 'digits', '-n', '2', '--quiet', '--model-kwargs']
BAD = [
    *(
        ('train', [*DIGITS, *flags], match)
        for flags, match in [
            (['--model-kwargs', 'widht=2'], "unexpected keyword argument 'widht'.*it takes .*width=64"),
            (['--model-kwargs', 'width=x'], 'cannot make resnet18_relu with width=x .*width=64'),
            (['--model-kwargs', 'num_classes=3'], 'type --num-classes N'),
            (['--model-kwargs', 'features_only=True'], 'features_only makes no classifier'),
            (['--model-kwargs', 'width=2', '--opt-kwargs', 'foo=1'], "argument 'foo'.*it takes .*nesterov"),
            (['--opt-kwargs', 'lr=1'], 'lr is a setting of its own, none of opt_kwargs; type --lr VALUE'),
            (['--num-classes', '5'], '5 classes are too few: the data has 10'),
            (['--num-classes', '300000000'], 'out of range; allowed: 2 to 100000'),
            (['--eps', '0'], "eps '0' leaves the attack no room; allowed: > 0"),
            (['--norm', 'L2', '--eps', '128'], "write '128/255'"),
            (['--eps', '8/255', '--step-size', '0.5'], r"step_size '0\.5' is wider than the ball, 0\.06275 across"),
            (['--eval-step-size', '2'], "eval_step_size '2' is wider than the ball"),
            (['--start-noise', '5'], 'start_noise 5 is larger than eps'),
            (['--img-size', '1'], 'img_size 1 is out of range; allowed: 8 to 4096'),
            (['--warmup-epochs', '1000'], 'longer than the run of 100 epochs'),
            (['--crop-padding', '40'], 'crop_padding must be 0 to 32'),
            (['--seed', '9' * 25], r'out of range; allowed: 0 to 2\^63 - 1'),
            (['--experiment', '../up'], "experiment '../up' is no name of a folder"),
            (['--bach-size', '3'], "did you mean '--batch-size'"),
            (['-c', 'laughs.yaml'], 'laughs.yaml: not valid YAML: more than 10,000 values'),
            (['-c', 'loop.yaml'], 'more than 10,000 values with what its aliases repeat'),
            (['-c', 'deep.yaml'], 'more than 20 levels of nesting'),
            (['-c', 'long.yaml'], 'more than 100,000 bytes'),
        ]
    ),
    ('train', [*NPZ, 'one', '--val-size', '0', '--batch-size', '4'], 'one class is never wrong'),
    ('train', [*NPZ, 'many'], 'label 300000000 is too large, allowed: up to 99999'),
    ('train', [*NPZ, 'huge'], f'label {2**63} is too large'),
    *(
        ('evaluate', [*MEASURE, *flags], match)
        for flags, match in [
            (['widht=2'], "unexpected keyword argument 'widht'.*it takes .*width=64"),
            (['checkpoint_path=x'], "'checkpoint_path' is no argument of a model's constructor"),
            (['pretrained=3'], 'pretrained=3 is neither True nor False'),
            (['num_classes=300000000'], 'allowed: whole numbers, 2 to 100000'),
            (['width=2', '--eps', '0'], 'leaves the attack no room'),
            (['width=2', '--attack', 'pgd', '--step-size', '0.5'], 'pgd_step_size 0.5 is wider than the ball'),
            (['width=2', '--img-size', '1'], "'1' is not allowed; allowed: whole numbers, 8 to 4096"),
            (['width=2', '-n', '0'], "argument -n: '0' is not allowed; allowed: whole numbers, 1 and more"),
            (['width=2', '--seed', '-1'], 'argument --seed'),
        ]
    ),
    *(
        ('evaluate', line.split(), match)
        for line, match in [
            ('', 'MODEL'),
            ('none.pth.tar --dataset digits', 'none.pth.tar'),
            ('test_resnet', '--data-dir'),
            ('test_resnet --dataset mnist', 'allowed: cifar10'),
            ('test_resnet --dataset digits --split val', 'allowed: train, test'),
            ('test_resnet --dataset digits --attack none', 'the model has 1000 outputs'),
            ('test_resnet --dataset digits --model-kwargs num_classes=10 -n 361', '360'),
            ('test_resnet --dataset digits --model-kwargs num_classes', 'not of the form key=value'),
            ('test_resnet --dataset digits --eps 8', "write '8/255'"),
            ('test_resnet --dataset digits --eps x', 'is not a number'),
            ('test_resnet --dataset digits --norm L1', 'allowed: Linf, L2'),
            ('test_resnet --dataset digits --results-file none/results.json', 'mkdir -p none'),
            ('test_resnet --attack fgsm', 'invalid choice'),
            ('vit_tiny_patch16_224 --dataset digits --model-kwargs num_classes=10', 'does not take images'),
            ('resnet18_relu --dataset npz --data-dir many', 'label 300000000 is too large'),
            ('resnet18_relu --num-classes 2 --dataset npz --data-dir one', 'has one class'),
            ('resnet18_relu --device abacus', "device 'abacus' cannot be used here"),
            ('resnet18_relu --device meta', "device 'meta' cannot be used here"),
        ]
    ),
    ('demo', ['-n', '0'], 'argument -n'),
    ('demo', ['--epochs', '0'], 'argument --epochs'),
    ('demo', ['-n', '361'], 'cannot take the first 361 images of digits; allowed: 1..360'),
    ('publish', ['nobody', '--dry-run'], 'nobody is not staged'),
    ('publish', ['--foo'], "unknown argument '--foo'"),
    ('staging', ['stage', 'nowhere', 'resnet18_relu.at_cifar10_linf'], 'nowhere'),
    ('staging', ['measure', 'x', '--data-dir', 'one', '-n', '0'], 'argument -n'),
    ('robustbench', ['benchmark', 'nobody', '--data-dir', 'one'], "'nobody' is no file"),
    ('robustbench', ['submission', 'x', 'y', '--data-dir', 'one', '--paper', 'loop.yaml'], 'more than 10,000 values'),
    ('activation', ['--elements', '0'], 'argument --elements'),
    ('attack', ['--eps', '0'], 'leaves the attacks no room'),
    ('train_step', ['--models', 'nobody'], 'nobody: no such model'),
    ('gpu_smoke', ['--toy', '--device', 'foo'], "device 'foo' cannot be used here .*; type --device cpu"),
    ('gpu_smoke', ['--toy', '--only', 'nothing'], 'no check has nothing in its name'),
    ('plots', [], 'required: RUN'),
    ('activation', ['--output', 'one/train.npz'], 'one/train.npz'),
    ('publish', ['--tag', 'a b', '--dry-run'], "'a b' is no name of a tag; allowed are letters"),
    ('publish', ['--table', 'nowhere.json'], 'nowhere.json'),
]


@pytest.mark.parametrize(
    ('entry', 'argv', 'match'), BAD, ids=[f'{entry} {" ".join(argv[-2:])}' for entry, argv, _ in BAD]
)
def test_bad_input_is_one_line_and_status_2(entry, argv, match, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr('timm_robust.train.fit', lambda *_: pytest.fail('it was accepted'))
    try:
        status = load(entry).main(argv)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    error = said.err.splitlines()
    assert not said.out or entry == 'gpu_smoke'
    assert status == 2 and [line for line in error if 'error: ' in line] == error[-1:]
    assert error[-1].startswith('error: ')
    assert re.search(match, error[-1]), error[-1]


def test_a_fault_of_ours_shows_its_traceback_and_a_users_does_not(capsys):
    def fails(argv):
        raise argv[0]

    run = command(fails)
    for error in (ValueError('a\nb'), FileNotFoundError('a b'), ImportError('a b'), MemoryError('a b')):
        assert run([error]) == 2
        assert capsys.readouterr().err == 'error: a b\n'
    assert run([torch.cuda.OutOfMemoryError('a very long text')]) == 2
    assert run([RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")]) == 2
    assert capsys.readouterr().err.count('error: out of memory; type a smaller --batch-size') == 2
    for error in (TypeError('a'), KeyError('a'), RuntimeError('a'), AssertionError('a')):
        with pytest.raises(type(error)):
            run([error])
    assert run([KeyboardInterrupt()]) == 130 and capsys.readouterr().err == 'interrupted\n'
    assert command(lambda argv: None)() == 0 and command(lambda argv: 1)() == 1


def test_whole_numbers_have_bounds(capsys):
    assert count('7') == 7 and whole_number(-3, 3)('-3') == -3
    for text in ('0', '-1', '1.5', 'x', '', '9' * 5000, '٣x'):
        with pytest.raises(argparse.ArgumentTypeError, match='allowed: whole numbers, 1 and more'):
            count(text)
    parser = Parser('prog')
    parser.add_argument('--width', type=whole_number(1, 64))
    for argv, match in ((['--width', '65'], '1 to 64'), (['--widht', '3'], "did you mean '--width'? prog --help")):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(argv)
        assert end.value.code == 2 and match in capsys.readouterr().err


def test_what_is_rarely_meant_is_said(tmp_path, capsys, monkeypatch):
    evaluate = load('evaluate').main

    def end(*_, **__):
        raise ValueError('the end')

    monkeypatch.setattr('timm_robust.evaluate.evaluate', end)
    flags = ['--split', 'train', '--state-dir', str(tmp_path / 'x'), '--eps', '0.5', '--attack', 'pgd']
    assert evaluate([*MEASURE, 'width=2', *flags]) == 2
    said = capsys.readouterr().err
    for text in (
        'random weights',
        'images of the training split',
        '--state-dir goes with --attack',
        'made grey all over',
    ):
        assert text in said, text
    assert said.count('note: ') == 4
    assert evaluate([*MEASURE, 'width=2']) == 2
    assert capsys.readouterr().err.count('note: ') == 1  # of random weights


def test_a_run_warns_of_what_is_rarely_meant_and_begins(tmp_path, capsys, monkeypatch):
    class Began(Exception):
        pass

    def begin(run):
        raise Began

    monkeypatch.setattr('timm_robust.train.fit', begin)
    train, flags = (
        load('train').main,
        [*DIGITS, '--model-kwargs', 'width=2', '--device', 'cpu', '--output', str(tmp_path)],
    )
    cases = {
        'is what it trains on': ['--val-split', 'train'],
        'chooses the checkpoint by the test split': ['--val-split', 'test'],
        'trains on the test split': ['--train-split', 'test'],
        'made grey all over': ['--eps', '0.5'],
        'far beyond the usual': ['--norm', 'L2', '--eps', '20'],
        'far less than one step': ['--eps', '1e-9'],
        'throws the weights about': ['--lr', '100'],
        'where its gradient is rounding noise': ['--loss', 'trades', '--no-random-start'],
        "attack 'n_fgsm' takes no steps: 3 changes nothing": ['--attack', 'n_fgsm', '--steps', '3'],
        "attack 'fgsm' takes no late_steps: 5 changes": ['--attack', 'fgsm', '--late-steps', '5'],
        "attack 'n_fgsm' takes no random_start: False": ['--attack', 'n_fgsm', '--no-random-start'],
        "attack 'apgd' takes no step_size: '1/255'": ['--attack', 'apgd', '--step-size', '1/255'],
        'extra_fraction 0.7 changes nothing without extra_data': ['--extra-fraction', '0.7'],
        'beta 1.0 changes nothing without loss trades or mart': ['--beta', '1'],
        'model_ema_decay 0.9 changes nothing without model_ema': ['--model-ema-decay', '0.9'],
        'clip_mode agc changes nothing without clip_grad': ['--clip-mode', 'agc'],
        'patience 3 changes nothing without held-out images': ['--patience', '3', '--val-size', '0'],
        'not all reached in 100 epochs': ['--sched', 'multistep', '--decay-milestones', '50', '500'],
    }
    for text, more in cases.items():
        with pytest.raises(Began):
            train([*flags, *more])
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith('warning: ')]
        told = [line for line in warnings if 'training images: robustness' not in line]  # its test split is small
        assert len(told) == 1 and text in told[0], text
    with pytest.raises(Began):
        train(flags)
    assert 'warning' not in capsys.readouterr().err


@pytest.mark.parametrize(('fault', 'traceback'), [(KeyError('hf_canary'), True), (ValueError('no hf_canary'), False)])
def test_a_failed_upload_is_a_row_and_a_fault_of_ours_a_traceback_too(tmp_path, monkeypatch, capsys, fault, traceback):
    script = load('publish')
    publish = lambda *_, **__: (_ for _ in ()).throw(fault)  # noqa: E731
    monkeypatch.setattr(script, 'publish', publish)
    monkeypatch.setattr(script, 'get_token', lambda: 'hf_canary')
    outcome = script.attempt(tmp_path / 'some.model', script.Options(), tmp_path / 'releases.json')
    said = capsys.readouterr().err
    assert outcome.status == 'failed' and type(fault).__name__ in outcome.message
    assert ('Traceback' in said) == traceback and 'canary' not in said + outcome.message
