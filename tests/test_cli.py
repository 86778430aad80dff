"""`timm-robust`: the same mains, under one name."""

from pathlib import Path

import pytest

from timm_robust import __version__, cli
from timm_robust.provenance import RECIPES
from timm_robust.training.recipe import Recipe, find_recipe

ROOT = Path(__file__).parents[1]


def test_help_lists_every_command_and_so_does_each(capsys):
    assert cli.main(['--help']) == 0
    listed = capsys.readouterr().out
    for name, (module, first, about) in cli.COMMANDS.items():
        assert f'  {name} ' in listed and about in listed
        with pytest.raises(SystemExit) as end:
            cli.main([name, '--help'])
        said = capsys.readouterr().out
        assert end.value.code == 0 and said.startswith(f'usage: timm-robust {name}'), (module, first, said[:80])
    assert cli.main(['--version']) == 0 and capsys.readouterr().out == f'timm-robust {__version__}\n'


@pytest.mark.parametrize(
    ('argv', 'match'),
    [
        (['trian'], "'trian' is no command; did you mean 'train'? there are train, plan"),
        (['evaluate', 'nobody'], "'nobody' is no file"),
        (['plot'], 'required: RUN'),
        (['train', 'resnet18_pssilu.fgsm_cifar10_lin'], 'near it are resnet18_pssilu.fgsm_cifar10_linf'),
        (['train', 'a.yaml', '-c', 'b.yaml'], 'two recipes, a.yaml and b.yaml; give one'),
        (['train', 'nowhere.yaml'], 'nowhere.yaml'),
    ],
)
def test_errors_are_one_line_and_status_2(argv, match, capsys):
    try:
        status = cli.main(argv)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.count('\n') == 1 and error.startswith('error: ') and match in error


def test_no_command_shows_what_there_is(capsys):
    assert cli.main([]) == 2 and 'usage: timm-robust COMMAND' in capsys.readouterr().out


def test_recipes_are_found_by_name_and_by_file(tmp_path, monkeypatch):
    name = 'resnet18_pssilu.fgsm_cifar10_linf'
    assert find_recipe(name) == RECIPES / f'{name}.yaml' and find_recipe(str(RECIPES / f'{name}.yaml')).is_file()
    assert Recipe.from_yaml(find_recipe(name)).model == 'resnet18_pssilu'
    monkeypatch.chdir(tmp_path)
    Path(name).write_text('model: resnet18\n')  # a file of the user's own wins
    assert find_recipe(name) == Path(name)


@pytest.mark.parametrize('script', ['train/adv_train.py', 'train/demo.py', 'hub_upload.py'])
def test_the_scripts_are_the_same_commands(script):
    text = (ROOT / script).read_text()
    module = {'adv_train': 'train', 'demo': 'demo', 'hub_upload': 'publish'}[Path(script).stem]
    assert f'from timm_robust.{module} import main' in text and len(text.splitlines()) < 12
