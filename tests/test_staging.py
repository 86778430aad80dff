import dataclasses
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
import warm
import yaml
from safetensors import safe_open
from safetensors.torch import load, save
from tiny_runs import draw_pictures

import timm_robust.models.pretrained as resolver
from timm_robust.data import load_dataset
from timm_robust.files import sha256
from timm_robust.models.load import load_model, read_hyper_parameters, trained_classes, trained_for
from timm_robust.plots import read_run
from timm_robust.release import staging
from timm_robust.release.card import model_card
from timm_robust.release.folder import check, files_of
from timm_robust.release.model_files import canonical, stored
from timm_robust.release.record import read_results, results_of, strongest
from timm_robust.release.results_page import README_END, README_START, results_page
from timm_robust.release.staging import measure, render, stage
from timm_robust.staging import main
from timm_robust.threat_model import ThreatModel
from timm_robust.training.builder import build
from timm_robust.training.flags import parse_recipe
from timm_robust.training.loop import fit
from timm_robust.training.recipe import Recipe
from timm_robust.weights.download import read_release
from timm_robust.weights.releases import RELEASES, STAGED, is_ours, read_table

NAME = 'resnet18_pssilu.fgsm_digits_linf'
SMALL = Recipe(
    model='resnet18_pssilu',
    dataset='digits',
    val_size=20,
    eps=0.1,
    attack='fgsm',
    eval_steps=1,
    epochs=1,
    max_steps=1,
    batch_size=16,
    experiment='run',
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    fit(build(dataclasses.replace(SMALL, output=str(folder))))
    return folder / 'run'


@pytest.fixture(scope='module')
def staged(run, tmp_path_factory):
    """A staged and measured model: its folder of cards, and the table of releases."""
    root = tmp_path_factory.mktemp('staged')
    (root / 'releases.json').write_text('{}')
    stage(run, NAME, cards=root / 'model_cards', notes=['Trained on scanned digits.'])
    digits = load_dataset('digits', None, 'test')
    for attack, n, note in (('none', 40, 'These are digits.'), ('pgd', 10, None)):
        measure(root / 'model_cards' / NAME, digits, note, attack=attack, n=n, split='test')
    render(root / 'model_cards', root / 'releases.json')
    return root


@pytest.fixture
def copy(staged, tmp_path):
    shutil.copytree(staged, tmp_path / 'copy')
    return tmp_path / 'copy'


def test_a_staged_folder_holds_what_the_hub_and_the_reader_need(staged, run):
    folder = staged / 'model_cards' / NAME
    names = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
    assert names == {
        *('model.safetensors', 'config.json', 'README.md', 'train_hparams.yaml', 'results.json', 'summary.csv'),
        *('LICENSE', 'SHA256SUMS', 'training.png', 'adversarial.png', 'flags/none_40.npz', 'flags/pgd_10.npz'),
    }
    assert subprocess.run(['sha256sum', '--check', '--strict', 'SHA256SUMS'], cwd=folder).returncode == 0
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'resnet18_pssilu' and config['pretrained_cfg']['tag'] == 'fgsm_digits_linf'
    assert config['pretrained_cfg']['mean'] == [0, 0, 0] and config['pretrained_cfg']['std'] == [1, 1, 1]
    model, hyper = load_model(folder), read_hyper_parameters(folder)
    assert config['label_names'] == list(trained_classes(model)) == [str(i) for i in range(10)]
    assert trained_for(model) == ThreatModel(hyper['norm'], hyper['eps'])
    assert config['robustness']['attack'] == 'pgd' and config['robustness']['n'] == 10
    everything = ''.join(p.read_text() for p in folder.rglob('*') if p.suffix in ('.json', '.yaml', '.md', '.csv'))
    assert str(run.parent) not in everything and str(staged) not in everything
    assert read_run(folder) == read_run(run)


def test_a_checkout_that_is_not_installed_has_its_licence(monkeypatch):
    def absent(name):
        raise staging.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(staging.metadata, 'files', absent)
    assert 'Apache License' in staging._license()
    monkeypatch.setattr(staging, 'CHECKOUT', None)
    with pytest.raises(FileNotFoundError, match='LICENSE of timm-robust is missing'):
        staging._license()


def test_weights_are_those_of_the_best_checkpoint_in_fp16(staged, run):
    path = staged / 'model_cards' / NAME / 'model.safetensors'
    best = load_model(run / 'model_best.pth.tar').state_dict()
    weights = load(path.read_bytes())
    assert weights.keys() == best.keys()
    for name, value in weights.items():
        matrix = best[name].ndim > 1
        assert value.dtype == (torch.float16 if matrix else best[name].dtype)
        assert torch.equal(value, best[name].half() if matrix else best[name])
    with safe_open(path, 'pt') as file:
        assert file.metadata()['model'] == NAME and file.metadata()['format'] == 'pt'
    model = load_model(path.parent)
    assert all(torch.equal(value.float(), model.state_dict()[name].float()) for name, value in weights.items())


def test_equal_weights_give_equal_files():
    tensors = {'b': torch.arange(6.0).view(2, 3), 'a': torch.zeros(1, dtype=torch.int64)}
    files = {canonical(save(tensors, {str(i): 'x' for i in order})) for order in ((1, 2, 3, 4), (4, 2, 1, 3)) * 4}
    assert len(files) == 1
    again = load(files.pop())
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_weights_too_large_for_fp16_are_refused():
    with pytest.raises(ValueError, match=r'w has values up to 1e\+05, too large for fp16'):
        stored({'w': torch.tensor([[1e5]])})


def test_the_card_is_generated_and_says_what_was_measured(staged):
    folder = staged / 'model_cards' / NAME
    card = model_card(folder)
    assert (folder / 'README.md').read_text() == card
    result = strongest(results_of(read_results(folder)))
    assert f'PGD-10 accuracy at {result.eps_text} {100 * result.pgd_acc:.2f} ± ' in card
    assert 'Trained on scanned digits.' in card and '| first 40* |' in card and '\n\\* These are digits.' in card
    # no release of this project's: its page alone knows it
    assert card.index('import timm_robust') < card.index(f"timm.create_model('hf-hub:USER/{NAME}', pretrained=True)")
    assert f'\ntimm-robust evaluate hf-hub:USER/{NAME} --data-dir' in card and 'train/recipes' not in card
    assert read_results(folder)['weights']['sha256'] in card
    assert read_results(folder)['training']['origins'][0]['hardware'] in card
    command = next(line for line in card.splitlines() if line.startswith('timm-robust train '))
    _, _, *argv = [word.replace('train_hparams.yaml', str(folder / 'train_hparams.yaml')) for word in command.split()]
    again = parse_recipe(argv)
    hyper = read_hyper_parameters(folder)
    assert {key: getattr(again, key) for key in hyper} == hyper


def test_the_metadata_of_the_card_goes_through_the_hubs_reader(staged):
    from huggingface_hub import ModelCard

    data = ModelCard.load(staged / 'model_cards' / NAME / 'README.md').data
    assert data.library_name == 'timm' and data.license == 'apache-2.0' and 'arxiv:2110.05626' in data.tags
    values = {result.metric_name: (result.metric_value, result.metric_args) for result in data.eval_results}
    record = {item['key']: item['result'] for item in read_results(staged / 'model_cards' / NAME)['measurements']}
    assert len(values) == 1, 'what was measured on images with a note is no number of that data set'
    robust, args = values['PGD-10 accuracy, first 10 images']
    assert robust == round(100 * record['pgd_10'].pgd_acc, 2)
    assert args == {'n': 10, 'attack': 'pgd', 'norm': 'Linf', 'eps': record['pgd_10'].eps_text}


def test_staging_again_keeps_equal_weights_measurements_and_refuses_others(copy, run, tmp_path):
    cards = copy / 'model_cards'
    before = read_results(cards / NAME)
    stage(run, NAME, cards=cards)
    assert read_results(cards / NAME) == before and (cards / NAME / 'flags/pgd_10.npz').is_file()
    fit(build(dataclasses.replace(SMALL, output=str(tmp_path), seed=1)))
    weights = (cards / NAME / 'model.safetensors').read_bytes()
    with pytest.raises(ValueError, match='holds other weights; type --overwrite'):
        stage(tmp_path / 'run', NAME, cards=cards)
    assert (cards / NAME / 'model.safetensors').read_bytes() == weights
    stage(tmp_path / 'run', NAME, cards=cards, overwrite=True)
    assert (cards / NAME / 'model.safetensors').read_bytes() != weights
    assert not read_results(cards / NAME)['measurements']


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('resnet18_relu.fgsm_digits_linf', 'names another model or norm'),
        ('resnet18_pssilu.fgsm_digits_l2', 'names another model or norm'),
        (
            'resnet18_pssilu.fgsm_cifar10_linf',
            'trained on digits, .* names cifar10; call it resnet18_pssilu.METHOD_',
        ),
        ('resnet18_pssilu', 'is no release; it must be <arch>'),
        ('../resnet18_pssilu.fgsm_digits_linf', 'is no release'),
    ],
)
def test_a_name_that_does_not_fit_writes_nothing(run, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        stage(run, name, cards=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_changed_network_is_no_release_of_ours_and_others_say_how_it_was_changed(tmp_path, monkeypatch):
    kwargs = {'width': 4, 'in_chans': 1}
    fit(build(dataclasses.replace(SMALL, output=str(tmp_path), model_kwargs=kwargs)))
    monkeypatch.setattr(staging, 'is_ours', lambda name: True)
    with pytest.raises(ValueError, match=r"changed resnet18_pssilu by \{'width': 4, 'in_chans': 1\}"):
        stage(tmp_path / 'run', NAME, cards=tmp_path / 'cards')
    monkeypatch.undo()
    folder = stage(tmp_path / 'run', NAME, cards=tmp_path / 'cards')
    x, expected = torch.rand(2, 1, 8, 8), load_model(tmp_path / 'run')
    for model in (load_model(folder), timm.create_model(f'local-dir:{folder}', pretrained=True).eval()):
        assert model.conv1.weight.shape == (4, 1, 3, 3)
        torch.testing.assert_close(model(x), expected(x), atol=2e-3, rtol=1e-2)  # fp16
    assert 'needs timm 1.0.31' in model_card(folder)
    swapped = {'model': 'test_resnet', 'act': 'silu', 'img_size': 32}
    fit(build(dataclasses.replace(SMALL, output=str(tmp_path / 'other'), **swapped)))
    with pytest.raises(ValueError, match=r"changed test_resnet by \{'act': 'silu'\}"):
        stage(tmp_path / 'other/run', 'test_resnet.fgsm_digits_linf', cards=tmp_path / 'cards')


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        ({}, 'apache-2.0'),
        ({'model': 'resnet50', 'pretrained': True}, 'apache-2.0'),
        ({'model': 'convnextv2_atto', 'pretrained': True}, 'cc-by-nc-4.0'),
        ({'pretrained': True}, 'apache-2.0'),
        ({'initial_checkpoint': 'resnet18_pssilu.fgsm_cifar10_linf'}, 'apache-2.0'),
        ({'initial_checkpoint': 'somewhere/theirs.pth'}, None),
    ],
)
def test_weights_have_the_licence_of_those_that_training_began_from(tmp_path, settings, expected):
    recipe = dataclasses.replace(SMALL, **settings)
    if expected:
        assert staging._license_of_start(tmp_path, recipe) == expected
        if recipe.model == 'resnet50':
            assert staging._start_of(recipe) == 'resnet50.a1_in1k'
        return
    with pytest.raises(ValueError, match=r'began from theirs\.pth, whose licence is not .* --license apache-2\.0'):
        staging._license_of_start(tmp_path, recipe)


