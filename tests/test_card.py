import json
import shutil

import numpy as np
import pytest
import yaml
from records import complete

from timm_robust.files import sha256
from timm_robust.release.card import model_card
from timm_robust.release.results_page import paired_difference, results_page, sign_test
from timm_robust.weights.releases import RELEASES, STAGED, releases_of


def test_a_paired_difference_and_its_interval():
    a, b = np.array([True] * 60 + [False] * 40), np.array([True] * 50 + [False] * 50)
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(0.10)
    error = np.sqrt(0.1 * 0.9 / 100)  # only 10 images differ, each by one
    assert low == pytest.approx(0.1 - 1.96 * error, abs=0.015) and high == pytest.approx(0.1 + 1.96 * error, abs=0.015)
    assert paired_difference(a, a) == (0, 0, 0)
    assert paired_difference(b, a)[0] == pytest.approx(-0.10)


def test_signs_are_tested_exactly():
    a = np.arange(200) < 50
    assert sign_test(a, a) == 1 and sign_test(np.arange(200) < 54, a) == sign_test(a, np.arange(200) < 54) == 0.125
    assert sign_test(a, np.arange(200) < 44) == 2 / 2**6


def test_pairing_is_narrower_than_two_samples():
    rng = np.random.default_rng(0)
    a = rng.random(500) < 0.5
    b = a.copy()
    b[:10] ^= True
    _, low, high = paired_difference(a, b)
    assert high - low < 0.03  # unpaired: 2 * 1.96 * sqrt(2 * 0.25 / 500) = 0.12


def test_verdicts_on_other_images_cannot_be_paired():
    with pytest.raises(ValueError, match='on 3 and 4 images cannot be paired'):
        paired_difference(np.ones(3, bool), np.ones(4, bool))


def record(root, name, robust, **activation):
    folder = root / name
    (folder / 'flags').mkdir(parents=True)
    np.savez(folder / 'flags/autoattack_200.npz', robust=robust)
    result = {
        'attack': 'autoattack',
        'norm': 'Linf',
        'eps_text': '8/255',
        'n': len(robust),
        'clean_acc': 0.8,
        'autoattack_acc': float(robust.mean()),
    }
    origins = [{'hardware': 'abacus', 'versions': {'torch': '9'}, 'commit': 'abc'}]
    training = {'epochs': 3, 'seconds': 7200.0, 'images_per_s': 99.5, 'activation': activation, 'origins': origins}
    measurements = [{'key': 'autoattack_200', 'note': None, 'result': result}]
    content = {'model': name, 'training': training | {'notes': ['Handicapped.']}, 'measurements': measurements}
    (folder / 'results.json').write_text(json.dumps(complete(content)))


def test_results_answer_the_question_as_far_as_the_flags_go(tmp_path):
    order = np.arange(200)
    record(tmp_path, 'net_pssilu.at_data_linf', order < 100, alpha=1.25, beta=1e-4, max_curvature=0.6)
    record(tmp_path, 'net_relu.at_data_linf', order < 60)
    path = tmp_path / 'net_relu.at_data_linf/results.json'
    content = json.loads(path.read_text())
    content['training']['origins'] += [{'hardware': 'two abaci'}, {'hardware': 'abacus'}]
    path.write_text(json.dumps(content))
    record(tmp_path, 'net_silu.at_data_linf', (order + 2) % 200 < 100)
    record(tmp_path, 'net_gelu.at_data_linf', order < 96)  # of so few images a bootstrap is too sure
    record(tmp_path, 'net_silu.trades_data_linf', order < 60)  # another recipe: not compared
    page = results_page(tmp_path)
    lines = {line.split(' | ')[1]: line for line in page.splitlines() if line.startswith('| at_data_linf')}
    assert set(lines) == {'net_relu', 'net_silu', 'net_gelu'}
    assert '| 50.00 | 30.00 | +20.00 (' in lines['net_relu'] and lines['net_relu'].endswith(': higher |')
    assert '+0.00 (' in lines['net_silu'] and 'no difference shown' in lines['net_silu']
    assert '+2.00 (+0.50 to ' in lines['net_gelu'] and 'no difference shown' in lines['net_gelu']
    row = next(line for line in page.splitlines() if line.startswith('| [net_pssilu.at'))
    assert '50.00 ± 3.54 (n 200)' in row and '2.0 hours, abacus' in row and '| 1.25 | 0.0001 |' in row
    assert page.count('Handicapped.') == 1
    assert '3 epochs, 2.0 hours, abacus and two abaci |' in page  # every piece of a training that was resumed


