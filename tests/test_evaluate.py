import dataclasses
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import warm
from PIL import Image
from torch import nn

from timm_robust.data import ImageData, load_dataset
from timm_robust.evaluate import main
from timm_robust.evaluation import measure as module
from timm_robust.evaluation.measure import SeededStart, evaluate
from timm_robust.evaluation.split import default_batch_size
from timm_robust.models import load_model, trained_for
from timm_robust.pixels import PixelInput, pixel_input
from timm_robust.results import NOT_CHECKED, RobustnessResult
from timm_robust.threat_model import ThreatModel

LINF = ThreatModel('Linf', 0.02)


def image_data(n: int = 16, num_classes: int = 10) -> ImageData:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(77, 179, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)  # eps stays inside [0, 1]
    return ImageData(pixels, torch.zeros(n, dtype=torch.long), tuple(map(str, range(num_classes))), 'noise')


def fitted(model: nn.Module, n: int = 16) -> ImageData:
    """Random images that the model labels right, but for the first."""
    data = image_data(n)
    with torch.no_grad():
        labels = model(data.pixels()).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    return dataclasses.replace(data, labels=labels)


def linear_net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def radii(model: nn.Sequential, data: ImageData) -> torch.Tensor:
    """The Linf distance of each image to a linear model's decision boundary; 0 where the label is wrong."""
    weight, logits, y = model[1].weight, model(data.pixels()), data.labels
    gaps = (logits.gather(1, y[:, None]) - logits) / (weight[y][:, None] - weight[None]).abs().sum(2)
    return gaps.scatter(1, y[:, None], torch.inf).amin(1).clamp_min(0).detach()


