"""Against RobustBench's own code, with random weights: no checkpoint can be downloaded in a test."""

import base64
import hashlib
import importlib.util
import json
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from records import HYPER, complete
from torch import nn

from timm_robust import robustbench as door
from timm_robust.data import ImageData
from timm_robust.evaluation.measure import evaluate
from timm_robust.models import wide_resnet
from timm_robust.models.load import load_model
from timm_robust.pixels import pixel_input
from timm_robust.robustbench import conversion, package, report, submit
from timm_robust.robustbench.__main__ import main
from timm_robust.robustbench.zoo import LINF, ZooEntry, check_network, entry_of, to_ours, to_theirs
from timm_robust.threat_model import ThreatModel
from timm_robust.weights.releases import RELEASES, releases_of, split_name

NEEDS = pytest.mark.skipif(
    importlib.util.find_spec('robustbench') is None, reason='robustbench is not installed; make test installs it'
)
SAMPLES = {  # one of each kind, and one with statistics
    'Dai2021Parameterizing': 'wrn28_10_pssilu',
    'Carmon2019Unlabeled': 'wrn28_10_relu',
    'Hendrycks2019Using': 'wrn28_10_relu',
    'Chen2020Efficient': 'wrn34_10_relu',
    'Wang2023Better_WRN-28-10': 'wrn28_10_silu',
    'Sehwag2021Proxy_R18': 'resnet18_relu',
}


def theirs(name, dtype=torch.float32):
    """RobustBench's network with random weights, and statistics that batch norm does not start with."""
    torch.manual_seed(0)
    net = conversion.zoo_network(name).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    if name.startswith('Dai'):
        with torch.no_grad():
            net.activation.alpha.fill_(1.3)
            net.activation.beta.fill_(-0.02)
    return net.to(dtype)


@pytest.fixture
def x():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@NEEDS
def test_every_entry_has_a_name_of_ours():
    assert len(LINF) == 44
    for name, entry in LINF.items():
        assert split_name(conversion.release_name(name, entry))[0] == entry.arch


@NEEDS
@pytest.mark.parametrize('name', LINF)
def test_every_entry_has_the_weights_of_robustbenchs_definition(name, monkeypatch):
    entry = entry_of(name)
    package.robustbench()
    made = torch.tensor
    monkeypatch.setattr(torch, 'tensor', lambda *args, **kwargs: made(*args, **{'device': 'cpu', **kwargs}))
    with torch.device('meta'):
        net = conversion.zoo_network(name)
        ours = timm.create_model(entry.arch, **entry.model_kwargs)
    weights = {key: value for key, value in net.state_dict().items() if key not in ('mu', 'sigma')}
    if entry.kind == 'paf':  # meta tensors cannot be compared: copies are the same parameter
        weights = {key: torch.zeros(value.shape) if 'activation' in key else value for key, value in weights.items()}
    converted = {key: value.shape for key, value in to_ours(weights, entry).items()}
    assert converted == {key: value.shape for key, value in ours.state_dict().items()}
    for attribute, value in (('mean', entry.mean), ('std', entry.std)):
        buffer = getattr(net, {'mean': 'mu', 'std': 'sigma'}[attribute], getattr(net, attribute, None))
        if buffer is not None:
            assert buffer.flatten().tolist() == pytest.approx(value)
        assert buffer is not None or entry.kind != 'deepmind'


@NEEDS
@pytest.mark.parametrize('name', SAMPLES)
def test_a_checkpoint_converts_to_the_same_function_and_back(name, x, tmp_path):
    net = theirs(name)
    torch.save({'state_dict': {f'module.{key}': value for key, value in net.state_dict().items()}}, tmp_path / 'a.pt')
    folder = door.convert(name, tmp_path / 'a.pt', tmp_path / 'ours')
    model = load_model(folder)
    assert type(model) is type(timm.create_model(SAMPLES[name], device='meta'))
    assert not (folder / 'LICENSE').exists()  # the weights are their authors'
    with pytest.raises(ValueError, match=r'a\.pt exists; name a new one, or remove it'):
        door.convert(name, folder, tmp_path / 'a.pt')
    with torch.no_grad():
        expected = net(x)
        assert torch.allclose(pixel_input(model)(x), expected, atol=1e-5 * expected.abs().max().item())
    door.convert(name, folder, tmp_path / 'b.pt')
    again = torch.load(tmp_path / 'b.pt', weights_only=True)
    fresh = conversion.zoo_network(name).eval()
    fresh.load_state_dict(again, strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(x), expected)


