import argparse
import dataclasses
import os

import pytest
import yaml

from timm_robust.command_line import command
from timm_robust.threat_model import ThreatModel
from timm_robust.training.flags import add_arguments, parse_recipe
from timm_robust.training.recipe import MACHINE, Recipe

DEFAULTS = {
    'model': 'resnet18_pssilu', 'model_kwargs': {}, 'num_classes': None, 'pretrained': False,
    'initial_checkpoint': None, 'dataset': 'cifar10', 'data_dir': 'data', 'dataset_download': False, 'val_size': 1000,
    'crop_padding': 4, 'hflip': 0.5, 'loss': 'pgd_at', 'beta': 6.0, 'smoothing': 0.0, 'norm': 'Linf', 'eps': '8/255',
    'attack': 'pgd', 'steps': 10, 'step_size': None, 'random_start': True, 'attack_bn': 'eval', 'eval_steps': 10,
    'eval_step_size': None, 'val_interval': 1, 'epochs': 100, 'max_steps': None,
    'batch_size': 128, 'opt': 'sgd', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 0.0005, 'filter_bias_and_bn': True,
    'clip_grad': None, 'clip_mode': 'norm', 'sched': 'onecycle', 'warmup_epochs': 0.0, 'min_lr': 0.0,
    'decay_milestones': [], 'decay_rate': 0.1, 'model_ema': False, 'model_ema_decay': 0.999,
    'pssilu_reg': 10.0, 'pssilu_beta_clip': 0.01, 'amp': False, 'channels_last': True,
    'fold_bn': True, 'torchcompile': False,
    'device': None, 'seed': 42, 'output': 'output/train', 'experiment': None, 'resume': None, 'allow_changes': False,
    'log_interval': 20, 'checkpoint_hist': 2, 'img_size': None, 'grad_checkpointing': False, 'train_split': 'train',
    'val_split': None, 'mixup': 0.0, 'cutmix': 0.0, 'extra_data': None, 'extra_fraction': 0.5, 'workers': 2,
    'awp_gamma': 0.0, 'awp_start': 0.0, 'late_steps': None, 'late_start': 0.5, 'eps_warmup': 0.0, 'budget': None,
    'start_noise': None, 'bn_momentum': None, 'freeze_bn': False, 'patience': None,
    'opt_kwargs': {}, 'layer_decay': None, 'ema_bn_batches': 20, 'sync_bn': False, 'save_interval': None,
    'progressive_resizing': {}, 'act': None,
    'act_shared': True, 'attack_grad': 'exact', 'update_grad': 'exact',
    'on_divergence': 'rollback', 'tensorboard': False, 'log_wandb': False,
}  # fmt: skip

# One value of each setting that differs from the default.
OTHERS = {
    'model': 'test_resnet', 'model_kwargs': {'drop_rate': 0.1, 'name': 'x', 'k': [1, 2], 'on': True}, 'num_classes': 7,
    'pretrained': True, 'initial_checkpoint': 'a.pth.tar', 'dataset': 'digits', 'data_dir': 'elsewhere',
    'dataset_download': True, 'val_size': 0, 'crop_padding': 0, 'hflip': 1.0, 'loss': 'trades', 'beta': 0.0,
    'smoothing': 0.1, 'norm': 'L2', 'eps': '0.5', 'attack': 'fgsm', 'steps': 7, 'step_size': '2/255',
    'random_start': False, 'start_noise': 0.001, 'bn_momentum': 0.01, 'freeze_bn': True, 'patience': 3,
    'attack_bn': 'train', 'eval_steps': 20, 'eval_step_size': '1/255', 'val_interval': 5, 'epochs': 4,
    'progressive_resizing': {'16': 25, '32': 75}, 'max_steps': 3, 'batch_size': 16, 'opt': 'adamw', 'lr': 0.0003,
    'momentum': 0.0, 'weight_decay': 0.0, 'filter_bias_and_bn': False, 'clip_grad': 1.0, 'clip_mode': 'agc',
    'sched': 'cosine', 'warmup_epochs': 0.5, 'min_lr': 0.001, 'decay_milestones': [75, 90], 'decay_rate': 1.0,
    'model_ema': True, 'model_ema_decay': 0.9, 'pssilu_reg': 0.0, 'pssilu_beta_clip': None, 'amp': True, 'img_size': 64,
    'grad_checkpointing': True, 'train_split': 'all', 'val_split': 'test', 'mixup': 0.2, 'cutmix': 1.0,
    'extra_data': 'x.npz', 'extra_fraction': 0.7, 'workers': 0, 'awp_gamma': 0.005, 'awp_start': 0.6, 'late_steps': 5,
    'late_start': 0.33, 'eps_warmup': 0.75, 'budget': '25m', 'opt_kwargs': {'dampening': 0.1}, 'layer_decay': 0.9,
    'ema_bn_batches': 0, 'sync_bn': True, 'save_interval': 100, 'on_divergence': 'stop', 'tensorboard': True,
    'log_wandb': True, 'channels_last': False, 'torchcompile': True, 'fold_bn': False, 'device': 'cuda:1', 'seed': 0,
    'output': 'runs', 'experiment': 'naïve', 'resume': 'auto', 'allow_changes': True, 'log_interval': 1, 'act': 'silu',
    'act_shared': False, 'attack_grad': 'smooth', 'update_grad': 'smooth', 'checkpoint_hist': 9,
}  # fmt: skip
SPELT = {
    'crop_padding': ['--crop-padding=0'],
    'hflip': ['--hflip', '1'],
    'batch_size': ['-b', '16'],
    'lr': ['--lr', '3e-4'],
}