def test_a_licence_of_others_is_named_and_their_text_is_not_ours(run, tmp_path):
    folder = stage(run, NAME, cards=tmp_path, license_id='cc-by-nc-4.0')
    config = json.loads((folder / 'config.json').read_text())
    assert config['pretrained_cfg']['license'] == 'cc-by-nc-4.0' and not (folder / 'LICENSE').exists()
    assert 'Licence: cc-by-nc-4.0.' in model_card(folder)
    again = stage(run, NAME, cards=tmp_path, notes=['Said later.'])
    assert 'Licence: cc-by-nc-4.0.' in model_card(again) and not (again / 'LICENSE').exists()


def test_a_folder_with_the_name_of_a_release_is_one_by_its_weights_alone(tmp_path):
    ours = STAGED / 'resnet18_pssilu.fgsm_cifar10_linf'
    start = dataclasses.replace(SMALL, initial_checkpoint=str(ours))
    assert staging._license_of_start(tmp_path, start) == 'apache-2.0'
    theirs = tmp_path / ours.name
    theirs.mkdir()
    (theirs / 'model.safetensors').write_bytes(b'theirs')
    (tmp_path / 'w.yaml').touch()
    for path in (theirs, tmp_path / 'w'):
        with pytest.raises(ValueError, match='whose licence is not known'):
            staging._license_of_start(tmp_path, dataclasses.replace(SMALL, initial_checkpoint=str(path)))