@NEEDS
def test_dais_network_is_ours_bit_for_bit_in_float64_up_to_the_pooling(x):
    name = 'Dai2021Parameterizing'
    net, entry = theirs(name, torch.float64), entry_of(name)
    assert sum('activation' in key for key in net.state_dict()) == 26  # 13 copies of alpha and beta
    model = timm.create_model(entry.arch).double().eval()
    model.load_state_dict(to_ours(net.state_dict(), entry))
    with torch.no_grad():
        x = x.double()
        features = net.block3(net.block2(net.block1(net.conv1(x))))
        assert torch.equal(model.forward_features(x), net.activation(net.bn1(features)))
        assert torch.allclose(model(x), net(x), rtol=0, atol=1e-15)  # the mean of 64 pixels, summed in another order
    for prefix in ('module.', 'module.module.'):  # of DataParallel, and of a file saved from it twice
        named = wide_resnet.checkpoint_filter_fn({prefix + key: v for key, v in net.state_dict().items()}, model)
        assert named.keys() == model.state_dict().keys() == wide_resnet.checkpoint_filter_fn(named, model).keys()
        assert all(torch.equal(named[key], value) for key, value in model.state_dict().items())
    back = to_theirs(model.state_dict(), list(net.state_dict()), entry)
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


def test_copies_that_differ_and_other_networks_are_refused(tmp_path):
    entry = entry_of('Dai2021Parameterizing')
    copies = {'activation.alpha': torch.ones(1), 'block1.layer.0.activation.alpha': torch.zeros(1)}
    with pytest.raises(ValueError, match='copies of alpha differ'):
        to_ours(copies, entry)
    with pytest.raises(ValueError, match=r'mu is .*, expected .*; is it another entry'):
        to_ours({'mu': torch.zeros(1, 3, 1, 1)}, entry_of('Chen2020Efficient'))
    with pytest.raises(ValueError, match=r'Rebuffi2021Fixing_R18_ddpm does not convert: .*near it, these do: Rebuffi'):
        entry_of('Rebuffi2021Fixing_R18_ddpm')
    torch.save({'state_dict': {'conv1.weight': torch.zeros(1)}}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match=r'a\.pt is not Carmon2019Unlabeled: .*Missing key'):
        door.convert('Carmon2019Unlabeled', tmp_path / 'a.pt', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@NEEDS
@pytest.mark.parametrize(
    ('source', 'entry', 'kind'),
    [
        ('Wang2023Better_WRN-28-10', 'Carmon2019Unlabeled', 'deepmind'),
        ('Carmon2019Unlabeled', 'Wang2023Better_WRN-28-10', 'trades'),
    ],
)
def test_equal_shapes_of_another_network_are_refused(tmp_path, source, entry, kind):
    torch.save(theirs(source).state_dict(), tmp_path / 'a.pt')
    with pytest.raises(ValueError, match=rf'named as those of a network of kind {kind}; .*the file of another entry'):
        door.convert(entry, tmp_path / 'a.pt', tmp_path / 'ours')
    assert not (tmp_path / 'ours').exists()
    folder = door.convert(source, tmp_path / 'a.pt', tmp_path / 'ours')
    for wrong in (entry, 'Hendrycks2019Using'):  # the same network as Carmon's, with other statistics
        with pytest.raises(ValueError, match=rf'computes otherwise than {wrong}, wrn28_10_.*: mean .* there'):
            door.convert(wrong, folder, tmp_path / 'b.pt')
    with pytest.raises(ValueError, match='named as those of a network of kind timm_robust'):
        door.convert(entry, folder / 'model.safetensors', tmp_path / 'other')
    assert not (tmp_path / 'b.pt').exists() and not (tmp_path / 'other').exists()


def test_a_deeper_network_is_not_cut_off_on_the_way_back():
    deep = timm.create_model('wrn34_10_relu', device='meta').state_dict()
    shallow = timm.create_model('wrn28_10_relu', device='meta').state_dict()
    names = [key.replace('stages.', 'block').replace('fc.', 'linear.') for key in shallow]
    entry = ZooEntry('wrn28_10_relu', 'trades')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide_resnet, 'own_key', lambda name: list(shallow)[names.index(name)])
        assert set(to_theirs(shallow, names, entry)) == set(names)
        with pytest.raises(ValueError, match=r"stages\.0\.4\..* has no counterpart in RobustBench's network"):
            to_theirs(deep, names, entry)


