"""Files of somebody who means harm: each is refused, and the code in it does not run (it would make a folder).

They run on the oldest timm that pyproject.toml allows, too:
pip install --target OLD --no-deps timm==1.0.28 && PYTHONPATH=OLD:. python -m pytest tests/reliability/test_hostile.py
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from timm_robust import evaluate
from timm_robust.data import StreamData
from timm_robust.models.load import load_model
from timm_robust.training.checkpoints import save_checkpoint
from timm_robust.training.recipe import Recipe

ARCH = 'resnet18_relu'
ROOT = Path(__file__).parents[2]


class Payload:
    """A pickle that makes a folder when it is read with code allowed."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """What the payload makes; the fixture proves at the end that it does not exist."""
    yield tmp_path / 'ran'
    assert not (tmp_path / 'ran').exists()


@pytest.fixture
def evil(tmp_path, mark):
    """A pickle with the payload, in torch's form."""
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': Payload(mark)}, path)
    return path


def staged(folder, **model_args):
    """A good folder of config.json and model.safetensors."""
    torch.manual_seed(0)
    args = {'width': 2, **model_args}
    model = timm.create_model(ARCH, **args)
    save_for_hf(model, folder, safe_serialization=True, model_args=args)
    (folder / 'pytorch_model.bin').unlink(missing_ok=True)
    return model.eval()


def rewrite(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))


def checkpoint(path, model, arch=ARCH, /, **model_kwargs):
    state = {'arch': arch, 'num_classes': 10, 'state_dict': model.state_dict(), 'model_kwargs': model_kwargs}
    save_checkpoint(path, state)
    return path