def test_check_finds_what_changed(copy):
    folder = copy / 'model_cards' / NAME
    check(folder)
    (folder / 'extra').write_text('')
    with pytest.raises(ValueError, match='extra is no part of a release; take it away'):
        check(folder)
    (folder / 'extra').unlink()
    (folder / 'training.png').rename(folder.parent / 'kept.png')
    (folder / 'training.png').symlink_to(folder.parent / 'kept.png')
    with pytest.raises(ValueError, match=r'training\.png is a symbolic link; put the file itself there'):
        check(folder)
    (folder.parent / 'kept.png').replace(folder / 'training.png')
    text = (folder / 'summary.csv').read_text()
    (folder / 'summary.csv').write_text(text + '\n')
    with pytest.raises(ValueError, match=r'summary\.csv is not the file of SHA256SUMS'):
        check(folder)
    (folder / 'summary.csv').unlink()
    with pytest.raises(ValueError, match=r'summary\.csv is missing'):
        check(folder)


def test_the_table_follows_the_weights(copy):
    cards, table = copy / 'model_cards', copy / 'releases.json'
    release = read_table(table)[NAME]
    weights = cards / NAME / 'model.safetensors'
    assert (release.sha256, release.size) == (sha256(weights), weights.stat().st_size)
    assert release.commit is None and release.repo == f'timm-robust/{NAME}' and release.norm == 'Linf'
    entry = json.loads(table.read_text())
    entry[NAME]['commit'] = 'a' * 40
    table.write_text(json.dumps(entry))
    render(cards, table)
    assert read_table(table)[NAME].commit == 'a' * 40
    entry[NAME]['sha256'] = 'b' * 64
    table.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=f'the table of releases has other weights of {NAME}, SHA-256 bbb'):
        render(cards, table)
    (cards / NAME / 'SHA256SUMS').unlink()  # as staging others does
    render(cards, table)
    assert read_table(table)[NAME].commit is None  # the commit held other weights