def test_weightless_networks_and_corruptions_of_other_data_are_not_measured(tmp_path, capsys):
    for words, message in (
        (['resnet18_pssilu'], 'resnet18_pssilu is a network without weights; name MODEL.TAG'),
        (['resnet18_relu.fgsm_cifar10_linf', '--threat-model', 'corruptions', '--dataset', 'cifar100'], 'CIFAR-10-C'),
    ):
        assert main(['benchmark', *words, '--data-dir', str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_entries_of_the_same_size_are_those_of_its_depth_and_width():
    same = {('resnet18_silu', 'PreActResNet-18'), ('wrn34_10_relu', 'WideResNet-34-10'),
            ('wrn28_10_pssilu', 'WideResNet-28-10-PSSiLU')}  # fmt: skip
    networks = ('ResNet-152', 'WideResNet-34-20', 'WideResNet-28-4', *(network for _, network in same))
    found = {(arch, network) for arch, _ in same for network in networks if report._same_size(arch, network)}
    assert found == same


def test_padding_is_part_of_the_network():
    entry = entry_of('Wang2023Better_WRN-28-10')
    statistics = {'mean': entry.mean, 'std': entry.std}
    model = timm.create_model('wrn28_10_silu', device='meta', pretrained_cfg_overlay=statistics)
    with pytest.raises(ValueError, match=r'computes otherwise than Wang2023Better_WRN-28-10, wrn28_10_silu: .* pads '):
        check_network(model, 'Wang2023Better_WRN-28-10', entry)


def test_a_prefix_that_robustbench_strips_is_stripped():
    weights = {'conv1.weight': torch.ones(1), 'block1.layer.0.bn1.weight': torch.zeros(1)}
    entry = entry_of('Chen2020Efficient')
    expected = to_ours(weights, entry)
    assert set(expected) == {'conv1.weight', 'stages.0.0.bn1.weight'}
    assert to_ours({f'model.{key}': value for key, value in weights.items()}, entry) == expected


def test_a_web_page_and_a_pickle_are_named(tmp_path):
    (tmp_path / 'page.pt').write_bytes(b'<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>')
    with pytest.raises(ValueError, match=r'page\.pt is a web page, not a checkpoint'):
        door.convert('Dai2021Parameterizing', tmp_path / 'page.pt', tmp_path / 'out')
    torch.save({'state_dict': nn.Linear(1, 1)}, tmp_path / 'code.pt')
    with pytest.raises(ValueError, match=r'holds Python objects .* and could run code'):
        door.convert('Dai2021Parameterizing', tmp_path / 'code.pt', tmp_path / 'out')


@NEEDS
def test_fetch_says_what_to_do_without_a_network(tmp_path, monkeypatch, capsys):
    utils = package.robustbench().utils

    def refuse(drive_id, path):
        raise OSError('no route to host')

    def page(drive_id, path):
        path.write_bytes(b'<html>quota exceeded</html>')

    arguments = ['fetch', 'Dai2021Parameterizing', str(tmp_path / 'out')]
    monkeypatch.setattr(utils, 'download_gdrive_new', refuse)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert '1eO-MNXQSAoCuNFjIbdCheprT4Beqo9Zv' in error and 'convert Dai2021Parameterizing FILE.pt' in error
    monkeypatch.setattr(utils, 'download_gdrive_new', page)
    assert main(arguments) == 2 and 'is a web page' in capsys.readouterr().err
    monkeypatch.setattr(utils, 'download_gdrive_new', lambda drive_id, path: None)
    assert main(arguments) == 2 and 'did not arrive' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


class SmallNet(nn.Sequential):
    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Conv2d(3, 4, 5, 4), nn.SiLU(), nn.Flatten(), nn.Linear(196, 10))


def images(model, n=10):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(60, 190, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = ImageData(pixels, torch.zeros(n, dtype=torch.int64), tuple('abcdefghij'), 'cifar10')
    with torch.no_grad():
        labels = model(data.pixels()).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    return ImageData(pixels, labels, data.classes, 'cifar10')


def test_a_radius_on_the_scale_of_8_bit_pixels_is_refused():
    with pytest.raises(ValueError, match="write '128/255'"):
        door.benchmark(None, None, norm='L2', eps=128)


@pytest.mark.slow
@NEEDS
@pytest.mark.parametrize(('norm', 'eps'), [('Linf', 0.004), ('L2', 0.12)])
def test_robustbenchs_benchmark_and_our_evaluation_agree_flag_by_flag(norm, eps, short_attacks):
    model = SmallNet().eval()
    data = images(model)
    upstream = door.benchmark(model, data, norm=norm, eps=eps, batch_size=4, seed=5)
    result, tensors = evaluate(model, data, ThreatModel(norm, eps), batch_size=4, seed=5)
    assert torch.equal(upstream['robust'], tensors['robust'])
    assert 0 < int(upstream['robust'].sum()) < 9
    assert upstream['clean_acc'] == pytest.approx(result.clean_acc) == 0.9
    assert upstream['autoattack_acc'] == pytest.approx(result.autoattack_acc)
    again = door.benchmark(model, data, norm=norm, eps=eps, batch_size=4, seed=5, n=8)
    assert torch.equal(again['robust'], upstream['robust'][:8])


@NEEDS
def test_common_corruptions_from_local_files(tmp_path, monkeypatch):
    data = package.robustbench().data
    names = data.CORRUPTIONS[:2]  # of 15, each of which is read five times, 150 MB
    monkeypatch.setattr(data, 'CORRUPTIONS', names)
    with pytest.raises(FileNotFoundError, match=r'shot_noise\.npy is missing; unpack CIFAR-10-C\.tar'):
        door.corruptions(SmallNet(), tmp_path)
    folder = tmp_path / 'CIFAR-10-C'
    folder.mkdir()
    model = SmallNet().eval()
    for name in names:  # 50,000 rows, most of them holes in the file
        shape = (50_000, 32, 32, 3)
        rows = np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', np.uint8, shape)
        for severity in range(5):
            rows[severity * 10_000 : severity * 10_000 + 4] = 40 * severity
    with torch.no_grad():
        predicted = [int(model(torch.full((1, 3, 32, 32), 40 * severity / 255)).argmax()) for severity in range(5)]
    np.save(folder / 'labels.npy', np.full(50_000, predicted[0]))
    found = door.corruptions(model, tmp_path, n=4)
    expected = [float(label == predicted[0]) for label in predicted]
    assert found['accuracies'] == dict.fromkeys(names, expected)
    assert found['corruptions_acc'] == pytest.approx(np.mean(expected))


@NEEDS
@pytest.mark.parametrize('name', sorted(RELEASES))
def test_robustbench_loads_every_release(name, x):
    release = RELEASES[name]
    method = release.tag.rpartition(f'_{release.tag.split("_")[-2]}')[0]
    expected = pixel_input(timm.create_model(name, pretrained=True).eval())(x)
    spellings = [name, f'{release.arch}.{method}']
    spellings += [release.arch] if releases_of(release.arch)[0] is release else []
    for spelling in spellings:
        model = door.load_model(spelling, dataset='cifar10', threat_model=release.norm)
        assert not model.training and torch.equal(model(x), expected)


@NEEDS
def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match=r"'wrn28_10_pssilu\.zzz' is no model of RobustBench for cifar10 Linf, and none of"
    ):
        door.load_model('wrn28_10_pssilu.zzz')
    for options in ({'norm': 'L2'}, {'threat_model': 'L2'}, {'threat_model': 'Linf', 'norm': 'L2'}):
        for name in ('resnet18_pssilu', 'resnet18_pssilu.fgsm', 'Dai2021Parameterizing'):
            with pytest.raises(
                ValueError, match=f"'{name}' is no model of RobustBench for cifar10 L2, and none of ours"
            ):
                door.load_model(name, **options)


@NEEDS
def test_norm_chooses_as_threat_model_does(monkeypatch):
    asked = []
    monkeypatch.setattr(
        package.robustbench().utils, 'load_model', lambda name, **options: asked.append((name, options))
    )
    door.load_model('Rebuffi2021Fixing_70_16_cutmix_extra', norm='L2', model_dir='here')
    expected = {'dataset': 'cifar10', 'threat_model': 'L2', 'model_dir': 'here'}
    assert asked == [('Rebuffi2021Fixing_70_16_cutmix_extra', expected)]


def test_a_missing_package_says_what_to_type(monkeypatch):
    monkeypatch.setattr(importlib, 'import_module', lambda name: (_ for _ in ()).throw(ImportError('no geotorch')))
    with pytest.raises(
        ImportError, match=r"no geotorch\); in a checkout, type: pip install -e '\.\[robustbench\]' && pip install"
    ):
        package.robustbench()


def install(root, version, code='', files=('robustbench/__init__.py',), name='robustbench'):
    """An installed package as pip leaves it: its files, and their hashes in RECORD."""
    lines, info = [], root / f'{name}-{version}.dist-info'
    info.mkdir(parents=True)
    for file in files:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(code)
        digest = base64.urlsafe_b64encode(hashlib.sha256(code.encode()).digest()).rstrip(b'=').decode()
        lines.append(f'{file},sha256={digest},{len(code)}\n')
    (info / 'RECORD').write_text(''.join(lines))
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')


def test_another_robustbench_is_named_with_who_put_it_there(tmp_path, monkeypatch):
    """In a path of its own: 1.1.1, then torchattacks over it, an older one, and a folder that hides it."""
    site = tmp_path / 'site'
    monkeypatch.delitem(sys.modules, 'robustbench', raising=False)
    monkeypatch.setattr(sys, 'path', [str(site)])
    install(site, '1.1.1', 'new = True')
    package._check_version()
    install(site, '3.5.1', 'new = False', name='torchattacks')
    reinstall = r'pip install --force-reinstall --no-deps robustbench==1\.1\.1'
    with pytest.raises(
        ImportError, match=rf'overwritten, .*; torchattacks laid .*uninstall -y torchattacks && {reinstall}'
    ):
        package._check_version()
    (tmp_path / 'mine/robustbench').mkdir(parents=True)
    (tmp_path / 'mine/robustbench/__init__.py').touch()
    install(tmp_path / 'sound', '1.1.1', 'new = True')
    monkeypatch.setattr(sys, 'path', [str(tmp_path / 'mine'), str(tmp_path / 'sound')])
    with pytest.raises(ImportError, match=r'comes from .*mine/robustbench, .*take that folder off PYTHONPATH'):
        package._check_version()
    monkeypatch.setattr(sys, 'path', [str(tmp_path / 'mine')])
    with pytest.raises(ImportError, match=rf'no known version, needed is 1\.1\.1; type: {reinstall}'):
        package._check_version()
    install(tmp_path / 'old', '1.0')
    monkeypatch.setattr(sys, 'path', [str(tmp_path / 'old')])
    with pytest.raises(ImportError, match=rf'robustbench is 1\.0, needed is 1\.1\.1; type: {reinstall}'):
        package._check_version()


def record(root, attack='autoattack', n=1000, sha='a' * 64, eps='8/255', tag='at_cifar10_linf', extra='null'):
    folder = root / f'resnet18_pssilu.{tag}'
    (folder / 'flags').mkdir(parents=True)
    np.savez(folder / f'flags/{attack}_{n}.npz', robust=np.ones(n, bool))
    result = {'attack': attack, 'n': n, 'dataset': 'cifar10', 'norm': 'Linf', 'eps_text': eps, 'clean_acc': 0.8}
    result |= {'autoattack_acc': 0.515, 'apgd_acc': 0.515, 'data_sha256': sha, 'seed': 0, 'batch_size': 250}
    result |= {'versions': {'pyautoattack': '0.2.0'}, 'commit': 'abc', 'per_attack': {'apgd-ce': 0.55}, 'warnings': []}
    result |= {'wall_time_s': 9.0, 'hardware': 'abacus', 'max_distance': 0.0313}
    content = {'model': folder.name, 'weights': {'sha256': 'b' * 64}, 'training': {'notes': ['Trained on copies.']}}
    content['measurements'] = [{'key': f'{attack}_{n}', 'note': None, 'result': result}]
    (folder / 'results.json').write_text(json.dumps(complete(content)))
    (folder / 'train_hparams.yaml').write_text(f'{yaml.safe_dump(HYPER)}extra_data: {extra}\n')
    return folder


def test_compare_places_a_model_among_the_published(tmp_path):
    folder = record(tmp_path)
    table = report.compare(folder)
    report.draw([folder], tmp_path / 'plot.png')
    lines = table.splitlines()
    ours = next(i for i, line in enumerate(lines) if 'resnet18_pssilu' in line)
    robust = [float(line.split(' | ')[4].split()[0]) for line in lines[2:] if line.startswith('|')]
    assert robust == sorted(robust, reverse=True) and '51.50 ± 1.58' in lines[ours] and '| 1000 |' in lines[ours]
    rank = sum(entry['robust_acc'] > 51.5 for entry in report.entries_of('cifar10', 'Linf')) + 1
    assert lines[ours].startswith(f'| **{rank}** |')
    assert 'Rebuffi2021Fixing_R18_ddpm' in table  # a ResNet-18, far above
    assert 'Trained on copies.' in table and (tmp_path / 'plot.png').stat().st_size > 5000
    with pytest.raises(ValueError, match='no numbers of RobustBench for svhn Linf'):
        report.entries_of('svhn', 'Linf')


def test_compare_without_names_leaves_out_what_was_not_measured(tmp_path, capsys):
    record(tmp_path, attack='none', tag='fgsm_cifar10_linf')
    assert main(['compare', '--cards', str(tmp_path)]) == 2
    assert 'no measurement with AutoAttack or its APGD part; type: timm-robust measure' in capsys.readouterr().err
    record(tmp_path)
    assert main(['compare', '--cards', str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count('at_cifar10_linf') and 'fgsm_cifar10_linf' not in out
    assert 'resnet18_pssilu.fgsm_cifar10_linf is left out' in err


@pytest.mark.parametrize('eps', ['0.031', '7.5/255', '4/255'])
def test_another_radius_is_neither_compared_nor_submitted(tmp_path, eps):
    message = f'was measured at Linf {eps}, the leaderboard is for Linf 8/255 .* --eps RADIUS'
    with pytest.raises(ValueError, match=message):
        report.compare(record(tmp_path, eps=eps))
    with pytest.raises(ValueError, match=message):
        submit.submission(record(tmp_path / 'full', n=10_000, eps=eps), tmp_path / 'out', tmp_path, PAPER)
    assert not (tmp_path / 'out').exists()


def test_compare_tells_of_extra_data(tmp_path):
    def our_row(table):
        return next(line for line in table.splitlines() if '**resnet18_pssilu' in line)

    assert our_row(report.compare(record(tmp_path))).endswith('| no |')
    table = report.compare(record(tmp_path, tag='trades_edm1m_cifar10_linf', extra='1m.npz'))
    assert our_row(table).endswith('| 1 million images of a diffusion model (EDM) |')
    assert 'counts generated images as no extra data' in table
    table = report.compare(record(tmp_path, tag='at_more_cifar10_linf', extra='tiny.npz'))
    assert our_row(table).endswith('| images of `tiny.npz` |')


def test_a_submission_tells_of_extra_data(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, 'official_sha256', lambda data_dir: 'a' * 64)

    def submitted(name, tag, **info):
        folder = record(tmp_path / name, n=10_000, tag=tag, extra='x.npz')
        out = submit.submission(folder, tmp_path / f'{name} out', tmp_path, PAPER | info)
        issues.append((out / 'issue.md').read_text())
        return json.loads((out / f'model_info/cifar10/Linf/{folder.name}.json').read_text())

    issues = []
    info = submitted('generated', 'at_ddpm6m_cifar10_linf')
    assert info['footnote'] == 'It uses additional ~6M synthetic images in training.'
    assert info['additional_data'] is False  # as RobustBench counts it
    assert '- Additional data: false (It uses additional ~6M synthetic images in training.)' in issues[-1]
    assert submitted('own words', 'at_ddpm6m_cifar10_linf', footnote='Mine.')['footnote'] == 'Mine.'
    real = submitted('real', 'at_ti500k_cifar10_linf', additional_data=True)
    assert real['additional_data'] is True and 'footnote' not in real
    with pytest.raises(ValueError, match=r'trained on images of `x\.npz` too; write additional_data: true .* footnote'):
        submitted('unknown', 'at_ti500k_cifar10_linf')


def test_published_numbers_are_robustbenchs():
    entries = {entry['name']: entry for entry in report.entries_of('cifar10', 'Linf')}
    dai = entries['Dai2021Parameterizing']
    assert (dai['clean_acc'], dai['robust_acc'], dai['architecture']) == (87.02, 61.55, 'WideResNet-28-10-PSSiLU')


PAPER = {
    'link': 'https://arxiv.org/abs/2110.05626',
    'name': 'A Title',
    'authors': 'Ann Author, Bob Other',
    'venue': 'arXiv',
}


def test_a_submission_is_only_written_for_what_robustbench_takes(tmp_path, monkeypatch):
    folder = record(tmp_path)
    with pytest.raises(
        ValueError, match=r'was measured on autoattack_1000; RobustBench takes AutoAttack on all 10,000'
    ):
        submit.submission(folder, tmp_path / 'out', tmp_path, PAPER)
    with pytest.raises(ValueError, match='the paper lacks venue'):
        submit.submission(folder, tmp_path / 'out', tmp_path, {**PAPER, 'venue': None})
    folder = record(tmp_path / 'full', n=10_000)
    with pytest.raises(FileNotFoundError, match='holds no intact cifar-10-batches-py'):
        submit.submission(folder, tmp_path / 'out', tmp_path, PAPER)
    monkeypatch.setattr(submit, 'official_sha256', lambda data_dir: 'c' * 64)
    with pytest.raises(ValueError, match='was not measured on the official CIFAR-10 test images'):
        submit.submission(folder, tmp_path / 'out', tmp_path, PAPER)
    assert not (tmp_path / 'out').exists()
    monkeypatch.setattr(submit, 'official_sha256', lambda data_dir: 'a' * 64)
    out = submit.submission(folder, tmp_path / 'out', tmp_path, PAPER)
    info = json.loads((out / 'model_info/cifar10/Linf/resnet18_pssilu.at_cifar10_linf.json').read_text())
    assert (info['eps'], info['clean_acc'], info['autoattack_acc']) == ('8/255', '80.00', '51.50')
    mandatory = (
        'link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc reported'
    )
    assert set(mandatory.split()) <= set(info) and info['additional_data'] is False
    text = (out / 'issue.md').read_text()
    assert text.startswith('# [New Model] Author') and '- Robust accuracy: 51.50%' in text and 'b' * 64 in text
    assert len((out / 'SHA256SUMS').read_text().splitlines()) == 6
    assert 'robust accuracy after APGD-CE: 55.00%' in (out / 'autoattack.log').read_text()
