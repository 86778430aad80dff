import collections
import json
import os
import pickle
import shutil
import time

import pytest
import safetensors.torch
import timm
import torch

from timm_robust.models.checkpoint import load_checkpoint, read_weights
from timm_robust.models.load import load_model
from timm_robust.training.checkpoints import latest_checkpoint, prune_checkpoints, save_checkpoint, set_aside

ARCH = 'test_resnet'


class Code:
    """What a pickle can do: unpickled with code allowed, it makes a folder."""

    def __init__(self, folder='ran'):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def make_state(step=1, **more):
    return {'step': step, 'state_dict': {'w': torch.arange(5000.0)}, **more}


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    return timm.create_model(ARCH, num_classes=4).eval()


@pytest.fixture(scope='module')
def other():
    torch.manual_seed(1)
    return timm.create_model(ARCH, num_classes=4).eval()


def same(model, expected):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(model(x), expected(x))


# save_checkpoint


def test_round_trip_of_plain_values(tmp_path, network):
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    state = {
        'optimizer': optimizer.state_dict(),
        'rng': torch.get_rng_state(),
        'recipe': {'eps': '8/255', 'milestones': [1, 2], 'lr': 0.1, 'amp': False, 'experiment': None},
        'other': (1, 2.5, {3}, b'x', torch.float32, collections.OrderedDict(a=1), collections.Counter([3])),
    }
    path = tmp_path / 'new' / 'run' / 'last.pth.tar'
    save_checkpoint(path, state)
    read = load_checkpoint(path)
    assert read['recipe'] == state['recipe'] and read['other'] == state['other']
    assert torch.equal(read['rng'], state['rng'])
    expected = state['optimizer']['state'][0]['exp_avg']
    assert expected.abs().sum() > 0 and torch.equal(read['optimizer']['state'][0]['exp_avg'], expected)
    assert os.listdir(path.parent) == ['last.pth.tar']


@pytest.mark.parametrize('value', [Code(), range(3), os.stat('.'), collections.namedtuple('Point', 'x')(1)])
def test_what_could_not_be_read_back_is_not_written(tmp_path, value):
    save_checkpoint(tmp_path / 'a.pth.tar', make_state())
    with pytest.raises(
        TypeError, match=r"state\['extra'\]\[0\] is a \S+; a checkpoint holds .* write dataclasses.asdict"
    ):
        save_checkpoint(tmp_path / 'a.pth.tar', make_state(2, extra=[value]))
    assert load_checkpoint(tmp_path / 'a.pth.tar')['step'] == 1 and os.listdir(tmp_path) == ['a.pth.tar']


def test_a_write_that_the_system_cuts_short(tmp_path):
    resource = pytest.importorskip('resource', reason='only Unix can limit the size of files')
    path = tmp_path / 'last.pth.tar'
    save_checkpoint(path, make_state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r'cannot write .*last\.pth\.tar: .*it needs about 20,000 bytes; [\d,]+ bytes are free'
        ):
            save_checkpoint(path, make_state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path)['step'] == 1 and os.listdir(tmp_path) == ['last.pth.tar']


def test_a_write_to_where_nothing_can_be(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='File exists'):
        save_checkpoint(tmp_path / 'file' / 'last.pth.tar', make_state())


def test_an_interrupt_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'last.pth.tar'
    save_checkpoint(path, make_state(1))

    def interrupt(state, file):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, make_state(2))
    assert load_checkpoint(path)['step'] == 1 and os.listdir(tmp_path) == ['last.pth.tar']


# load_checkpoint


def test_missing_checkpoint_lists_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'a\.pth\.tar does not exist; .* holds no checkpoint'):
        load_checkpoint(tmp_path / 'a.pth.tar')
    save_checkpoint(tmp_path / 'last.pth.tar', make_state())
    (tmp_path / 'model.safetensors').touch()
    (tmp_path / 'log.csv').touch()
    with pytest.raises(
        FileNotFoundError, match=r'a\.pth\.tar does not exist; .* holds last.pth.tar, model.safetensors$'
    ):
        load_checkpoint(tmp_path / 'a.pth.tar')
    with pytest.raises(FileNotFoundError, match=r'is a folder; .* holds last'):
        load_checkpoint(tmp_path)