def test_what_contradicts_the_record_is_not_rendered(copy):
    cards, table = copy / 'model_cards', copy / 'releases.json'
    folder, flags = cards / NAME, cards / NAME / 'flags/pgd_10.npz'
    kept = {path: path.read_bytes() for path in (*folder.rglob('*.*'), table, cards / 'RESULTS.md') if path.is_file()}

    def refused(message, **changes):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            render(cards, table)
        with pytest.raises((ValueError, FileNotFoundError)):
            check(folder)
        for path, content in kept.items():
            if path not in changed:
                assert path.read_bytes() == content, path  # nothing was written
            path.write_bytes(content)
        changed.clear()

    def edit(**keys):
        record = json.loads(kept[folder / 'results.json'])
        record['measurements'][1]['result'].update(keys)
        (folder / 'results.json').write_text(json.dumps(record))
        changed.append(folder / 'results.json')

    changed = [folder / 'model.safetensors']
    weights = bytearray(kept[changed[0]])
    weights[-100] ^= 1
    changed[0].write_bytes(weights)
    refused(r'model\.safetensors has SHA-256 .*, results\.json says')
    for keys, message in (
        ({'pgd_acc': 0.9}, 'the record pgd_acc 0.9'),
        ({'clean_acc': 0.9}, 'the record clean_acc 0.9'),
        ({'n': 9}, 'pgd_10 is of pgd on 9'),
        ({'model': 'resnet18_relu.fgsm_digits_linf'}, 'pgd_10 is of pgd on 10 images of resnet18_relu'),
    ):
        edit(**keys)
        refused(message)
    arrays = dict(np.load(flags))
    changed.append(flags)
    np.savez(flags, **(arrays | {'robust': ~arrays['robust']}))
    refused('contradicts itself|images right')
    changed.append(flags)
    flags.unlink()
    refused(r'pgd_10\.npz is missing')
    other = arrays['y'].copy()
    other[:] = 1 - other
    changed.append(flags)
    np.savez(flags, **(arrays | {'y': other, 'y_pred': np.where(arrays['clean_correct'], other, other + 1)}))
    refused(r'pgd_10\.npz is not the file of SHA256SUMS')
    changed.append(folder / 'README.md')
    (folder / 'README.md').write_bytes(kept[folder / 'README.md'].replace(b'digits', b'CIFAR-10'))
    with pytest.raises(ValueError, match=r'README\.md is not the file of SHA256SUMS'):
        check(folder)
    render(cards, table)
    check(folder)