def test_the_payload_works(tmp_path):
    """Otherwise the tests below prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / 'here')))
    assert (tmp_path / 'here').is_dir()


def test_the_oldest_timm_is_the_one_that_is_tested():
    [oldest] = re.findall(r'"timm>=([\d.]+)"', (ROOT / 'pyproject.toml').read_text())
    assert f'timm=={oldest}' in __doc__ and f'timm must be {oldest} or newer' in (ROOT / 'README.md').read_text()
    assert tuple(map(int, timm.__version__.split('.')[:3])) >= tuple(map(int, oldest.split('.')))


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth', 'model.safetensors'])
@pytest.mark.parametrize('bare', [False, True], ids=['torch', 'bare'])
def test_a_folder_with_pickled_weights(tmp_path, mark, evil, name, bare):
    staged(tmp_path / 'hub')
    (tmp_path / 'hub/model.safetensors').unlink()
    if bare:
        evil.write_bytes(pickle.dumps(Payload(mark), 4))
    shutil.copyfile(evil, tmp_path / 'hub' / name)
    for spec in (tmp_path / 'hub', f'local-dir:{tmp_path / "hub"}'):
        with pytest.raises(ValueError, match=r'could run code|is damaged or no checkpoint'):
            load_model(spec)


def test_a_folder_with_plain_pickled_weights_is_read(tmp_path):
    model = staged(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match=r'holds a config\.json but no weights'):
        load_model(tmp_path)
    torch.save(model.state_dict(), tmp_path / 'pytorch_model.bin')
    assert torch.equal(load_model(tmp_path).fc.weight, model.fc.weight)


def arguments(evil):
    """Arguments with which a file could have timm read another file."""
    overlay = {'file': str(evil)}
    return {
        'checkpoint_path': str(evil),
        'pretrained': True,
        'pretrained_cfg': {'file': str(evil)},
        'pretrained_cfg_overlay': overlay,
        'file': str(evil),
        'url': evil.as_uri(),
        'hf_hub_id': 'somebody/evil',
        'source': 'local-dir',
        'custom_load': True,
        'state_dict': {},
        'cache_dir': str(evil.parent),
        'pretrained_model_args': {},
        'pretrained_filter_fn': 'os.system',
        'model_cfg': {},
    }


NAMES = list(arguments(Path('/x')))


@pytest.mark.parametrize('name', NAMES)
def test_arguments_that_steer_the_loading_are_refused(tmp_path, mark, evil, name):
    given, text = {name: arguments(evil)[name]}, f"'{name}' is no argument of a model's constructor"
    model = staged(tmp_path / 'hub')
    with pytest.raises(ValueError, match=text):
        load_model(checkpoint(tmp_path / 'a.pth.tar', model, width=2, **given))
    with pytest.raises(ValueError, match=text):
        Recipe(model=ARCH, model_kwargs={'width': 2, **given})
    rewrite(tmp_path / 'hub', model_args={'width': 2, **given})
    for spec in (tmp_path / 'hub', tmp_path / 'hub/model.safetensors'):
        with pytest.raises(ValueError, match=text):
            load_model(spec)


@pytest.mark.parametrize('name', ['checkpoint_path', 'file', 'custom_load'])
@pytest.mark.parametrize('by', ['load_model', 'timm'])
def test_act_swapped_passes_nothing_on(tmp_path, mark, evil, name, by):
    staged(tmp_path / 'hub')
    given = {'model': ARCH, 'act': 'silu', 'width': 2, name: arguments(evil)[name]}
    rewrite(tmp_path / 'hub', architecture='act_swapped', model_args=given)
    load = load_model if by == 'load_model' else lambda folder: timm.create_model(f'local-dir:{folder}')
    with pytest.raises(ValueError, match=rf"'{name}' is no argument"):
        load(tmp_path / 'hub')


@pytest.mark.parametrize('inner', ['act_swapped', 'local-dir:HUB', 'hf-hub:somebody/evil', 7, 'os.system'])
def test_act_swapped_takes_only_another_registered_name(tmp_path, mark, evil, inner):
    staged(tmp_path / 'hub')
    shutil.copyfile(evil, tmp_path / 'hub/model.safetensors')
    inner = inner.replace('HUB', str(tmp_path / 'hub')) if isinstance(inner, str) else inner
    path = tmp_path / 'a.pth.tar'
    checkpoint(path, torch.nn.Linear(1, 1), 'act_swapped', model=inner, act='silu')
    with pytest.raises(ValueError, match=r"act_swapped: model .* must be another name of timm's registry"):
        load_model(path)


@pytest.mark.parametrize('key', ['file', 'url', 'hf_hub_id', 'state_dict'])
def test_places_of_weights_in_a_config_are_not_followed(tmp_path, mark, evil, key):
    """The file beside the config.json is what is read, and the place is forgotten."""
    model = staged(tmp_path / 'hub')
    cfg = json.loads((tmp_path / 'hub/config.json').read_text())['pretrained_cfg']
    for custom in (True, 'hf'):
        place = {key: arguments(evil)[key], 'custom_load': custom, 'source': 'timm', 'hf_hub_filename': 'evil.pth'}
        rewrite(tmp_path / 'hub', pretrained_cfg={**cfg, **place})
        loaded = load_model(tmp_path / 'hub')
        assert torch.equal(loaded.fc.weight, model.fc.weight)
        assert not {'state_dict', 'file', 'hf_hub_id', 'custom_load'} & {
            k for k, v in loaded.pretrained_cfg.items() if v
        }


@pytest.mark.parametrize('kwargs', [['width'], 'width=2', {1: 2}])
def test_arguments_that_are_no_pairs(tmp_path, kwargs):
    state = {'arch': ARCH, 'num_classes': 10, 'state_dict': staged(tmp_path / 'hub').state_dict()}
    save_checkpoint(tmp_path / 'a.pth.tar', {**state, 'model_kwargs': kwargs})
    with pytest.raises(ValueError, match='the arguments of a model are NAME: VALUE pairs'):
        load_model(tmp_path / 'a.pth.tar')


def test_arguments_of_the_constructor_alone_are_taken(tmp_path):
    model = staged(tmp_path / 'hub')
    path = checkpoint(tmp_path / 'a.pth.tar', model, width=2, wings=3)
    with pytest.raises(ValueError, match=rf'cannot make {ARCH} with the model_kwargs of .*: TypeError: .*wings'):
        load_model(path)
    overlay = {'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.5, 0.5)}
    loaded = load_model(checkpoint(path, model, width=2, drop_rate=0.5, pretrained_cfg_overlay=overlay))
    assert loaded.drop_rate == 0.5 and tuple(loaded.pretrained_cfg['mean']) == (0.1, 0.2, 0.3)


def test_a_pickle_beside_a_tar_of_images(tmp_path, mark):
    tar = tmp_path / 'test.tar'
    with open(tar, 'wb') as file:
        file.truncate(11 << 30)  # sparse: timm asks for its cache beside more than 10 GB
    (tmp_path / '_test_tarinfos.pickle').write_bytes(pickle.dumps({'tartrees': [Payload(mark)]}))
    with pytest.raises(ValueError, match=r'_test_tarinfos\.pickle.*delete'):
        StreamData('folder', str(tar), 'test', 32)


@pytest.mark.parametrize(
    ('name', 'value', 'text'),
    [
        ('fc.weight', torch.full((10, 16), float('nan')), 'values of fc.weight are not finite'),
        ('fc.bias', torch.full((10,), float('inf')), 'values of fc.bias are not finite'),
        ('fc.weight', torch.ones(10, 16, dtype=torch.int8), 'fc.weight is int8; allowed: float32'),
        ('fc.weight', torch.ones(10, 16, dtype=torch.complex64), 'fc.weight is complex64; allowed: float32'),
        ('fc.weight', torch.ones(10, 16, dtype=torch.int64), 'fc.weight is torch.int64, the model has torch.float32'),
    ],
)
@pytest.mark.parametrize('form', ['folder', 'file', 'checkpoint'])
def test_weights_that_are_no_weights(tmp_path, name, value, text, form):
    model = staged(tmp_path / 'hub')
    weights = {**model.state_dict(), name: value}
    if form == 'checkpoint':
        path = tmp_path / 'a.pth.tar'
        save_checkpoint(path, {'arch': ARCH, 'model_kwargs': {'width': 2}, 'state_dict': weights, 'num_classes': 10})
    else:
        safetensors.torch.save_file(weights, tmp_path / 'hub/model.safetensors')
        path = tmp_path / 'hub' if form == 'folder' else tmp_path / 'hub/model.safetensors'
    with pytest.raises(ValueError, match=text):
        load_model(path)


@pytest.mark.parametrize(
    ('key', 'value', 'text'),
    [
        ('mean', [0.5, float('nan'), 0.5], r"pretrained_cfg's mean .*nan.* cannot be; allowed: finite numbers"),
        ('mean', 'red', "pretrained_cfg's mean 'red' cannot be"),
        ('std', [0.5, 0.0, 0.5], r"pretrained_cfg's std .* cannot be; allowed: finite numbers > 0"),
        ('std', [1, 1, -1], "pretrained_cfg's std .* cannot be"),
        ('std', [1, 1, float('inf')], "pretrained_cfg's std .* cannot be"),
        ('std', 0, "pretrained_cfg's std 0 cannot be"),
        ('std', [], r"pretrained_cfg's std \[\] cannot be"),
    ],
)
def test_statistics_that_no_image_has(tmp_path, capsys, key, value, text):
    staged(tmp_path)
    cfg = json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
    rewrite(tmp_path, pretrained_cfg={**cfg, key: value})
    assert evaluate.main([str(tmp_path), '--dataset', 'digits', '-n', '2', '--attack', 'pgd', '--device', 'cpu']) == 2
    assert re.search(text, capsys.readouterr().err)