def damage(path, how):
    raw = path.read_bytes()
    changed = {
        'empty': b'',
        'truncated': raw[: len(raw) // 2],
        'header only': raw[:10],
        'flipped bit': raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
        'noise': bytes(range(1, 128)) * 20,
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize('how', ['empty', 'truncated', 'header only', 'flipped bit', 'noise'])
def test_damage_is_named_with_the_newest_other(tmp_path, how):
    for age, name in enumerate(['last.pth.tar', 'checkpoint-2.pth.tar', 'checkpoint-1.pth.tar']):
        save_checkpoint(tmp_path / name, make_state())
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    damage(tmp_path / 'last.pth.tar', how)
    with pytest.raises(ValueError, match=r'last\.pth\.tar is damaged .*newest other .* is \S*/checkpoint-2\.pth\.tar$'):
        load_checkpoint(tmp_path / 'last.pth.tar')
    for name in ('checkpoint-1.pth.tar', 'checkpoint-2.pth.tar'):
        (tmp_path / name).unlink()
    os.link(tmp_path / 'last.pth.tar', tmp_path / 'checkpoint-3.pth.tar')  # damaged as well
    with pytest.raises(ValueError, match='its folder holds no other checkpoint'):
        load_checkpoint(tmp_path / 'last.pth.tar')


def write_torch(path, value):
    torch.save(value, path)


def write_legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value, protocol=4))


@pytest.mark.parametrize('write', [write_torch, write_legacy, write_pickle])
def test_code_is_refused_and_does_not_run(tmp_path, write):
    write(tmp_path / 'a.pth.tar', {'state_dict': Code(tmp_path / 'ran')})
    with pytest.raises(ValueError, match=r'a\.pth\.tar is not a plain state: it holds Python objects \(\S'):
        load_checkpoint(tmp_path / 'a.pth.tar')
    assert not (tmp_path / 'ran').exists()


def test_safetensors_whose_first_byte_is_that_of_a_pickle_are_read(tmp_path):
    path, firsts = tmp_path / 'a.safetensors', set()
    for length in range(300, 600):
        safetensors.torch.save_file({'w': torch.ones(2)}, path, {'note': 'x' * length})
        firsts.add(path.read_bytes()[0])
        assert read_weights(path)['w'].tolist() == [1, 1]
    assert 0x80 in firsts  # the header's length, of which every 32nd ends so
    write_pickle(path, {'state_dict': Code(tmp_path / 'ran')})
    with pytest.raises(ValueError, match='could run code'):
        read_weights(path)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    ('content', 'text'),
    [
        (b'\n<!DOCTYPE html>\n<html>', 'is a web page, not a checkpoint'),
        (b'<HTML><body>404', 'is a web page'),
        (
            b'version https://git-lfs.github.com/spec/v1\n',
            'is a Git LFS pointer, not the checkpoint; type: git lfs pull',
        ),
    ],
)
@pytest.mark.parametrize('name', ['a.pth.tar', 'a.safetensors'])
def test_wrong_downloads_are_recognised(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf'{name} {text}'):
        read_weights(tmp_path / name)


def test_not_a_dict(tmp_path):
    torch.save([1, 2], tmp_path / 'a.pth.tar')
    with pytest.raises(ValueError, match='holds a list, not a dict'):
        load_checkpoint(tmp_path / 'a.pth.tar')


# read_weights