@pytest.mark.parametrize(
    ('file', 'text', 'message'),
    [
        ('results.json', '[]', 'holds a list'),
        ('results.json', '{"model": 3}', 'lacks|model is'),
        ('results.json', '{"model": "m", "weights": {}, "training": {}, "measurements": {}}', 'measurements is'),
        ('results.json', '{"model": "m", "weights": {}, "training": {}, "measurements": []}', 'lacks sha256'),
        ('config.json', '{', 'is not JSON'),
        ('config.json', '[]', 'holds a list'),
        ('config.json', '{"pretrained_cfg": 1}', 'pretrained_cfg is'),
        ('config.json', '{"pretrained_cfg": {"mean": "0"}}', 'mean is'),
        ('train_hparams.yaml', 'norm: Linf', 'lacks model'),
        ('SHA256SUMS', b'\xff', 'SHA256SUMS is damaged'),
    ],
)
def test_damaged_files_of_a_release_are_one_line(copy, capsys, file, text, message):
    path = copy / 'model_cards' / NAME / file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    where = ['--cards', str(copy / 'model_cards'), '--table', str(copy / 'releases.json'), '--recipes', str(copy)]
    assert main(['render', *where]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: {path}') and re.search(message, line)


@pytest.mark.parametrize('fault', ['lost', 'damaged', 'of no record', 'of another record'])
def test_verdicts_that_a_kill_or_a_disk_spoiled_are_measured_again(copy, fault):
    cards, table = copy / 'model_cards', copy / 'releases.json'
    flags, results = cards / NAME / 'flags/none_40.npz', cards / NAME / 'results.json'
    whole, before = flags.read_bytes(), results_of(read_results(cards / NAME))
    if fault == 'lost':
        flags.unlink()
    elif fault == 'damaged':
        flags.write_bytes(whole[:-100])
    elif fault == 'of no record':  # killed after the verdicts were written, and before the record was
        record = json.loads(results.read_text())
        record['measurements'] = [item for item in record['measurements'] if item['key'] != 'none_40']
        results.write_text(json.dumps(record))
    else:
        arrays = dict(np.load(flags))
        np.savez(flags, **{**arrays, 'clean_correct': ~arrays['clean_correct']})
    with pytest.raises((ValueError, FileNotFoundError), match='none_40'):
        render(cards, table)
    where = ['--cards', str(cards), '--table', str(table), '--recipes', str(copy), '--dataset', 'digits', '--data-dir']
    assert main(['measure', NAME, *where, '', '--attack', 'none', '-n', '40']) == 0
    check(cards / NAME)
    after = results_of(read_results(cards / NAME))
    assert [(result.attack, result.clean_acc) for result in after] == [(r.attack, r.clean_acc) for r in before]


def test_the_table_of_a_readme_without_its_end_takes_nothing_away(copy):
    readme = copy / 'README.md'
    readme.write_text(f'before\n{README_START}\nafter\n')
    with pytest.raises(ValueError, match=r'README\.md has <!-- weights.*, but <!-- end of weights --> is missing'):
        render(copy / 'model_cards', copy / 'releases.json')
    assert readme.read_text().endswith('after\n')


def test_what_somebody_stages_is_neither_registered_nor_listed_with_ours(copy):
    assert is_ours('resnet18_pssilu.fgsm_cifar10_linf') and not is_ours(NAME) and NAME not in RELEASES
    readme = copy / 'README.md'
    readme.write_text(f'before\n{README_START}\n{README_END}\nafter\n')
    render(copy / 'model_cards', copy / 'releases.json')
    assert NAME in read_table(copy / 'releases.json') and NAME not in readme.read_text()


def test_releases_without_a_folder_here_stay_in_the_table(copy):
    table = copy / 'releases.json'
    entries = json.loads(table.read_text())
    table.write_text(json.dumps(entries | {'wrn28_10_pssilu.at_cifar10_linf': entries[NAME]}))
    render(copy / 'model_cards', table)
    assert set(read_table(table)) == {NAME, 'wrn28_10_pssilu.at_cifar10_linf'}


@pytest.fixture
def released(copy, monkeypatch):
    """The staged model, released: in the table that the registry asks."""
    table = read_table(copy / 'releases.json')
    monkeypatch.setattr(resolver, 'read_release', partial(read_release, staged=copy / 'model_cards'))
    monkeypatch.setitem(resolver.RELEASES, NAME, table[NAME])
    cfg = timm.models.PretrainedCfg(**resolver._tagged('resnet18_pssilu', {'url': ''})[NAME])
    cfg = dataclasses.replace(
        cfg,
        input_size=(3, 32, 32),
        num_classes=10,
        first_conv='conv1',
        classifier='fc',
        tag=NAME.partition('.')[2],
    )
    registry = sys.modules['timm.models._registry']
    monkeypatch.setitem(registry._model_pretrained_cfgs, NAME, cfg)
    monkeypatch.setitem(registry._model_pretrained_cfgs, 'resnet18_pssilu', cfg)
    return copy / 'model_cards' / NAME


def test_pretrained_takes_the_staged_file(released):
    expected = load_model(released)
    x = torch.rand(2, 3, 32, 32)
    for name in (NAME, 'resnet18_pssilu'):
        model = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(model(x), expected(x))
    adapted = timm.create_model(NAME, pretrained=True, num_classes=7, in_chans=1).eval()
    assert adapted(x[:, :1]).shape == (2, 7)
    assert torch.equal(adapted.stages[1][0].conv1.weight, expected.stages[1][0].conv1.weight)


def test_a_flipped_bit_is_refused(released):
    path = released / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'has SHA-256 .*, the released .*; fetch it again'):
        timm.create_model(NAME, pretrained=True)
    path.write_bytes(b'version https://git-lfs.github.com/spec/v1')
    with pytest.raises(ValueError, match='a Git LFS pointer; type: git lfs pull'):
        timm.create_model(NAME, pretrained=True)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r'is not on the Hub yet.*pretrained_cfg_overlay'):
        timm.create_model(NAME, pretrained=True)