@pytest.mark.parametrize('name', RELEASES)
def test_what_is_released_is_staged_described_and_has_its_recipe(name):
    folder = STAGED / name
    assert (folder / 'README.md').read_text() == model_card(folder)  # generated, never edited
    assert sha256(folder / 'model.safetensors') == RELEASES[name].sha256
    assert (STAGED.parent / 'train/recipes' / f'{name}.yaml').is_file()


def test_a_card_tells_of_extra_data_changes_on_the_way_and_the_papers(tmp_path):
    folder = tmp_path / 'wrn28_10_psilu.trades_edm1m_cifar10_linf'
    shutil.copytree(STAGED / 'resnet18_pssilu.fgsm_cifar10_linf', folder)
    text = (folder / 'results.json').read_text()
    content = json.loads(text.replace('resnet18_pssilu.fgsm_cifar10_linf', folder.name))
    content['training']['changes'] = [{'step': 1200, 'epoch': 3, 'changes': {'eps': [0.03, '8/255'], 'seed': [42, 7]}}]
    (folder / 'results.json').write_text(json.dumps(content))
    hyper = yaml.safe_load((folder / 'train_hparams.yaml').read_text())
    hyper |= {'loss': 'trades', 'extra_data': '1m.npz', 'extra_fraction': 0.7}
    (folder / 'train_hparams.yaml').write_text(yaml.safe_dump(hyper))
    card = model_card(folder)
    assert '- 70% of each batch is extra data: 1 million images of a diffusion model (EDM).' in card
    assert '- From step 1,200 on: eps 8/255 instead of 0.03, seed 7 instead of 42.' in card
    papers = card.partition('## Papers')[2]
    for number in ('2110.05626', '1901.08573', '2302.04638', '2206.00364', '2003.01690'):
        assert f'https://arxiv.org/abs/{number}' in papers and f'arxiv:{number}' in card, number
    assert '- P2333/DM-Improves-AT' in card.split('---')[1]


OURS = 'resnet18_pssilu.fgsm_cifar10_linf'


@pytest.mark.parametrize(
    ('hyper', 'start', 'license_id', 'licences', 'base'),
    [
        ({}, None, 'apache-2.0', ['license: apache-2.0', 'Licence: Apache-2.0.'], None),
        (
            {'pretrained': True},
            'resnet50.a1_in1k',
            'cc-by-nc-4.0',
            ['license: cc-by-nc-4.0', 'Licence: cc-by-nc-4.0.'],
            'timm/resnet50.a1_in1k',
        ),
        ({'initial_checkpoint': OURS}, OURS, 'apache-2.0', ['license: apache-2.0'], f'timm-robust/{OURS}'),
        (
            {'initial_checkpoint': 'theirs.pth', 'pretrained': True},
            'theirs.pth',
            'house-rules',
            ['license: other', 'license_name: house-rules', 'Licence: house-rules.'],
            None,
        ),
    ],
)
def test_a_card_names_the_licence_and_the_weights_that_training_began_from(
    tmp_path, hyper, start, license_id, licences, base
):
    folder = tmp_path / OURS
    shutil.copytree(STAGED / OURS, folder)
    settings = yaml.safe_load((folder / 'train_hparams.yaml').read_text())
    (folder / 'train_hparams.yaml').write_text(yaml.safe_dump(settings | hyper))
    results, config = (json.loads((folder / name).read_text()) for name in ('results.json', 'config.json'))
    results['training']['start'], config['pretrained_cfg']['license'] = start, license_id
    for name, content in (('results.json', results), ('config.json', config)):
        (folder / name).write_text(json.dumps(content))
    card = model_card(folder)
    assert all(text in card for text in licences)
    assert (f'base_model: {base}\n' in card) if base else 'base_model' not in card
    assert (f'It began from the weights `{start}`.' in card) if start else 'It began from' not in card