def as_flags(name, value):
    """The words of the command line that say so."""
    flag = name.replace('_', '-')
    if isinstance(value, bool):
        return [f'--{flag}' if value else f'--no-{flag}']
    if isinstance(value, dict):
        value = [f'{key}={one}' for key, one in value.items()]
    words = value if isinstance(value, list) else ['none' if value is None else value]
    return [f'--{flag}', *map(str, words)]


def write(tmp_path, text, name='recipe.yaml'):
    path = tmp_path / name
    path.write_text(text, encoding='utf-8')
    return path


def fails(capsys, argv):
    """What the command line prints when it refuses: one line."""
    try:
        assert command(parse_recipe)(argv) == 2
    except SystemExit as end:
        assert end.code == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    return error


def test_defaults():
    assert dataclasses.asdict(Recipe()) == DEFAULTS
    assert OTHERS.keys() == DEFAULTS.keys()


@pytest.mark.parametrize('name', OTHERS)
def test_every_setting_round_trips_through_flag_and_file(tmp_path, name):
    value = OTHERS[name]
    assert value != DEFAULTS[name]
    recipe = Recipe(**{name: value})
    read = parse_recipe(SPELT.get(name) or as_flags(name, value))
    assert read == recipe and type(getattr(read, name)) is type(value)
    recipe.to_yaml(tmp_path / 'r.yaml')
    assert Recipe.from_yaml(tmp_path / 'r.yaml') == recipe
    assert (tmp_path / 'r.yaml').read_text().count('\n') >= 1 and os.listdir(tmp_path) == ['r.yaml']
    both = parse_recipe(['-c', str(tmp_path / 'r.yaml')])
    assert both == recipe


def test_help_names_every_flag_and_default():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = ' '.join(parser.format_help().split())
    for name in DEFAULTS:
        assert f'--{name.replace("_", "-")}' in text
    assert 'images a training step (default: 128)' in text and '--amp, --no-amp automatic' in text
    assert text.count('(default: ') == len(DEFAULTS) and 'SUPPRESS' not in text and 'MISSING' not in text
    assert vars(parser.parse_args([])) == {'recipe': None, 'config': None}


def test_precedence_is_default_then_file_then_flag(tmp_path):
    path = write(tmp_path, 'lr: 0.2\nbatch-size: 64\namp: true\nclip_grad: 1\nmodel_kwargs: {drop_rate: 0.1}\n')
    recipe = parse_recipe(['--lr', '0.3', '--config', str(path), '--no-amp', '--clip-grad', 'none', '--model-kwargs'])
    assert (recipe.lr, recipe.batch_size, recipe.epochs) == (0.3, 64, 100)
    assert recipe.amp is False and recipe.clip_grad is None and recipe.model_kwargs == {}


def test_the_command_line_is_checked_together_with_the_file(tmp_path, capsys):
    path = write(tmp_path, 'min_lr: 0.05\n')
    assert 'min_lr 0.05 is larger than lr 0.01' in fails(capsys, ['-c', str(path), '--lr', '0.01'])