def test_a_file_swapped_after_its_check_is_not_loaded(released, monkeypatch, tmp_path):
    expected, read = load_model(released), resolver.read_release

    def swapping(release):
        content = read(release)
        other = {key: value * 0 for key, value in expected.state_dict().items()}
        (released / 'model.safetensors').write_bytes(save(other))
        return content

    monkeypatch.setattr(resolver, 'read_release', swapping)
    model = timm.create_model(NAME, pretrained=True)
    assert torch.equal(model.fc.weight, expected.fc.weight)
    assert 'state_dict' not in model.pretrained_cfg  # the tensors would stay in memory, and in a config.json
    timm.models.save_for_hf(model, tmp_path / 'saved')


def test_a_users_own_weights_win(released, tmp_path):
    weights = {k: v + 1 if k == 'fc.bias' else v for k, v in load_model(released).state_dict().items()}
    (tmp_path / 'own.safetensors').write_bytes(save(weights))
    for overlay in ({'file': str(tmp_path / 'own.safetensors')}, {'state_dict': weights}):
        model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.fc.bias, weights['fc.bias'])
    (released / 'model.safetensors').unlink()
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={'state_dict': weights})
    assert torch.equal(model.fc.bias, weights['fc.bias'])


def test_a_network_without_weights_says_what_there_is():
    with pytest.raises(RuntimeError, match=r'No pretrained weights exist for wrn28_10_elu; .*timm-robust train'):
        timm.create_model('wrn28_10_elu', pretrained=True, device='meta')


def test_weights_of_others_are_named_and_not_listed_until_fetched():
    with pytest.raises(
        FileNotFoundError, match=r"RobustBench's Dai2021Parameterizing .*robustbench fetch Dai2021Param"
    ):
        timm.create_model('wrn28_10_pssilu.dai2021_cifar10_linf', pretrained=True, device='meta')
    assert 'wrn28_10_pssilu.dai2021_cifar10_linf' not in timm.list_pretrained('wrn28*')
    assert (
        '1eO-MNXQSAoCuNFjIbdCheprT4Beqo9Zv' in timm.get_pretrained_cfg('wrn28_10_pssilu.dai2021_cifar10_linf').notes[0]
    )