def test_a_card_claims_no_other_data_set_than_was_measured(tmp_path):
    folder = tmp_path / 'resnet18_pssilu.fgsm_cifar10_linf'
    shutil.copytree(STAGED / folder.name, folder)
    settings = yaml.safe_load((folder / 'train_hparams.yaml').read_text())
    (folder / 'train_hparams.yaml').write_text(yaml.safe_dump(settings | {'dataset': 'digits'}))
    results = (folder / 'results.json').read_text()
    (folder / 'results.json').write_text(results.replace('"dataset": "cifar10"', '"dataset": "digits"'))
    head = model_card(folder).split('---')[1]
    assert 'uoft-cs/cifar10' not in head and 'type: digits' in head


NEVER = '; the test set was never looked at.'


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        ({}, f'the best by PGD accuracy on 1000 images held out of the training set{NEVER}'),
        (
            {'val_size': 0.2},
            f'the best by PGD accuracy on 20% of the training images, held out of the training set{NEVER}',
        ),
        ({'val_size': 0}, f'the last, for nothing was held out{NEVER}'),
        ({'val_split': 'validation'}, f'the best by PGD accuracy on the images of the split validation{NEVER}'),
        ({'val_split': 'test'}, 'the best by PGD accuracy on the images of the split test.'),
        (
            {'train_split': 'test', 'val_size': 0},
            'the last, for nothing was held out; it was trained on the split test.',
        ),
        ({'loss': 'clean'}, f'the best by clean accuracy on 1000 images held out of the training set{NEVER}'),
    ],
)
def test_a_card_says_how_the_epoch_was_chosen_and_whether_there_was_an_attack(tmp_path, settings, said):
    folder = tmp_path / 'resnet18_pssilu.fgsm_cifar10_linf'
    shutil.copytree(STAGED / folder.name, folder)
    hyper = yaml.safe_load((folder / 'train_hparams.yaml').read_text())
    (folder / 'train_hparams.yaml').write_text(yaml.safe_dump(hyper | {'val_size': 1000} | settings))
    card = model_card(folder)
    assert f'), {said}\n' in card
    assert ('chose the epoch: what is measured on them is too good' in card) == (settings.get('val_split') == 'test')
    clean = settings.get('loss') == 'clean'
    assert ('trained on cifar10 without attacks.' in card and 'clean loss; no attack; ' in card) == clean
    assert ('trained adversarially on cifar10' in card and 'attack n_fgsm, Linf 8/255' in card) != clean


def test_what_is_staged_is_released():
    assert {path.parent.name for path in STAGED.glob('*/results.json')} == set(RELEASES)


def test_the_page_of_results_is_generated():
    assert (STAGED / 'RESULTS.md').read_text() == results_page(STAGED, STAGED.parent / 'train/recipes')


@pytest.mark.parametrize('arch', sorted({release.arch for release in RELEASES.values()}))
def test_the_default_tag_is_the_most_robust(arch):
    import timm

    releases = releases_of(arch)
    linf = [release.autoattack_acc or 0 for release in releases if release.norm == 'Linf']
    assert linf == sorted(linf, reverse=True)
    assert timm.get_pretrained_cfg(arch).tag == releases[0].tag
    assert set(timm.list_pretrained(f'{arch}.*')) == {release.name for release in releases}