def test_signs_are_looked_for_on_images_of_every_class(monkeypatch):
    data, seen = image_data(80), []
    data = dataclasses.replace(data, labels=torch.arange(80) // 8)  # class by class, as a folder has them
    monkeypatch.setattr(module, 'find_problems', lambda logits, x, y, *_, **__: seen.append((x, y)) or [])
    evaluate(linear_net(), data, LINF, attack='pgd')
    [(x, y)] = seen
    assert len(x) == 50 and y.unique().tolist() == list(range(10))
    assert all((image == data.pixels()).flatten(1).all(1).any() for image in x)


def test_a_linear_model_gets_its_exact_robust_accuracy():
    model = linear_net()
    data = fitted(model)
    radius = radii(model, data)
    eps = radius.sort()[0][7:9].mean().item()
    result, tensors = evaluate(model, data, ThreatModel('Linf', eps), attack='autoattack')
    assert torch.equal(tensors['robust'], radius > eps)
    assert result.autoattack_acc == int((radius > eps).sum()) / 16
    assert result.clean_acc == 15 / 16 and result.autoattack_acc <= result.pgd_acc < result.clean_acc
    assert result.max_distance == pytest.approx(eps, rel=1e-3) and result.mean_distance <= result.max_distance
    assert (result.attack_version, result.steps, result.step_size) == ('standard', 10, 2.5 * eps / 10)
    assert result.apgd_acc == result.per_attack['apgd-t'] >= result.autoattack_acc
    assert result.warnings == [] and result.rejected == 0 and result.dtype == 'float32'


def test_pgd_between_no_ball_and_a_huge_one():
    model = linear_net()
    data = fitted(model)
    for eps, share in ((0.0, 15 / 16), (1.0, 0.0)):
        result, tensors = evaluate(model, data, ThreatModel('Linf', eps), attack='pgd')
        assert result.pgd_acc == share and result.clean_acc == 15 / 16
        assert torch.equal(tensors['y_pred_adv'] == data.labels, tensors['robust'])
    assert result.autoattack_acc is result.apgd_acc is result.attack_version is None
    assert result.max_distance == pytest.approx(1, abs=0.4)


def test_no_attack_measures_clean_accuracy_only():
    model = linear_net()
    result, tensors = evaluate(model, fitted(model), LINF, attack='none')
    assert result.clean_acc == 15 / 16 and result.pgd_acc is None and result.steps is None
    assert set(tensors) == {'y', 'y_pred', 'clean_correct'}


def test_pgd_depends_on_the_seed_and_not_on_the_batches_or_on_n():
    model = linear_net()
    data = fitted(model)
    threat_model = ThreatModel('Linf', radii(model, data).median().item())

    def x_adv(**settings):
        tensors = evaluate(model, data, threat_model, attack='pgd', pgd_steps=2, **settings)[1]
        assert not tensors['robust'].all()
        return tensors['x_adv']

    reference = x_adv(seed=3)
    assert torch.allclose(x_adv(seed=3, batch_size=5), reference, atol=1e-6)
    assert torch.allclose(x_adv(seed=3, n=9), reference[:9], atol=1e-6)
    torch.manual_seed(9)
    assert torch.equal(x_adv(seed=3), reference)
    assert not torch.allclose(x_adv(seed=4), reference, atol=1e-6)


@pytest.mark.parametrize(('side', 'size'), [(8, 250), (64, 250), (224, 20), (2000, 1)])
def test_batches_of_large_images_are_smaller(side, size):
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    assert default_batch_size(ImageData(images, torch.zeros(1, dtype=torch.long), ('a', 'b'), 'x')) == size


def test_restarts_only_break_more():
    model = nn.Sequential(linear_net(), nn.Hardtanh(-0.05, 0.05))  # flat nearly everywhere: the start decides
    data = fitted(model, 32)
    eps = ThreatModel('Linf', 0.1)
    shares = [evaluate(model, data, eps, attack='pgd', pgd_steps=1, pgd_restarts=k)[0].pgd_acc for k in (1, 2, 6)]
    assert shares[0] >= shares[1] >= shares[2] and shares[0] > shares[2]


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_seeded_starts_lie_in_the_ball_and_follow_their_key(norm):
    x = image_data(4).pixels()
    start = SeededStart(norm, 0.1, keys=('a', 'b', 'c', 'a')).random_start(x)
    assert ThreatModel(norm, 0.1).contains(start, x).all()
    noise = start - x
    assert torch.allclose(noise[0], noise[3], atol=1e-6) and not torch.allclose(noise[0], noise[1], atol=1e-3)
    alone = SeededStart(norm, 0.1, keys=('c',)).random_start(x[2:3])
    assert torch.equal(alone, start[2:3])


def test_a_model_without_a_gradient_is_measured_and_said_so():
    class Cut(nn.Module):
        def forward(self, x):
            return x.detach()

    model = nn.Sequential(Cut(), linear_net())
    data = fitted(model)
    threat_model = ThreatModel('Linf', 2 * radii(model[1], data).median().item())
    result, _ = evaluate(model, data, threat_model)
    assert result.autoattack_acc < result.apgd_acc
    assert any('zero gradient' in text for text in result.warnings)


def test_what_only_pgd_broke_is_said_and_earlier_time_counts(monkeypatch):
    model = linear_net()
    data = fitted(model)
    weak = module.autoattack

    def blind(model, x, y, threat_model, **settings):
        found = weak(model, x, y, ThreatModel(threat_model.norm, 0.0), **settings)
        return dataclasses.replace(found, earlier_s=1000.0)

    monkeypatch.setattr(module, 'autoattack', blind)
    monkeypatch.setattr(module, 'time', types.SimpleNamespace(perf_counter=lambda: 7.0))
    result, _ = evaluate(model, data, ThreatModel('Linf', 1.0), attack='apgd')
    assert result.warnings == ['PGD broke 15 images that apgd left standing']
    assert result.pgd_acc == 0 and result.apgd_acc == 15 / 16 and result.autoattack_acc is None
    assert result.wall_time_s == 1000  # the time of batches that a killed run had found counts


def test_a_copy_that_disagrees_is_not_searched_and_not_named(monkeypatch):
    class Other(nn.Module):
        def forward(self, x):
            return -model(x)

    model, said = linear_net(), []
    data = fitted(model)
    monkeypatch.setattr(module, 'search_model', lambda *args: Other())
    result, _ = evaluate(model, data, LINF, attack='apgd', progress=said.append)
    assert result.search == 'model' and any('searching on the model' in line for line in said)
    monkeypatch.setattr(module, 'search_model', lambda *args: model)
    assert evaluate(model, data, LINF, attack='apgd')[0].search == 'folded'


def test_doubts_that_do_not_fit_into_memory_end_it_before_the_long_attack(monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(module, 'find_problems', no_memory)
    monkeypatch.setattr(module, 'autoattack', lambda *args, **kwargs: pytest.fail('attacked before the checks'))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        evaluate(linear_net(), fitted(linear_net()), LINF, attack='autoattack')


class Lost(nn.Module):
    """Logits that are NaN for images that are bright on average."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + torch.where(x.mean((1, 2, 3)) > 0.5, torch.nan, 0.0)[:, None]


@pytest.mark.parametrize('attack', ['none', 'pgd', 'apgd'])
def test_images_whose_logits_are_nan_are_wrong_and_said_so(attack):
    data = image_data()
    images = torch.cat([torch.full_like(data.images[:5], 200), data.images[5:] // 4])
    data = dataclasses.replace(data, images=images)  # all of class 0, which argmax says for NaN
    result, tensors = evaluate(Lost(), data, LINF, attack=attack)
    assert tensors['y_pred'][:5].tolist() == [-1] * 5 and not tensors['clean_correct'][:5].any()
    assert 'the logits of 5 images are NaN: they count as wrong' in result.warnings
    assert attack == 'none' or not tensors['robust'][:5].any()


def test_adversarial_images_whose_logits_are_nan_are_broken_and_said_so():
    data = dataclasses.replace(image_data(), images=torch.full_like(image_data().images, 127))
    data = dataclasses.replace(data, labels=Lost().net(data.pixels()).argmax(1))
    result, tensors = evaluate(Lost(), data, ThreatModel('Linf', 0.2), attack='pgd', pgd_steps=1)
    lost = int((tensors['y_pred_adv'] == -1).sum())
    assert lost and not tensors['robust'][tensors['y_pred_adv'] == -1].any()
    assert f'the logits of {lost} adversarial images are NaN: they count as wrong' in result.warnings


def test_two_classes_meet_both_attacks_of_apgd():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    data = image_data(num_classes=2)
    data = dataclasses.replace(data, labels=model(data.pixels()).argmax(1))
    result, _ = evaluate(model, data, LINF, attack='apgd')
    assert result.attack_title == 'APGD-CE + APGD-T'
    assert result.robust_acc == result.apgd_acc == result.per_attack['apgd-t'] < 1


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 10))
    data = dataclasses.replace(image_data(), labels=model.eval()(image_data().pixels()).argmax(1))
    model.train()
    before, rng = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    result, _ = evaluate(model, data, LINF, attack='apgd')
    assert result.clean_acc == 1
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


def test_normalisation_comes_from_the_pretrained_cfg():
    model = linear_net()
    assert pixel_input(model) is model
    model.pretrained_cfg = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0)}
    assert pixel_input(model) is model
    model.pretrained_cfg = {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4), 'architecture': 'net', 'tag': 'in1k'}
    x = image_data(2).pixels()
    normalised = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    assert torch.allclose(pixel_input(model)(x), model(normalised), atol=1e-5)
    result, tensors = evaluate(model, image_data(2), LINF, attack='none')
    assert torch.equal(tensors['y_pred'], model(normalised).argmax(1)) and result.model == 'net.in1k'
    assert torch.allclose(
        PixelInput(model.bfloat16(), (0.5,), (0.5,))(x.bfloat16()).float(),
        model((2 * x - 1).bfloat16()).float(),
        atol=0.1,
    )
    assert not next(PixelInput(model, (0.5,), (0.5,)).buffers(recurse=False)).requires_grad
    timm_model = timm.create_model('test_resnet', num_classes=10)
    assert isinstance(pixel_input(timm_model), PixelInput)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'attack': 'fgsm'}, 'allowed: autoattack, apgd, pgd, none'),
        ({'n': 17}, 'first 17 images of noise'),
        ({'n': 0}, 'first 0 images'),
        ({'pgd_steps': 0}, 'pgd_steps must be at least 1'),
        ({'pgd_restarts': 0}, 'pgd_restarts must be at least 1'),
        ({'batch_size': 0}, 'batch_size must be at least 1'),
        ({'threat_model': ThreatModel('Linf', 0.02, (0.0, 2.0)), 'attack': 'pgd'}, r'write bounds=\(0.0, 1.0\)'),
        ({'pgd_step_size': 0.05}, 'pgd_step_size 0.05 is wider than the ball'),
        ({'model': nn.Linear(8, 10)}, r'gives \[1, 3, 8, 10\], not \[1, classes\]'),
        ({'model': nn.Sequential(nn.Flatten(), nn.Linear(10, 10))}, r'does not take images \[3, 8, 8\] of noise'),
        ({'data': image_data(16, 7)}, 'has 10 outputs, noise has 7 classes'),
    ],
)
def test_wrong_input_is_refused(change, message):
    given = {'model': linear_net(), 'data': image_data(), 'threat_model': LINF} | change
    with pytest.raises(ValueError, match=message):
        evaluate(given.pop('model'), given.pop('data'), given.pop('threat_model'), **given)


def test_a_size_that_square_fails_at_is_refused_before_any_work():
    images = torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    data = dataclasses.replace(image_data(2), images=images)
    with pytest.raises(ValueError, match=r'--attack apgd\)'):
        evaluate(lambda x: pytest.fail('asked the model'), data, ThreatModel('L2', 0.5))


def test_channels_that_do_not_fit_the_statistics_are_refused():
    model = linear_net()
    model.pretrained_cfg = {'mean': (0.5, 0.5), 'std': (0.5, 0.5)}
    with pytest.raises(ValueError, match='normalises 2 channels'):
        evaluate(model, image_data(), LINF)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """A tiny timm network after three epochs on the digits."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10)
    assert tuple(model.pretrained_cfg['mean']) != (0, 0, 0)
    data, pixels = load_dataset('digits', split='train'), pixel_input(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(3):
        for x, y in data.batches(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(pixels(x), y).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp('someone') / 'run' / 'best.pth.tar'
    path.parent.mkdir()
    torch.save({'arch': 'test_resnet', 'num_classes': 10, 'state_dict': model.state_dict()}, path)
    return path


def on_digits(model, flags):
    """Measure a model by the command."""
    return main([str(model), '--dataset', 'digits', *flags.split()])


def test_a_run_is_measured_in_the_ball_that_it_trained_for(checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)

    def ball(recipe, flags=''):
        torch.save({**state, 'recipe': recipe}, tmp_path / 'own.pth.tar')
        on_digits(tmp_path / 'own.pth.tar', f'-n 2 --attack pgd --steps 1 --no-checks --quiet {flags}')
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        return record['norm'], record['eps_text']

    trained = {'norm': 'L2', 'eps': '0.25'}
    assert ball(trained) == ('L2', '0.25') and ball(trained, '--eps 1') == ('L2', '1')
    assert ball(trained, '--norm Linf') == ('Linf', '8/255') and ball({}, '--norm L2') == ('L2', '0.5')
    assert ball({'norm': 'L2', 'eps': 1}) == ('L2', '1') and ball({'norm': 3, 'eps': []}) == ('Linf', '8/255')
    on_digits(tmp_path / 'own.pth.tar', '-n 2 --attack none')  # a stranger's
    torch.save({**state, 'recipe': {'norm': 'L2', 'eps': '0'}}, tmp_path / 'own.pth.tar')
    assert on_digits(tmp_path / 'own.pth.tar', '-n 2') == 2
    err = capsys.readouterr().err
    assert 'eps 0.0 leaves the attack no room' in err and 'the attacks have' not in err
    ball(trained)
    on_digits(tmp_path / 'own.pth.tar', '-n 2 --attack pgd --steps 1 --no-checks --eps 1')
    assert 'note: the attacks have L2 1, as in training; --norm' in capsys.readouterr().err
    assert trained_for(load_model(tmp_path / 'own.pth.tar')) == ThreatModel('L2', 0.25)
    assert trained_for(load_model('resnet18_relu.fgsm_cifar10_linf', pretrained=False)) == ThreatModel()
    timm_keys = set(load_model(checkpoint).pretrained_cfg)
    assert set(load_model(tmp_path / 'own.pth.tar').pretrained_cfg) == timm_keys  # it can be pushed to the Hub by timm


@pytest.mark.slow
def test_the_command_line_end_to_end(checkpoint, tmp_path, capsys):
    files = [tmp_path / 'results.json', tmp_path / 'flags.npz']
    files[0].write_text('{"model": "m", "dataset": "d", "attack": "none", "clean_acc": 0.5, "of": "an older version"}')
    where = f'--results-file {files[0]} --flags-file {files[1]}'
    on_digits(checkpoint, f'-n 8 --eps 1/255 --attack apgd --batch-size 8 --restarts 2 {where}')
    out, err = capsys.readouterr()
    result = RobustnessResult.from_json(files[0])
    assert RobustnessResult(**json.loads(out.splitlines()[-1])) == result
    assert 'APGD-CE + APGD-T' in out and 'Linf 1/255' in out
    assert 'images/s' in err and 'PGD-10 start 1 of 2' in err and 'apgd-t, batch 1: ' in err
    assert result.model == 'run/best.pth.tar' and 'someone' not in out and str(tmp_path) not in files[0].read_text()
    assert (result.n, result.dataset, result.split, result.restarts, result.seed) == (8, 'digits', 'test', 2, 0)
    assert result.clean_acc > 0.5 and result.apgd_acc <= result.pgd_acc <= result.clean_acc
    flags = np.load(files[1])
    assert flags['robust'].mean() == result.apgd_acc and flags['clean_correct'].mean() == result.clean_acc
    assert sorted(path.name for path in tmp_path.iterdir()) == ['flags.npz', 'results.json']


def test_the_default_flags_run_autoattack_on_the_first_images(checkpoint, capsys):
    on_digits(checkpoint, '-n 2 --eps 16/255 --quiet')
    out, err = capsys.readouterr()
    result = RobustnessResult(**json.loads(out.splitlines()[-1]))
    assert result.attack == 'autoattack' and result.attack_version == 'standard' and err == ''
    assert list(result.per_attack) == ['apgd-ce', 'apgd-t', 'fab-t', 'square']


def test_a_record_can_be_repeated_and_compared(checkpoint, tmp_path, capsys):
    path = tmp_path / 'r.json'
    on_digits(checkpoint, f'-n 8 --attack pgd --eps 0.2 --seed 3 --results-file {path}')
    main([str(checkpoint), '--repeat', str(path), '--quiet'])
    record = json.loads(path.read_text())
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    keys = ('n', 'eps_text', 'seed', 'attack', 'clean_acc', 'pgd_acc', 'data_sha256', 'dataset')
    assert all(again[key] == record[key] for key in keys)
    record['pgd_acc'] = 1 - record['pgd_acc'] or 0.5
    path.write_text(json.dumps(record))
    for more, text in (
        (['--seed', '5'], 'seed 3, not 5'),
        (['--attack', 'autoattack'], 'attack pgd, not autoattack'),
        (['--steps', '50'], 'pgd_steps 10, not 50'),
        (['--no-search'], 'search True, not False'),
    ):
        assert main([str(checkpoint), '--repeat', str(path), '--quiet', *more]) == 2
        assert f'--repeat takes the settings of the record, which has {text}' in capsys.readouterr().err
    assert main([str(checkpoint), '--repeat', str(path), '--quiet']) == 1
    assert 'not repeated: pgd_acc is' in capsys.readouterr().err


def test_a_record_of_a_folder_does_not_say_what_the_folder_holds(checkpoint, tmp_path, capsys):
    path = tmp_path / 'r.json'
    on_digits(checkpoint, f'-n 2 --attack none --quiet --results-file {path}')
    path.write_text(json.dumps(json.loads(path.read_text()) | {'dataset': 'pets'}))
    assert main([str(checkpoint), '--repeat', str(path)]) == 2
    assert 'the record is of the folder pets; type what it holds, --dataset KIND' in capsys.readouterr().err
    assert main([str(checkpoint), '--repeat', str(path), '--dataset', 'digits', '--quiet']) == 0


def test_images_that_typed_weights_make_smaller_are_named(tmp_path, capsys):
    model = timm.create_model('resnet18_relu', width=2, num_classes=10)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'w.safetensors')
    np.savez(tmp_path / 'test.npz', image=np.zeros((10, 48, 48, 3), np.uint8), label=np.arange(10))
    words = ['resnet18_relu', '--checkpoint', str(tmp_path / 'w.safetensors'), '--model-kwargs', 'width=2']
    words += ['--num-classes', '10', '--dataset', 'npz', '--data-dir', str(tmp_path), '--attack', 'none']
    assert main(words) == 0
    assert (
        'images of 48 pixels are resized to 32, the size of resnet18_relu; --img-size 48: not'
        in capsys.readouterr().err
    )
    assert main([*words, '--img-size', '48']) == 0
    assert 'resized' not in capsys.readouterr().err


def test_a_record_of_one_step_can_be_repeated_and_says_what_was_not_looked_for(checkpoint, tmp_path, capsys):
    path = tmp_path / 'r.json'
    on_digits(checkpoint, f'-n 2 --attack pgd --eps 0.2 --steps 1 --no-checks --quiet --results-file {path}')
    assert RobustnessResult.from_json(path).warnings == [NOT_CHECKED]
    assert main([str(checkpoint), '--repeat', str(path), '--quiet']) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['warnings'] == [NOT_CHECKED]


@pytest.mark.slow
def test_two_processes_print_one_record_with_the_verdicts_of_one(checkpoint, tmp_path, capsys):
    flags = '-n 8 --eps 8/255 --attack apgd --batch-size 3 --device cpu --quiet --flags-file'
    on_digits(checkpoint, f'{flags} {tmp_path}/one.npz')
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    command = ['-m', 'timm_robust.evaluate', checkpoint, '--dataset', 'digits', *flags.split(), tmp_path / 'two.npz']
    done = warm.run_pair(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"model"') == 1
    shared = json.loads(done.stdout.splitlines()[-1])
    assert (alone['processes'], shared['processes']) == (1, 2)
    assert shared['per_attack'] == alone['per_attack'] and shared['clean_acc'] > shared['apgd_acc']
    flags = [np.load(tmp_path / f'{name}.npz') for name in ('one', 'two')]
    assert all((flags[0][key] == flags[1][key]).all() for key in flags[0].files)


def measuring(checkpoint, *more):
    return [str(checkpoint), '--dataset', 'digits', '-n', '2', '--attack', 'none', *map(str, more)]


def no_measurement(monkeypatch):
    monkeypatch.setattr('timm_robust.evaluate.evaluate', lambda *a, **k: pytest.fail('measured before it looked'))


@pytest.mark.parametrize('option', ['--results-file', '--flags-file'])
def test_a_file_of_another_kind_is_never_replaced(checkpoint, tmp_path, option, monkeypatch, capsys):
    no_measurement(monkeypatch)
    record, flags = tmp_path / 'r.json', tmp_path / 'f.npz'
    record.write_text('{"model": "m", "weights": {}, "training": {}, "measurements": []}')  # of a release
    np.savez(flags, image=np.zeros(3), label=np.zeros(3))
    kept = {path: path.read_bytes() for path in (checkpoint, record, flags)}
    for path in (*kept, '/dev/null', checkpoint.parent):
        assert main(measuring(checkpoint, option, path)) == 2
        assert re.search(f'error: .*{path}.*name (another|a) file', capsys.readouterr().err)
    assert kept == {path: path.read_bytes() for path in kept}


def test_a_record_does_not_replace_flags_nor_flags_a_record(checkpoint, tmp_path, monkeypatch, capsys):
    files = ['--results-file', tmp_path / 'a', '--flags-file', tmp_path / 'b']
    for _ in range(2):  # each replaces its own
        main(measuring(checkpoint, *files))
    no_measurement(monkeypatch)
    for wrong in (['--results-file', tmp_path / 'b'], ['--flags-file', tmp_path / 'a']):
        assert main(measuring(checkpoint, *wrong)) == 2
        assert 'is something else, and stays' in capsys.readouterr().err
    assert main(measuring(checkpoint, '--results-file', tmp_path / 'c', '--flags-file', tmp_path / 'x/../c')) == 2
    assert 'name two files' in capsys.readouterr().err


@pytest.mark.parametrize('option', ['--results-file', '--flags-file', '--state-dir'])
def test_what_cannot_be_written_is_said_before_the_attack(checkpoint, tmp_path, option, monkeypatch, capsys):
    no_measurement(monkeypatch)
    assert main(measuring(checkpoint, option, '/proc/self/new')) == 2  # refuses root too
    assert re.search('error: .*/proc/self/new', capsys.readouterr().err)


def test_a_disk_that_fills_up_meanwhile_costs_the_files_and_not_the_record(checkpoint, tmp_path, monkeypatch, capsys):
    def refuse(path, is_older=None):
        if not calls.append(path) and len(calls) > 2:  # the first look at each is before the attack
            raise OSError(f'no space for {path}')

    calls = []
    monkeypatch.setattr('timm_robust.evaluate.check_output', refuse)
    files = [tmp_path / 'r.json', tmp_path / 'f.npz']
    assert main(measuring(checkpoint, '--results-file', files[0], '--flags-file', files[1])) == 2
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])['n'] == 2
    assert all(f'no space for {path}' in err.splitlines()[-1] for path in files)


@pytest.mark.slow
def test_a_log_and_an_output_on_a_full_disk_end_no_measurement(checkpoint, tmp_path, monkeypatch):
    with open('/dev/full', 'w') as full, monkeypatch.context() as patch:
        patch.setattr(sys, 'stderr', full)
        main(measuring(checkpoint, '--results-file', tmp_path / 'r.json'))
    assert RobustnessResult.from_json(tmp_path / 'r.json').n == 2
    command = ['-m', 'timm_robust.evaluate', *measuring(checkpoint, '--results-file', tmp_path / 's')]
    with open('/dev/full', 'w') as full:
        done = warm.run(command, stdout=full)
    assert done.returncode == 2 and 'error: cannot print the record: No space left' in done.stderr
    assert 'Exception ignored' not in done.stderr and RobustnessResult.from_json(tmp_path / 's').n == 2


def test_the_classes_of_training_are_those_of_the_checkpoint(tmp_path, capsys):
    model = timm.create_model('test_resnet', num_classes=3)
    state = {'arch': 'test_resnet', 'num_classes': 3, 'state_dict': model.state_dict()}
    torch.save(state, tmp_path / 'old.pth.tar')
    torch.save(state | {'classes': ['ant', 'bee', 'cat']}, tmp_path / 'new.pth.tar')
    for name in ('bee', 'cat'):
        (tmp_path / 'images/test' / name).mkdir(parents=True)
        for number in range(2):
            Image.new('RGB', (40, 40)).save(tmp_path / f'images/test/{name}/{number}.png')
    where = ['--dataset', 'folder', '--data-dir', str(tmp_path / 'images'), '--attack', 'none', '--quiet']
    flags = ['--img-size', '32', '--flags-file', str(tmp_path / 'f.npz')]
    main([str(tmp_path / 'new.pth.tar'), *where, *flags])
    assert np.load(tmp_path / 'f.npz')['y'].tolist() == [1, 1, 2, 2]
    (tmp_path / 'images/test/bee').rename(tmp_path / 'images/test/dog')
    for name, message in (
        ('new', 'has classes that training did not have: dog; those of training are ant, bee, cat'),
        ('old', 'the model has 3 outputs, images has 2 classes'),  # it does not say which
    ):
        assert main([str(tmp_path / f'{name}.pth.tar'), *where, *flags]) == 2
        assert message in capsys.readouterr().err


def test_without_n_a_small_split_is_measured_whole(checkpoint, capsys):
    on_digits(checkpoint, '--attack none --quiet')
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['n'] == 360


def test_random_weights_are_said_so(capsys):
    on_digits('test_resnet', '-n 2 --attack none --model-kwargs num_classes=10')
    assert 'test_resnet has random weights' in capsys.readouterr().err


def test_it_runs_as_a_module():
    command = [sys.executable, '-W', 'error::RuntimeWarning', '-m', 'timm_robust.evaluate', '--help']
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert '--results-file' in done.stdout and '8/255' in done.stdout


def test_distances_are_those_of_images_that_an_attack_broke():
    x = torch.zeros(2, 3, 4, 4)
    tensors = {'clean_correct': torch.tensor([False, True]), 'robust': torch.tensor([False, False])}
    tensors['x_adv'] = torch.stack([x[0], x[1] + 0.1])  # the first was wrong before
    assert module._distances(x, tensors, ThreatModel('Linf', 0.2))['mean_distance'] == pytest.approx(0.1)