@pytest.mark.parametrize(('beside', 'split'), [(True, 'validation'), (False, None)])
def test_a_staged_folder_knows_which_images_val_split_auto_found(tmp_path, beside, split):
    pictures = tmp_path / 'things'
    draw_pictures(pictures / 'train' if beside else pictures, n=4)
    if beside:
        draw_pictures(pictures / 'val', n=2)
    settings = {'dataset': 'folder', 'data_dir': str(pictures), 'val_split': 'auto', 'val_size': 0.25, 'workers': 0}
    fit(build(dataclasses.replace(SMALL, output=str(tmp_path), batch_size=4, **settings)))
    folder = stage(tmp_path / 'run', 'resnet18_pssilu.at_things_linf', cards=tmp_path)
    assert yaml.safe_load((folder / 'train_hparams.yaml').read_text())['val_split'] == split


def test_a_release_says_of_which_size_its_images_are(tmp_path):
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        images = rng.integers(0, 256, (12, 48, 48, 3), dtype=np.uint8)
        (tmp_path / 'pets').mkdir(exist_ok=True)
        np.savez(tmp_path / f'pets/{split}.npz', image=images, label=np.arange(12) % 10)
    settings = {'dataset': 'npz', 'data_dir': str(tmp_path / 'pets'), 'val_size': 4, 'batch_size': 4}
    fit(build(dataclasses.replace(SMALL, output=str(tmp_path), **settings)))
    cards = tmp_path / 'cards'
    folder = stage(tmp_path / 'run', 'resnet18_pssilu.at_pets_linf', cards=cards)
    for spec in (tmp_path / 'run', folder):
        assert load_model(spec).pretrained_cfg['input_size'] == (3, 48, 48)
    where = ['--cards', str(cards), '--table', str(tmp_path / 'releases.json'), '--data-dir', str(tmp_path / 'pets')]
    (tmp_path / 'releases.json').write_text('{}')
    assert main(['measure', folder.name, *where, '--attack', 'none', '-n', '6']) == 0
    card = (folder / 'README.md').read_text()
    assert '--data-dir DIR --dataset npz --attack none -n 6' in card  # the folder's name is no data set


def test_a_release_keeps_to_one_split_of_one_data_set(copy):
    folder, digits = copy / 'model_cards' / NAME, load_dataset('digits', None, 'test')
    before = (folder / 'results.json').read_bytes()
    with pytest.raises(ValueError, match='was trained on the images of train; measure it on others: --split SPLIT'):
        measure(folder, load_dataset('digits', None, 'train'), attack='pgd', n=10, split='train')
    settings = folder / 'train_hparams.yaml'
    kept = settings.read_text()
    settings.write_text(kept.replace('train_split: train', 'train_split: test'))
    with pytest.raises(ValueError, match='was trained on the images of test'):
        measure(folder, digits, attack='pgd', n=10)
    settings.write_text(kept)
    with pytest.raises(
        ValueError, match=r'was measured on digits test, and keeps to it, not noise test; .*--overwrite'
    ):
        measure(folder, dataclasses.replace(digits, name='noise'), attack='none', n=10)
    with pytest.raises(
        ValueError, match=r'digits test at Linf 25.5/255, and keeps to it, not digits test at Linf 8/255'
    ):
        measure(folder, digits, attack='pgd', n=10, eps='8/255')
    assert (folder / 'results.json').read_bytes() == before


@pytest.mark.slow
def test_a_release_may_be_measured_at_another_radius_than_that_of_training(copy, run):
    cards = copy / 'model_cards'
    stage(run, NAME, cards=cards, overwrite=True)  # drops what was measured
    where = ['--cards', str(cards), '--table', str(copy / 'releases.json'), '--dataset', 'digits', '--data-dir', '']
    assert main(['measure', NAME, *where, '--attack', 'pgd', '-n', '6', '--eps', '8/255']) == 0
    assert main(['measure', NAME, *where, '--attack', 'pgd', '-n', '4']) == 0  # keeps to it
    record = read_results(cards / NAME)
    assert [result.eps_text for result in results_of(record)] == ['8/255', '8/255']
    card = (cards / NAME / 'README.md').read_text()
    assert 'against Linf 0.1' in card and 'accuracy at 8/255' in card and '| PGD-10, Linf 8/255 |' in card
    assert (
        '--eps 8/255' in card
        and json.loads((cards / NAME / 'config.json').read_text())['robustness']['eps_text'] == '8/255'
    )


