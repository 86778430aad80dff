"""README and docs: every command is run at toy size, or parsed by what takes it; every link leads somewhere."""

import io
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_robust import cli
from timm_robust.app.command import parser as app_parser
from timm_robust.publish import parse as parse_publish
from timm_robust.release.record import read_results
from timm_robust.release.results_page import README_END, README_START, weights_table
from timm_robust.robustbench.__main__ import _parser as robustbench_parser
from timm_robust.study.design import read_study
from timm_robust.training.flags import parse_recipe
from timm_robust.training.recipe import find_recipe
from timm_robust.weights import STAGED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
SMALL = ['--max-steps', '1', '--batch-size', '4', '--val-size', '4', '--eval-steps', '1', '--device', 'cpu']
STUDY = """
recipe: {model: resnet18, model_kwargs: {width: 2}, dataset: digits, eps: 0.1, steps: 1, max_steps: 1, val_size: 20}
measure: {n: 2, attack: pgd, square_queries: 2}
seeds: [0]
sweeps: [{act: psilu, alpha: [1.0]}]
"""


def commands():
    """The words of every line of a bash block that calls this package, once where pages share it."""
    seen = []
    for page in PAGES:
        for block in re.findall(r'```bash\n(.*?)```', page.read_text(), re.S):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in ('timm-robust', 'torchrun', 'python') and words not in seen:
                    seen.append(words)
                    yield pytest.param(words, id=f'{page.stem}: {" ".join(words[:4])}')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What the pages suppose: CIFAR-10 in data/, pictures in IMAGES/, a study, and runs of two recipes, staged."""
    pytest.importorskip('pyarrow')
    import pyarrow
    import pyarrow.parquet

    folder, rng = tmp_path_factory.mktemp('docs'), np.random.default_rng(0)
    (folder / 'data').mkdir()
    for split in ('train', 'test'):
        rows = []
        for _ in range(40):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(picture, 'png')
            rows.append({'bytes': picture.getvalue(), 'path': None})
        table = pyarrow.table({'img': rows, 'label': [number % 10 for number in range(40)]})
        pyarrow.parquet.write_table(table, folder / f'data/{split}.parquet')
    for split in ('train', 'val', 'test'):
        for number in range(20):
            path = folder / 'IMAGES' / split / f'class{number % 2}' / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    (folder / 'study.yaml').write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = ['train', 'resnet18_pssilu.fgsm_cifar10_linf', '--data-dir', 'data', *SMALL, '--experiment']
        assert cli.main([*train, 'RUN']) == 0
        for name in ('first', 'second'):
            shutil.copytree('output/train/RUN', f'output/train/{name}')
        assert cli.main(['stage', 'output/train/RUN', 'resnet18_pssilu.at_cifar10_linf', '--cards', 'model_cards']) == 0
        finetune = ['train', 'finetune_folder', '--model', 'test_resnet', '--no-pretrained', '--img-size', '32']
        assert cli.main([*finetune, '--data-dir', 'IMAGES', *SMALL, '--experiment', 'mine']) == 0
        assert cli.main(['stage', 'output/train/mine', 'test_resnet.fgsm_images_linf', '--cards', 'model_cards']) == 0
    return folder


def toy(words):
    """A command of a page as small as it can be: names of places and sizes change, and what needs a network goes."""
    places = {'IMAGENET': 'IMAGES', 'train/studies/digits.yaml': 'study.yaml', 'resnet50': 'test_resnet'}
    places |= {'vit_small_patch16_224': 'test_vit', 'resnet50.fgsm_images_linf': 'test_resnet.fgsm_images_linf'}
    small = {'1000': '4', '200': '2', '224': '32', 'autoattack': 'pgd'}
    words = [{**places, **small}.get(word, word) for word in words]
    words = [word for word in words if word not in ('--dataset-download', '--pretrained')]
    if any(word.startswith('finetune_folder') for word in words) and '--initial-checkpoint' not in words:
        words.append('--no-pretrained')
    if '...' in words:
        words = [word for word in words if word != '...'] + ['--data-dir', 'data', '--eps', '8/255']
    return words


def test_the_study_of_the_page_is_one(tmp_path):
    [text] = re.findall(r'```yaml\n(recipe.*?)```', (ROOT / 'docs/training.md').read_text(), re.S)
    (tmp_path / 'study.yaml').write_text(text)
    study = read_study(tmp_path / 'study.yaml')
    assert [arm.name for arm in study.arms] == [
        'relu', 'pssilu-alpha1-beta0.1-frozen-pgd_at', 'pssilu-alpha4-beta0.3-frozen-pgd_at', 'long',
    ]  # fmt: skip
    assert len(study.points) == 12 and study.claims


@pytest.mark.parametrize('words', list(commands()))
def test_every_command_of_the_pages(words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if words[0] == 'torchrun':  # test_distributed.py runs it
        at = next(number for number, word in enumerate(words) if word.endswith('.py'))
        recipe = str(find_recipe('resnet18_relu.at_cifar10_linf'))
        places = {word: str(ROOT / word) for word in words if word.startswith('train/')} | {'RECIPE.yaml': recipe}
        script, *rest = [places.get(word, word) for word in words[at:]]
        parse_recipe(rest)
        assert Path(script).is_file()
        return
    assert words[0] == 'timm-robust', 'the pages name the scripts of a checkout by the command'
    command, *rest = toy(words[1:])
    if command == 'demo':  # test_adv_train.py runs it
        assert rest == []
    elif command == 'app':  # test_app.py
        app_parser().parse_args(rest)
    elif command == 'publish':  # test_publish.py does it
        parse_publish(rest)
    elif command == 'robustbench':  # test_robustbench.py
        robustbench_parser().parse_args(rest)
    else:
        if command in ('train', 'plan'):
            rest += SMALL[2:] if command == 'plan' else SMALL
            rest += [] if '--resume' in rest else ['--output', str(tmp_path)]
        if command in ('stage', 'measure'):
            rest += ['--cards', 'model_cards']
        assert cli.main([command, *rest]) == 0, capsys.readouterr().err


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)#]+)\)', page.read_text()):
        assert link.startswith('https://') or (page.parent / link).exists(), link


def test_the_readme_is_short_and_its_table_is_made_not_typed():
    text = (ROOT / 'README.md').read_text()
    assert len(text.split()) < 1250
    records = [read_results(path.parent) for path in sorted(STAGED.glob('*/results.json'))]
    between = text.partition(README_START)[2].partition(README_END)[0].strip().splitlines()
    assert between == weights_table(records)