def test_weights_prefer_the_average(tmp_path):
    plain, ema = {'w': torch.zeros(2)}, {'w': torch.ones(2)}
    path = tmp_path / 'a.pth.tar'
    save_checkpoint(path, {'state_dict': plain, 'state_dict_ema': ema})
    assert read_weights(path)['w'].tolist() == [1, 1]
    save_checkpoint(path, {'state_dict': plain, 'state_dict_ema': None})
    assert read_weights(path)['w'].tolist() == [0, 0]
    save_checkpoint(path, plain)
    assert read_weights(path)['w'].tolist() == [0, 0]
    safetensors.torch.save_file(ema, tmp_path / 'a.safetensors')
    assert read_weights(tmp_path / 'a.safetensors')['w'].tolist() == [1, 1]


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', ''])
def test_wrapper_prefixes_are_stripped(tmp_path, prefix):
    save_checkpoint(tmp_path / 'a.pth.tar', {f'{prefix}fc.w': torch.ones(1), f'{prefix}my_module.w': torch.ones(1)})
    assert list(read_weights(tmp_path / 'a.pth.tar')) == ['fc.w', 'my_module.w']


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_not_finite(tmp_path, bad):
    weights = {'ok': torch.ones(2), 'count': torch.tensor(3), 'fc.w': torch.tensor([1.0, bad, bad])}
    save_checkpoint(tmp_path / 'a.pth.tar', {'state_dict': weights})
    with pytest.raises(ValueError, match=r'a\.pth\.tar: 2 of 3 values of fc\.w are not finite'):
        read_weights(tmp_path / 'a.pth.tar')


@pytest.mark.parametrize(
    'state', [{'step': 3, 'epoch': 1}, {'state_dict': {'w': 1}, 'step': 3}, {'state_dict': [1], 'step': 2}]
)
def test_a_checkpoint_without_weights(tmp_path, state):
    save_checkpoint(tmp_path / 'a.pth.tar', state)
    with pytest.raises(ValueError, match=r'holds no weights: .* but (step, epoch|state_dict, step)$'):
        read_weights(tmp_path / 'a.pth.tar')


def test_damaged_safetensors(tmp_path):
    path = tmp_path / 'a.safetensors'
    safetensors.torch.save_file({'w': torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r'a\.safetensors is damaged or no checkpoint'):
        read_weights(path)


# latest_checkpoint, prune_checkpoints


def test_latest_is_the_valid_one_with_the_largest_step(tmp_path, caplog):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / 'absent') is None
    steps = {'checkpoint-0.pth.tar': 9, 'checkpoint-1.pth.tar': 10, 'checkpoint-2.pth.tar': 100, 'last.pth.tar': 100,
             'model_best.pth.tar': 900, 'other.pth.tar': 900}  # fmt: skip
    for name, step in steps.items():
        save_checkpoint(tmp_path / name, make_state(step))
    assert latest_checkpoint(tmp_path).name == 'last.pth.tar'  # of equal steps
    assert latest_checkpoint(tmp_path, before=100).name == 'checkpoint-1.pth.tar'
    damage(tmp_path / 'last.pth.tar', 'truncated')
    assert latest_checkpoint(tmp_path).name == 'checkpoint-2.pth.tar'
    damage(tmp_path / 'checkpoint-2.pth.tar', 'flipped bit')  # only the check sum shows it
    assert latest_checkpoint(tmp_path).name == 'checkpoint-1.pth.tar'
    assert (
        'Skipping' in caplog.text and 'last.pth.tar' in caplog.text and 'checkpoint-2.pth.tar is damaged' in caplog.text
    )
    save_checkpoint(tmp_path / 'checkpoint-1.pth.tar', {'epoch': 3})  # no step
    assert latest_checkpoint(tmp_path).name == 'checkpoint-0.pth.tar'


def test_prune_keeps_the_largest_numbers(tmp_path):
    kept = ['last.pth.tar', 'model_best.pth.tar', 'checkpoint-final.pth.tar', 'xcheckpoint-1.pth.tar']
    for name in [*kept, *(f'checkpoint-{n}.pth.tar' for n in (2, 10, 9))]:
        (tmp_path / name).touch()
    for _ in range(2):
        prune_checkpoints(tmp_path, 2)
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, 'checkpoint-10.pth.tar', 'checkpoint-9.pth.tar'])


# load_model


def write_config(folder, model):
    folder.mkdir(exist_ok=True)
    config = {'architecture': ARCH, 'num_classes': 4, 'pretrained_cfg': {**model.pretrained_cfg, 'num_classes': 4}}
    (folder / 'config.json').write_text(json.dumps(config))
    safetensors.torch.save_file(model.state_dict(), folder / 'model.safetensors')