def test_weights_that_change_under_a_measurement_do_not_get_its_number(copy, run, tmp_path):
    cards = copy / 'model_cards'
    fit(build(dataclasses.replace(SMALL, output=str(tmp_path), seed=1)))

    def restage(line):
        if not read_results(cards / NAME)['measurements']:
            return
        stage(tmp_path / 'run', NAME, cards=cards, overwrite=True)

    with pytest.raises(ValueError, match='got other weights while these were measured'):
        measure(cards / NAME, load_dataset('digits', None, 'test'), attack='pgd', n=4, progress=restage)
    assert not read_results(cards / NAME)['measurements'] and not (cards / NAME / 'flags').exists()


def test_two_measurements_at_once_do_not_give_a_release_two_radii(copy, run):
    cards, digits, begun = copy / 'model_cards', load_dataset('digits', None, 'test'), []
    stage(run, NAME, cards=cards, overwrite=True)

    def other(line):
        if not begun:
            begun.append(line)
            measure(cards / NAME, digits, attack='pgd', n=4, eps='8/255')

    with pytest.raises(ValueError, match=r'was measured on digits test at Linf 8/255, and keeps to it'):
        measure(cards / NAME, digits, attack='pgd', n=4, progress=other)
    assert [result.eps_text for result in results_of(read_results(cards / NAME))] == ['8/255']


def test_what_a_killed_writer_leaves_is_neither_listed_nor_sent(copy):
    folder = copy / 'model_cards' / NAME
    sums = (folder / 'SHA256SUMS').read_text()
    for name in ('.results.json.x1y2', 'flags/.pgd_10.npz.x1y2'):
        (folder / name).write_text('half')
    render(copy / 'model_cards', copy / 'releases.json')
    check(folder)
    assert (folder / 'SHA256SUMS').read_text() == sums
    assert not any('x1y2' in path for path in files_of(folder))


def test_recipes_without_weights_are_listed(staged, tmp_path):
    (tmp_path / f'{NAME}.yaml').write_text('')
    (tmp_path / 'resnet18_relu.fgsm_digits_linf.yaml').write_text('')
    page = results_page(staged / 'model_cards', tmp_path)
    waiting = page.partition('## What has not run')[2]
    assert 'timm-robust train resnet18_relu.fgsm_digits_linf ' in waiting and NAME not in waiting
    assert f'[{NAME}]({NAME})' in page and '| none yet |' in page  # no pair to compare


@pytest.mark.slow
def test_two_processes_measure_a_release_and_one_keeps_the_record(copy):
    folder, flags = copy / 'model_cards' / NAME, 'flags/apgd_4.npz'
    where = ['--cards', str(folder.parent), '--table', str(copy / 'releases.json'), '--recipes', str(copy)]
    where += ['--dataset', 'digits', '--data-dir', '', '--attack', 'apgd', '-n', '4', '--batch-size', '2']
    assert main(['measure', NAME, *where]) == 0
    alone = results_of(read_results(folder))[0], dict(np.load(folder / flags))
    done = warm.run_pair(['-m', 'timm_robust.staging', 'measure', NAME, *where])
    assert done.returncode == 0, done.stderr
    shared = results_of(read_results(folder))[0], dict(np.load(folder / flags))
    assert [result.processes for result, _ in (alone, shared)] == [1, 2]
    assert shared[0].per_attack == alone[0].per_attack
    assert all((shared[1][key] == alone[1][key]).all() for key in alone[1])
    check(folder)


def test_main_stages_measures_and_renders(run, tmp_path, capsys):
    (tmp_path / 'releases.json').write_text('{}')
    where = ['--cards', str(tmp_path / 'cards'), '--table', str(tmp_path / 'releases.json')]
    where += ['--recipes', str(tmp_path)]
    assert main(['stage', str(run), NAME, '--note', 'Digits.', *where]) == 0
    flags = ['--dataset', 'digits', '--data-dir', '', '--attack', 'apgd', '-n', '4', '--batch-size', '4']
    assert main(['measure', NAME, *flags, *where]) == 0
    for more, message in (
        (['--run', str(run)], '--run measures on what that run held out; leave --split and --dataset out'),
        (['-n', '400'], 'allowed: 1..360'),
    ):
        assert main(['measure', NAME, *flags, *where, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(['render', *where]) == 0
    assert 'APGD-CE + APGD-T' in (tmp_path / 'cards/RESULTS.md').read_text()
    assert main(['measure', 'resnet18_relu.fgsm_digits_linf', *flags, *where]) == 2
    assert 'does not exist; type: timm-robust stage' in capsys.readouterr().err