@pytest.mark.parametrize(
    ('text', 'values'),
    [
        ('', {}),
        ('# nothing\n{}\n', {}),
        ('\ufefflr: 3e-4\n', {'lr': 3e-4}),  # YAML 1.1 reads 3e-4 as text
        ('beta: 6\nhflip: 1\neps: 1\n', {'beta': 6.0, 'hflip': 1.0, 'eps': 1.0}),
        ('eps: 4/255\nstep-size: 1/255\n', {'eps': '4/255', 'step_size': '1/255'}),
        ('decay-milestones: [75, 90]\nsched: multistep\n', {'decay_milestones': [75, 90], 'sched': 'multistep'}),
        ('max_steps: null\nexperiment: ~\n', {}),
    ],
)
def test_yaml_values(tmp_path, text, values):
    recipe = Recipe.from_yaml(write(tmp_path, text))
    assert recipe == Recipe(**values)
    assert all(type(getattr(recipe, name)) is type(value) for name, value in values.items())


@pytest.mark.parametrize(
    ('text', 'error'),
    [
        (
            'lr: 0.1\nbatchsize: 64\n',
            r":2: unknown key 'batchsize'; did you mean 'batch_size'\?.*timm_robust\.training\.Recipe",
        ),
        ('zzz: 1\n', r":1: unknown key 'zzz'; timm_robust\.training\.Recipe lists"),
        ('1: 2\n', ':1: unknown key 1;'),
        ('lr: 0.1\nepochs: 2\nlr: 0.2\n', ":3: not valid YAML: key 'lr' is given twice"),
        ('batch_size: 1\nbatch-size: 2\n', ":2: key 'batch-size' is given twice"),
        ('model_kwargs: {a: 1, a: 2}\n', ":1: not valid YAML: key 'a' is given twice"),
        ('loss: madry\n', ":1: loss 'madry' is unknown; allowed: pgd_at, trades, mart, clean"),
        ('# paper\nepochs: 0\n', r':2: epochs 0 is out of range; allowed: >= 1'),
        ('amp: 1\n', ':1: amp 1 is of the wrong kind; allowed: true or false'),
        ('experiment: 2021\n', r':1: experiment 2021 is of the wrong kind; allowed: text \(in quotes\) or null'),
        ('eps: 8\n', r'recipe\.yaml: eps 8.0 for Linf is wider .* write .8.0/255.'),
        ('a: [1\nb: 2\n', r'recipe\.yaml:2: not valid YAML: expected'),
        ('lr: 0.1\n\tepochs: 1\n', r'recipe\.yaml:2: not valid YAML: found character'),
        (
            'lr: !!python/object/apply:os.getpid []\n',
            r'recipe\.yaml:1: not valid YAML: could not determine a constructor',
        ),
        ('experiment: 2024-13-45\n', r'recipe\.yaml: not valid YAML: month must be'),
        ('- lr\n', r'recipe\.yaml: a recipe is a mapping of `key: value` lines, this is a list'),
        ('lr\n', 'this is a str'),
        ('lr: 1\n---\nlr: 2\n', 'not valid YAML: but found another document'),
    ],
)
def test_yaml_errors_name_file_line_and_mend(tmp_path, capsys, text, error):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=error) as caught:
        Recipe.from_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value) in fails(capsys, ['-c', str(path)])