def test_model_from_the_registry():
    model = load_model(ARCH, num_classes=7, drop_rate=0.3)
    assert not model.training and model.num_classes == 7 and model.drop_rate == 0.3


def test_a_tag_asks_for_the_weights(monkeypatch):
    calls = []
    monkeypatch.setattr(
        timm, 'create_model', lambda name, **kwargs: calls.append((name, kwargs)) or torch.nn.Identity()
    )
    load_model(f'{ARCH}.r160_in1k')
    load_model(f'{ARCH}.r160_in1k', pretrained=False)
    load_model(ARCH, pretrained=True, num_classes=3)
    assert calls == [
        (f'{ARCH}.r160_in1k', {'pretrained': True}),
        (f'{ARCH}.r160_in1k', {'pretrained': False}),
        (ARCH, {'pretrained': True, 'num_classes': 3}),
    ]


def test_model_from_a_checkpoint_and_its_folder(tmp_path, network, other):
    state = {'arch': ARCH, 'num_classes': 4, 'model_kwargs': {'drop_rate': 0.2}, 'state_dict': other.state_dict()}
    save_checkpoint(tmp_path / 'last.pth.tar', state)
    wrapped = {f'module.{key}': value for key, value in network.state_dict().items()}
    save_checkpoint(tmp_path / 'model_best.pth.tar', {**state, 'state_dict_ema': wrapped})
    for spec, expected in ((tmp_path / 'last.pth.tar', other), (str(tmp_path / 'model_best.pth.tar'), network)):
        model = load_model(spec)
        assert same(model, expected) and not model.training and model.drop_rate == 0.2
    assert same(load_model(tmp_path), network) and same(load_model(str(tmp_path)), network)
    assert load_model(tmp_path, drop_rate=0.5).drop_rate == 0.5
    with pytest.raises(ValueError, match=r'last\.pth\.tar do not fit the model: .*size mismatch'):
        load_model(tmp_path / 'last.pth.tar', num_classes=5)


def test_a_file_named_like_a_tag_is_a_file(tmp_path, network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf'checkpoint {ARCH}\.pth\.tar does not exist'):
        load_model(f'{ARCH}.pth.tar')
    save_checkpoint(tmp_path / f'{ARCH}.pth.tar', {'arch': ARCH, 'num_classes': 4, 'state_dict': network.state_dict()})
    assert same(load_model(f'{ARCH}.pth.tar'), network)


def test_the_registry_wins_over_a_folder_of_that_name(tmp_path, network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / ARCH, network)
    assert load_model(ARCH).num_classes == 1000
    assert same(load_model(f'./{ARCH}'), network) and same(load_model(tmp_path / ARCH), network)


def test_model_from_safetensors_and_config(tmp_path, network, other):
    write_config(tmp_path / 'card', network)
    assert same(load_model(tmp_path / 'card'), network)
    assert same(load_model(tmp_path / 'card' / 'model.safetensors'), network)
    safetensors.torch.save_file(other.state_dict(), tmp_path / 'card' / 'second.safetensors')
    assert same(load_model(tmp_path / 'card' / 'second.safetensors'), other)
    assert load_model(tmp_path / 'card', num_classes=6).num_classes == 6
    (tmp_path / 'card' / 'config.json').write_text('{')
    with pytest.raises(ValueError, match=r'cannot make a model from .*config\.json: .*Expecting'):
        load_model(tmp_path / 'card')
    config = {'architecture': 'vit_tiny_patch16_224', 'pretrained_cfg': {}, 'model_args': {'num_heads': 0}}
    (tmp_path / 'card' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'cannot make a model from .*ZeroDivisionError'):
        load_model(tmp_path / 'card')
    (tmp_path / 'card' / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'config\.json is missing'):
        load_model(tmp_path / 'card' / 'model.safetensors')


