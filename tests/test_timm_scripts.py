"""Models under timm's own train.py and validate.py, which are in no wheel: the pieces that these are made of."""

import argparse
import json
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy
from torch import nn

from timm_robust.data import load_dataset
from timm_robust.evaluate import main
from timm_robust.models.load import load_model
from timm_robust.pixels import pixel_input

ARCH = 'resnet18_pssilu'


def arguments(**changes):
    """As timm's train.py keeps them: what is not given is None, or the default of its flag."""
    args = {'model': ARCH, 'num_classes': 10, 'in_chans': None, 'img_size': None, 'input_size': None, 'gp': None}
    args |= {'mean': None, 'std': None, 'crop_pct': None, 'interpolation': '', 'model_kwargs': {'width': 4}}
    args |= {'lr': 0.05, 'sched': 'cosine', 'decay_milestones': [90, 180], 'rank': 0, 'amp': False, 'prefetcher': True}
    return argparse.Namespace(**{**args, **changes})


def save(folder, args, model, ema=None, **more):
    """The file that timm's CheckpointSaver writes."""
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.05)
    (folder / 'timm').mkdir()
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(folder / 'timm'), **more)
    saver.save_checkpoint(0, metric=12.5)
    return folder / 'timm' / 'model_best.pth.tar'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Digits as folders of pictures, one for each class."""
    image = pytest.importorskip('PIL.Image')
    folder = tmp_path_factory.mktemp('pictures')
    data = load_dataset('digits', split='test')
    for number in range(40):
        place = folder / 'validation' / data.classes[int(data.labels[number])]
        place.mkdir(parents=True, exist_ok=True)
        image.fromarray(data.images[number].permute(1, 2, 0).numpy()).save(place / f'{number}.png')
    return folder


def test_timms_train_and_validate_take_our_models(pictures, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model(ARCH, num_classes=10, width=4)
    config = resolve_data_config({}, model=model)
    assert config['input_size'] == (3, 32, 32) and set(config['mean']) == {0.0} and set(config['std']) == {1.0}
    dataset = create_dataset('', root=str(pictures), split='validation')
    shape = {key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation')}
    shape |= {'batch_size': 20, 'num_workers': 0, 'use_prefetcher': False, 'persistent_workers': False}
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.05, momentum=0.9, weight_decay=1e-4)
    assert [p.ndim for p in optimizer.param_groups[0]['params'] if p is model.act.alpha] == [1]  # no decay
    for x, y in create_loader(dataset, is_training=True, no_aug=True, **shape):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        ema.update(model)
    path = save(tmp_path, arguments(), model, ema)

    again = timm.create_model(ARCH, num_classes=10, width=4, checkpoint_path=str(path)).eval()
    plain = timm.create_model(ARCH, num_classes=10, width=4)
    load_checkpoint(plain, str(path), use_ema=False)
    ours, correct = load_model(path), 0
    with torch.no_grad():
        for x, y in create_loader(dataset, **shape, crop_pct=1.0):
            assert torch.equal(again(x), ours(x)) and torch.equal(ours(x), ema.module.eval()(x))
            assert torch.equal(plain.eval()(x), model.eval()(x)) and not torch.equal(plain(x), ours(x))
            correct += accuracy(ours(x), y)[0].item() * len(y) / 100
    flags = ['--dataset', 'folder', '--data-dir', str(pictures), '--split', 'validation', '-n', '40', '--attack', 'pgd']
    assert main([str(path), *flags, '--eps', '2/255', '--steps', '1', '--quiet']) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['clean_acc'] * 40 == pytest.approx(correct) and result['pgd_acc'] <= result['clean_acc']


def test_a_checkpoint_of_timm_tells_all_that_its_attack_needs(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10, in_chans=1).eval()
    args = arguments(model='test_resnet', in_chans=1, mean=[0.3], std=[0.2], img_size=48, model_kwargs={}, crop_pct=0.6)
    loaded = load_model(save(tmp_path, args, model))
    x = torch.rand(2, 1, 48, 48)
    with torch.no_grad():
        assert torch.allclose(pixel_input(loaded)(x), model((x - 0.3) / 0.2), atol=1e-5)
        assert pixel_input(loaded).img_size == 48
        cfg = timm.get_pretrained_cfg('test_resnet')
        assert loaded.pretrained_cfg['crop_pct'] == 0.6 != cfg.crop_pct
        assert loaded.pretrained_cfg['interpolation'] == cfg.interpolation
        other = load_model(tmp_path / 'timm/last.pth.tar', pretrained_cfg_overlay={'mean': (0.0,), 'std': (1.0,)})
        assert torch.allclose(pixel_input(other)(x), model(x), atol=1e-5)


def test_without_statistics_those_of_three_colours_are_averaged_as_timms_loader_does(tmp_path):
    model = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    args = arguments(model='test_resnet', input_size=[1, 32, 32], model_kwargs={})
    cfg = load_model(save(tmp_path, args, model)).pretrained_cfg
    assert cfg['mean'] == pytest.approx((np.mean(timm.get_pretrained_cfg('test_resnet').mean),))
    assert len(cfg['std']) == 1 and cfg['img_size'] == 32


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_cleaned_weights_are_named_by_flags_and_grey_digits_measured(suffix, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    path, weights = tmp_path / f'clean{suffix}', OrderedDict(model.state_dict())  # timm's clean_checkpoint.py
    safetensors.torch.save_file(weights, path) if suffix == '.safetensors' else torch.save(weights, path)
    flags = ['--num-classes', '10', '--in-chans', '1', '--mean', '0.3', '--std', '0.2', '--img-size', '32']
    measure = ['--dataset', 'digits', '-n', '20', '--attack', 'none', '--quiet']
    assert main(['test_resnet', '--checkpoint', str(path), *flags, *measure]) == 0
    out, err = capsys.readouterr()
    data = load_dataset('digits', split='test').first(20).with_channels(1)
    with torch.no_grad():
        right = model.eval()((data.pixels() - 0.3) / 0.2).argmax(1) == data.labels
    assert json.loads(out.splitlines()[-1])['clean_acc'] == int(right.sum()) / 20 and err == ''
    assert main([str(path), *measure]) == 2
    assert 'error: ' in (error := capsys.readouterr().err) and error.count('\n') == 1
    if suffix == '.pth':
        assert f'in the shell: NAME --checkpoint {path}' in error


def test_images_whose_channels_do_not_fit_are_one_line(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, shape in {'colour': (8, 8, 3), 'grey': (8, 8, 1), 'flat': (8, 8)}.items():
        (tmp_path / name).mkdir()
        image = rng.integers(0, 256, (20, *shape), dtype=np.uint8)
        np.savez(tmp_path / name / 'test.npz', image=image, label=np.arange(20) % 10)
    model = ['resnet18_relu', '--in-chans', '1', '--model-kwargs', 'width=2', '--dataset', 'npz', '--quiet']
    measure = ['-n', '2', '--steps', '1', '--eps', '1/255', '--no-checks', '--data-dir']
    for name, attack in (('grey', 'apgd'), ('flat', 'pgd')):
        assert main([*model, '--attack', attack, *measure, str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert main([*model, *measure, str(tmp_path / 'colour')]) == 2
    assert 'colour has images in colour, of 3 channels, the model takes 1' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        ({'model': None}, "does not say which model it is: it has no 'arch' entry"),
        ({'model': 'resnet18_pssil'}, 'near it are resnet18_pssilu.*to name its model, write load_model'),
        ({'model_kwargs': {'checkpoint_path': 'x'}}, "'checkpoint_path' is no argument of a model's constructor"),
        ({'model_kwargs': {'widht': 4}}, "unexpected keyword argument 'widht'"),
        ({'mean': [0.1, 0.2]}, 'its args hold no mean, std and size of images'),
        ({'img_size': 'x'}, 'its args hold no mean, std and size'),
        ({'num_classes': 9}, 'do not fit the model: .*size mismatch for fc.weight'),
    ],
)
def test_args_that_cannot_be_are_refused(changes, match, tmp_path):
    model = timm.create_model(ARCH, num_classes=10, width=4)
    with pytest.raises(ValueError, match=match):
        load_model(save(tmp_path, arguments(**changes), model))


def test_code_beside_the_args_still_never_runs(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ('it ran',)

    torch.save({'arch': ARCH, 'state_dict': {}, 'args': argparse.Namespace(model=Code())}, tmp_path / 'bad.pth.tar')
    with pytest.raises(ValueError, match='could run code'):
        load_model(tmp_path / 'bad.pth.tar')