def test_unreadable_recipe_files(tmp_path, capsys):
    write(tmp_path, '', 'real.yaml')
    with pytest.raises(FileNotFoundError, match=r'/rael\.yaml does not exist; its folder holds real\.yaml'):
        Recipe.from_yaml(tmp_path / 'rael.yaml')
    assert 'does not exist' in fails(capsys, ['-c', str(tmp_path / 'absent' / 'a.yaml')])
    assert 'directory' in fails(capsys, ['-c', str(tmp_path)])
    (tmp_path / 'binary.yaml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='not a text file in UTF-8'):
        Recipe.from_yaml(tmp_path / 'binary.yaml')


@pytest.mark.parametrize(
    ('values', 'error'),
    [
        ({'epochs': 1.5}, 'epochs 1.5 is of the wrong kind; allowed: a whole number$'),
        ({'epochs': True}, 'epochs True is of the wrong kind'),
        ({'epochs': '3'}, "epochs '3' is of the wrong kind"),
        ({'lr': True}, 'lr True is of the wrong kind; allowed: a number$'),
        ({'lr': 'fast'}, "lr 'fast' is of the wrong kind"),
        ({'lr': float('nan')}, 'lr nan is of the wrong kind'),
        ({'lr': 'inf'}, "lr 'inf' is of the wrong kind"),
        ({'lr': None}, 'lr None is of the wrong kind'),
        ({'lr': 10**400}, 'lr 10+ is of the wrong kind'),
        ({'weight_decay': 10**39}, 'weight_decay 10+ is of the wrong kind'),
        ({'model': None}, 'model None'),
        ({'decay_milestones': [1, 2.5]}, r'decay_milestones \[1, 2.5\] is of the wrong kind; allowed: a list of whole'),
        ({'decay_milestones': 3}, 'decay_milestones 3 is of the wrong kind'),
        ({'model_kwargs': {1.5: 2}}, 'model_kwargs {1.5: 2} is of the wrong kind'),
        ({'model_kwargs': 'a=1'}, "model_kwargs 'a=1' is of the wrong kind"),
        ({'norm': 'linf'}, "norm 'linf' is unknown; allowed: Linf, L2"),
        ({'sched': 'step'}, 'allowed: onecycle, onecycle_cosine, cosine, multistep, constant'),
        ({'smoothing': 1}, r'smoothing 1 is out of range; allowed: >= 0 and < 1'),
        ({'hflip': 1.1}, 'hflip 1.1 is out of range; allowed: >= 0 and <= 1'),
        ({'decay_rate': 0}, 'decay_rate 0 is out of range; allowed: > 0 and <= 1'),
        ({'batch_size': 0}, 'batch_size 0'),
        ({'steps': 0}, 'steps 0'),
        ({'max_steps': 0}, 'max_steps 0'),
        ({'val_size': -1}, 'val_size -1 is out of range; allowed: a number of images, or a share of them'),
        ({'clip_grad': 0}, 'clip_grad 0 is out of range; allowed: > 0'),
        ({'eps': 'a'}, "eps 'a' is not a number"),
        ({'eps': True}, 'eps True is of the wrong kind; allowed: a number or text'),
        ({'step_size': '0'}, "step_size '0' is not a positive number; write for example '2/255'"),
        ({'eval_step_size': 'x'}, "eval_step_size 'x' is not a positive number"),
        ({'min_lr': 0.2}, 'min_lr 0.2 is larger than lr 0.1'),
        ({'sched': 'multistep'}, r"sched 'multistep' needs decay_milestones, such as \[75, 90\]"),
        ({'start_noise': 0}, 'start_noise 0 is out of range; allowed: > 0'),
        ({'start_noise': 0.001, 'attack': 'apgd'}, r"the attacks pgd and fgsm; leave it out with attack 'apgd'"),
        ({'start_noise': 0.001, 'random_start': False}, r'random_start False \(--start-noise none\)'),
        ({'bn_momentum': 1.5}, 'bn_momentum 1.5 is out of range; allowed: > 0 and <= 1'),
        ({'sched': 'onecycle_cosine', 'momentum': 0.95}, 'momentum 0.95 cannot swing by 0.05.*allowed: 0.05 to'),
        ({'decay_milestones': [90, 75]}, 'must be increasing epochs'),
        ({'decay_milestones': [0]}, 'must be increasing epochs'),
        ({'device': 'gpu'}, "device 'gpu' is unknown; allowed: 'cpu', 'cuda'"),
    ],
)
def test_construction_refuses_what_cannot_be_meant(values, error):
    with pytest.raises(ValueError, match=error):
        Recipe(**values)
    with pytest.raises(ValueError, match=error):
        dataclasses.replace(Recipe(), **values)


@pytest.mark.parametrize(
    ('argv', 'error'),
    [
        (['--batchsize', '3'], "unknown argument '--batchsize'; did you mean '--batch-size'?"),
        (['--epoch', '3'], "unknown argument '--epoch'; did you mean '--epochs'?"),  # no abbreviations
        (['stray'], "'stray' is no file and no recipe of the package; near it are "),
        (['a.yaml', 'stray'], "unknown argument 'stray'"),
        (['--loss', 'madry'], "argument --loss: invalid choice: 'madry' (choose from"),
        (['--epochs', '1.5'], "argument --epochs: invalid whole number value: '1.5'"),
        (['--lr', 'none'], "argument --lr: invalid number value: 'none'"),
        (['--lr', '0'], 'lr 0.0 is out of range; allowed: > 0'),
        (['--model-kwargs', 'a'], "argument --model-kwargs: 'a' is not of the form key=value"),
    ],
)
def test_command_line_errors(capsys, argv, error):
    assert error in fails(capsys, argv)


@pytest.mark.parametrize(
    ('values', 'training', 'validation'),
    [
        ({}, 2 / 255, 2 / 255),
        ({'steps': 5}, 4 / 255, 2 / 255),
        ({'attack': 'fgsm', 'eval_steps': 20}, 10 / 255, 1 / 255),
        ({'step_size': '3/255', 'eval_step_size': 0.01}, 3 / 255, 0.01),
        ({'norm': 'L2', 'eps': 0.5}, 0.125, 0.125),
        ({'attack': 'fgsm', 'step_size': '7/255'}, 7 / 255, 2 / 255),
    ],
)
def test_resolved_step_sizes(values, training, validation):
    recipe = Recipe(**values)
    assert recipe.attack_schedule.at(1.0).keywords['step_size'] == pytest.approx(training, abs=1e-12)
    assert recipe.resolved_eval_step_size == pytest.approx(validation, abs=1e-12)


def test_threat_model():
    assert Recipe().threat_model == ThreatModel('Linf', 8 / 255)
    assert str(Recipe(norm='L2', eps='128/255').threat_model) == 'L2 128/255'


def test_what_is_published_names_no_place_of_the_machine():
    places = {'data_dir': '/home/joe/data', 'output': '/home/joe/runs', 'extra_data': '/home/joe/edm/1m.npz'}
    public = Recipe(**places, initial_checkpoint='/home/joe/a.pth', lr=0.3).public()
    assert 'joe' not in str(public) and public['lr'] == 0.3 and public['extra_data'] == '1m.npz'
    assert public['initial_checkpoint'] == 'a.pth'
    assert Recipe().public()['extra_data'] is None and not set(public) & set(MACHINE)


def test_settings_that_are_gone_are_read_over(tmp_path):
    path = write(tmp_path, 'lr: 0.2\nval_batch_size: 250\namp_dtype: bfloat16\nmodel-ema-warmup: true\n')
    assert Recipe.from_yaml(path) == Recipe(lr=0.2)
    with pytest.raises(ValueError, match=r':2: amp_dtype is bfloat16 for good now; drop the line'):
        Recipe.from_yaml(write(tmp_path, 'lr: 0.2\namp_dtype: float16\n'))
    state = {'recipe': dataclasses.asdict(Recipe(lr=0.3)) | {'val_batch_size': 64}}
    assert Recipe.from_checkpoint(state) == Recipe(lr=0.3)


def test_a_recipe_file_holds_every_setting(tmp_path):
    path = tmp_path / 'new' / 'r.yaml'
    Recipe(lr=0.2, step_size='2/255').to_yaml(path)
    assert yaml.safe_load(path.read_text()) == DEFAULTS | {'lr': 0.2, 'step_size': '2/255'}


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = write(tmp_path, 'lr: 0.2\n')

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError, match='disk full'):
        Recipe().to_yaml(path)
    assert path.read_text() == 'lr: 0.2\n' and os.listdir(tmp_path) == ['recipe.yaml']


def test_paths_and_lists_are_copied_to_plain_values(tmp_path):
    milestones = [3]
    recipe = Recipe(data_dir=tmp_path, decay_milestones=milestones)
    milestones.append(1)
    assert recipe.data_dir == str(tmp_path) and recipe.decay_milestones == [3]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = 1.0


def test_the_step_of_the_attack_grows_with_eps_and_follows_late_steps():
    recipe = Recipe(eps_warmup=0.5, steps=2, late_steps=5, late_start=0.4)
    at = [recipe.attack_schedule.at(share).keywords for share in (0.25, 0.45, 1.0)]
    assert [found['step_size'] / found['threat_model'].eps for found in at] == pytest.approx([1.25, 0.5, 0.5])