@pytest.mark.parametrize(
    ('state', 'text'),
    [
        ({'state_dict': {'w': torch.ones(1)}}, "no 'arch' entry; write load_model"),
        (
            {'arch': 'test_resnt', 'state_dict': {'w': torch.ones(1)}},
            "'test_resnt' is no file.* near it are test_resnet",
        ),
        ({'arch': ARCH, 'state_dict': {'w': torch.ones(1)}}, 'do not fit the model: .*Missing key'),
        ({'arch': ARCH, 'state_dict': {'w': torch.tensor(float('nan'))}}, 'w are not finite'),
        ({'arch': ARCH, 'state_dict': {'w': torch.eye(2).to_sparse()}}, r'w is a sparse tensor.*to_dense'),
        ({'arch': ARCH, 'state_dict': {'w': torch.ones(1)}, 'args': {'input_size': 3}}, 'input_size 3; allowed'),
        ({'arch': ARCH, 'state_dict': {'w': torch.ones(1)}, 'args': {'model_kwargs': 5}}, 'model_kwargs 5.*allowed'),
        ({'arch': ARCH, 'state_dict': {'w': torch.ones(1)}, 'recipe': [1]}, 'do not fit the model'),
    ],
)
def test_checkpoints_that_are_no_model(tmp_path, state, text):
    torch.save(state, tmp_path / 'a.pth.tar')
    with pytest.raises(ValueError, match=f'(?s){text}'):
        load_model(tmp_path / 'a.pth.tar')


@pytest.mark.parametrize(
    ('spec', 'error', 'text'),
    [
        (
            'resnt18',
            ValueError,
            "'resnt18' is no file, no folder and no model in the timm registry; near it are .*resnet18",
        ),
        ('resnt18.a1_in1k', ValueError, 'near it are .*resnet18'),
        ('no/such/folder', ValueError, "'no/such/folder' is no file"),
        (f'{ARCH}.a9_in1k', ValueError, f"{ARCH} has no weights 'a9_in1k'; it has r160_in1k"),
        ('no/such/model_best.pth.tar', FileNotFoundError, 'model_best.pth.tar does not exist'),
    ],
)
def test_unknown_specs(spec, error, text):
    with pytest.raises(error, match=text):
        load_model(spec)


def test_a_training_folder_without_a_best_checkpoint(tmp_path):
    save_checkpoint(tmp_path / 'last.pth.tar', make_state())
    with pytest.raises(FileNotFoundError, match=r'model_best\.pth\.tar does not exist; .* holds last\.pth\.tar'):
        load_model(tmp_path)


def test_no_temporary_names_count_as_checkpoints(tmp_path):
    save_checkpoint(tmp_path / 'last.pth.tar', make_state(1))
    shutil.copy(tmp_path / 'last.pth.tar', tmp_path / '.checkpoint-9.pth.tar.1.0f3ab210.tmp')  # of a killed one
    assert latest_checkpoint(tmp_path).name == 'last.pth.tar'


def test_what_lies_after_a_step_is_set_aside(tmp_path):
    for name, step in {'checkpoint-0': 3, 'checkpoint-1': 6, 'checkpoint-2': 9, 'last': 10, 'model_best': 9}.items():
        save_checkpoint(tmp_path / f'{name}.pth.tar', make_state(step))
    (tmp_path / 'checkpoint-7.pth.tar').write_bytes(b'damaged')
    point = tmp_path / 'checkpoint-1.pth.tar'
    aside = set_aside(tmp_path, 6, point, None)
    assert aside == tmp_path / 'abandoned-after-step-6'
    steps = {path.name: load_checkpoint(path)['step'] for path in aside.iterdir()}
    assert steps == {'checkpoint-2.pth.tar': 9, 'last.pth.tar': 10, 'model_best.pth.tar': 9}
    assert latest_checkpoint(tmp_path).name == 'last.pth.tar' and (tmp_path / 'last.pth.tar').samefile(point)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'checkpoint-7.pth.tar', 'last.pth.tar'
    ]  # fmt: skip
    assert set_aside(tmp_path, 6, point, None) is None
    save_checkpoint(tmp_path / 'model_best.pth.tar', make_state(8))
    assert set_aside(tmp_path, 6, point, tmp_path / 'checkpoint-0.pth.tar').name == 'abandoned-after-step-6-2'
    assert load_checkpoint(tmp_path / 'model_best.pth.tar')['step'] == 3
