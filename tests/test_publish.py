"""The real client against a small Hub on loopback: publish with hub_upload.py, load by name as a stranger."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
import warm
from hub_server import READ, STRANGER, WRITE, HubServer
from huggingface_hub import close_session, constants

from timm_robust.publish import main
from timm_robust.release.publishing import Options
from timm_robust.release.staging import render, stage
from timm_robust.training.checkpoints import save_checkpoint
from timm_robust.training.recipe import Recipe
from timm_robust.weights.releases import read_table

pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')  # the client's own
ROOT = Path(__file__).parents[1]
NAME = 'resnet18_relu.at_digits_linf'
REPO = f'timm-robust/{NAME}'
OLD_CLIENT = Path(os.environ.get('HUB_CLIENT_1', ROOT / '.venv/hub1'))
"""Where huggingface_hub 1.33 is installed, for those who still use it."""


def fake_run(folder, seed):
    """What a finished training leaves, without the training."""
    torch.manual_seed(seed)
    arch = 'resnet18_relu'
    model, recipe = timm.create_model(arch), Recipe(model=arch, dataset='digits', eps=0.1)
    row = {'epoch': 0, 'step': 1, 'images': 16, 'train_loss': 2.0, 'val_pgd_acc': 0.5, 'images_per_s': 9.0}
    state = {'arch': arch, 'num_classes': 10, 'recipe': dataclasses.asdict(recipe), 'epoch': 0, 'step': 1}
    state |= {'history': [row], 'seconds': 2.0, 'rollbacks': 0, 'origins': [], 'state_dict': model.state_dict()}
    folder.mkdir(parents=True)
    for name in ('model_best.pth.tar', 'last.pth.tar'):
        save_checkpoint(folder / name, state)
    with open(folder / 'summary.csv', 'w', newline='') as file:
        csv.DictWriter(file, row).writeheader()
        csv.DictWriter(file, row).writerow(row)
    return folder


def make_staged(root, seed=0):
    root.mkdir(exist_ok=True)
    (root / 'releases.json').write_text('{}')
    stage(fake_run(root / 'run', seed), NAME, cards=root / 'cards')
    render(root / 'cards', root / 'releases.json')
    return root


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    return make_staged(tmp_path_factory.mktemp('staged'))


@pytest.fixture
def staged(original, tmp_path):
    """Root of a staged model of 22 MB and its table, free to be changed."""
    shutil.copytree(original, tmp_path / 'staged')
    return tmp_path / 'staged'


def environment(hub, home, token, client=None):
    """Of a fresh user: nothing cached, nobody logged in; hub is the server, or an address where nobody answers."""
    if isinstance(hub, str):
        env = {key: value for key, value in os.environ.items() if not key.startswith('HF_')}
        env |= {'HF_ENDPOINT': hub, 'HF_HOME': str(home)}
    else:
        env = hub.env(home, token)
    return env | ({'PYTHONPATH': str(OLD_CLIENT)} if client == 'old' else {})


def upload(hub, root, *args, token=WRITE, names=(NAME,), client=None):
    """Run hub_upload.py as its user would; without a client in this process, as if it had just imported its own."""
    where = ['--cards', str(root / 'cards'), '--table', str(root / 'releases.json'), '--json']
    env = environment(hub, root / 'home', token, client)
    if client:
        run = warm.run([ROOT / 'hub_upload.py', *names, *where, *args], env=env, timeout=200, cwd=root)
    else:
        page = hub.url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        read = {'ENDPOINT': hub.url, 'HUGGINGFACE_CO_URL_TEMPLATE': page, 'HF_TOKEN_PATH': str(root / 'home/token')}
        read |= {'HF_HUB_DISABLE_XET': True, 'HF_HUB_DISABLE_PROGRESS_BARS': True, 'HF_HUB_OFFLINE': False}
        close_session()
        root_log = logging.getLogger()
        handlers, level = root_log.handlers[:], root_log.level
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(constants, **read))
            stack.enter_context(mock.patch.dict(os.environ, env, clear=True))
            out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.callback(close_session)
            stack.callback(root_log.setLevel, level)
            stack.callback(setattr, root_log, 'handlers', handlers)
            code = main([*names, *where, *args])
        run = subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())
    if token:
        assert token not in run.stdout + run.stderr
    assert 'Traceback' not in run.stderr, run.stderr
    return run, json.loads(run.stdout) if run.stdout.startswith('[') else None


LOAD = f"""
import torch, timm, timm_robust
try:
    model = timm.create_model('{NAME}', pretrained=True).eval()
    print(model(torch.full((1, 3, 32, 32), 0.5))[0].tolist())
except Exception as error:
    print(type(error).__name__, error, sep='|')
"""


def stranger(hub, root, tmp_path, code=LOAD, token=None, **kwargs):
    """Somebody who installed the package, without a checkout, loads the model by its name."""
    package = tmp_path / 'site'
    if not package.exists():
        shutil.copytree(ROOT / 'timm_robust', package / 'timm_robust', ignore=shutil.ignore_patterns('__pycache__'))
    (package / 'timm_robust/recipes').mkdir(exist_ok=True)
    (package / f'timm_robust/recipes/{NAME}.yaml').touch()  # a release of this project
    shutil.copyfile(root / 'releases.json', package / 'timm_robust/weights/releases.json')
    env = environment(hub, tmp_path / 'stranger', token, **kwargs)
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(package), env.get('PYTHONPATH')]))
    run = warm.run(['-c', code], env=env, timeout=200, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


def logits(root):
    model = timm.create_model(f'local-dir:{root / "cards" / NAME}', pretrained=True).eval()
    return model(torch.full((1, 3, 32, 32), 0.5))[0].tolist()


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


MISSING = pytest.mark.skipif(not OLD_CLIENT.is_dir(), reason='huggingface_hub 1.33 is not installed; make test does it')


@pytest.mark.slow
@pytest.mark.parametrize('client', ['new', pytest.param('old', marks=MISSING)])
def test_publish_load_by_name_and_publish_again(hub, staged, tmp_path, client):
    run, [outcome] = upload(hub, staged, '--tag', 'v1', client=client)
    assert run.returncode == 0 and outcome['status'] == 'published', run.stderr
    repo = hub.repos[REPO]
    files = {p.relative_to(staged / 'cards' / NAME).as_posix(): p for p in (staged / 'cards' / NAME).rglob('*')}
    held = repo.files()
    assert all(held[path] == file.read_bytes() for path, file in files.items() if file.is_file())
    assert len(held['model.safetensors']) > 20_000_000 and repo.tags == {'v1': outcome['commit']}
    release = read_table(staged / 'releases.json')[NAME]
    assert release.repo == REPO and release.commit == outcome['commit'] == repo.head
    assert json.loads(stranger(hub, staged, tmp_path, client=client)) == logits(staged)

    commits, table = len(repo.commits), (staged / 'releases.json').read_bytes()
    _, [again] = upload(hub, staged, '--tag', 'v1', client=client)
    assert again['status'] == 'unchanged' and again['commit'] == outcome['commit'] and not again['changes']
    assert len(repo.commits) == commits and (staged / 'releases.json').read_bytes() == table


def test_a_dry_run_writes_nothing(hub, staged):
    before = (staged / 'releases.json').read_bytes()
    for token in (WRITE, None):
        run, [outcome] = upload(hub, staged, '--dry-run', token=token)
        assert run.returncode == 0 and outcome['status'] == 'planned' and outcome['commit'] is None
        assert outcome['changes']['model.safetensors'] == 'new'
    assert not hub.repos and (staged / 'releases.json').read_bytes() == before


def test_tokens_that_may_not_write_are_refused_before_anything_is_sent(hub, staged):
    for token, message in (
        (None, 'no token; type hf auth login, or set HF_TOKEN'),
        ('hf_nobody', 'the token is not valid; type hf auth login'),
        (READ, 'may only read; make one that may write'),
        (STRANGER, 'bob does not belong to timm-robust'),
    ):
        run, [outcome] = upload(hub, staged, token=token)
        assert run.returncode == 1 and outcome['status'] == 'failed' and message in outcome['message']
    assert not hub.repos


def test_released_weights_change_only_when_asked(hub, staged, tmp_path):
    upload(hub, staged, '--tag', 'v1')
    other, repo = make_staged(tmp_path / 'other', seed=1), hub.repos[REPO]
    head = repo.head
    _, [refused] = upload(hub, other)
    assert 'holds other weights under this name; type --overwrite' in refused['message'] and repo.head == head
    _, [refused] = upload(hub, other, '--overwrite', '--tag', 'v1')
    assert 'tags never move: choose another' in refused['message'] and repo.head == head
    _, [done] = upload(hub, other, '--overwrite', '--tag', 'v2')
    assert done['status'] == 'published' and done['changes']['model.safetensors'] == 'changed'
    assert repo.tags == {'v1': head, 'v2': done['commit']} and repo.head == done['commit']


def test_a_file_that_is_no_longer_staged_goes(hub, staged):
    upload(hub, staged)
    (staged / 'cards' / NAME / 'training.png').unlink()
    render(staged / 'cards', staged / 'releases.json')
    _, [outcome] = upload(hub, staged)
    assert outcome['changes']['training.png'] == 'gone' and 'training.png' not in hub.repos[REPO].files()
    assert 'model.safetensors' not in outcome['changes']


def test_branches_leave_the_table_alone(hub, staged):
    upload(hub, staged)
    table, head = (staged / 'releases.json').read_bytes(), hub.repos[REPO].head
    (staged / 'cards' / NAME / 'summary.csv').open('a').write('\n')
    render(staged / 'cards', staged / 'releases.json')
    _, [branch] = upload(hub, staged, '--revision', 'next')
    assert branch['status'] == 'published' and hub.repos[REPO].head == head
    assert (staged / 'releases.json').read_bytes() == table


def test_a_branch_is_made_also_where_it_equals_main(hub, staged):
    upload(hub, staged)
    _, [outcome] = upload(hub, staged, '--revision', 'next')
    assert outcome['status'] == 'published' and hub.repos[REPO].branches['next'] == hub.repos[REPO].head
    _, [outcome] = upload(hub, staged, '--revision', 'next')
    assert outcome['status'] == 'unchanged'


def test_private_repositories(hub, staged):
    _, [outcome] = upload(hub, staged, '--private', '--org', 'ann')
    assert outcome['status'] == 'published' and hub.repos[f'ann/{NAME}'].private
    assert read_table(staged / 'releases.json')[NAME].commit is None
    _, [outcome] = upload(hub, staged, '--org', 'ann')  # it stays private without the flag
    assert outcome['status'] == 'unchanged' and read_table(staged / 'releases.json')[NAME].commit is None
    hub.repos[f'ann/{NAME}'].private = False
    _, [outcome] = upload(hub, staged, '--private', '--org', 'ann')
    assert 'exists and is public; --private does not change that' in outcome['message']


def test_a_changed_folder_is_not_published(hub, staged):
    (staged / 'cards' / NAME / 'README.md').open('a').write('edited by hand\n')
    run, [outcome] = upload(hub, staged)
    assert run.returncode == 1 and 'README.md is not the file of SHA256SUMS' in outcome['message']
    assert not hub.requests
    run, _ = upload(hub, staged, names=['resnet18_relu.none_cifar10_linf'])
    assert run.returncode == 2 and f'is not staged; {staged / "cards"} holds {NAME}' in run.stderr


@pytest.mark.parametrize(
    'wrong', [{'tag': 'a b'}, {'tag': 'v1..2'}, {'revision': 'x.lock'}, {'tag': ''}, {'org': 'a b'}], ids=str
)
def test_names_that_git_or_the_hub_refuses_are_found_before_anything_is_sent(wrong):
    with pytest.raises(ValueError, match='allowed are letters, digits'):
        Options(**wrong)


def test_a_table_of_other_weights_and_what_is_no_part_of_a_release_keep_it_back(hub, staged):
    (staged / 'cards' / NAME / 'id_rsa').write_text('secret')
    _, [outcome] = upload(hub, staged)
    assert 'id_rsa is no part of a release; take it away' in outcome['message']
    (staged / 'cards' / NAME / 'id_rsa').unlink()
    table = (staged / 'releases.json').read_text()
    (staged / 'releases.json').write_text(table.replace(read_table(staged / 'releases.json')[NAME].sha256, 'a' * 64))
    _, [outcome] = upload(hub, staged)
    assert f'does not hold these weights of {NAME}' in outcome['message'] and not hub.requests


@pytest.mark.parametrize('action', [500, 'drop', 'drop_after', 429])
def test_what_fails_in_passing_after_the_commit_is_tried_again(hub, staged, action):
    hub.fault(f'POST /api/models/{REPO}/tag/', action)
    run, [outcome] = upload(hub, staged, '--tag', 'v1')
    assert outcome['status'] == 'published' and hub.repos[REPO].tags == {'v1': outcome['commit']}, run.stderr
    assert 'again in 1 s' in run.stderr


def test_a_long_wait_is_refused_with_the_time_to_come_back(hub, staged):
    hub.fault(f'POST /api/models/{REPO}/commit/main', 429, seconds=3600)
    run, [outcome] = upload(hub, staged)
    assert 'the Hub asks to wait for 3600 s; type the same again after ' in outcome['message'], run.stderr
    hub.fault(f'POST /api/models/{REPO}/tag/', 429, seconds=3600)
    run, [outcome] = upload(hub, staged, '--tag', 'v1')
    assert (
        f'{REPO} holds the files, commit {hub.repos[REPO].head[:12]}, but then: the Hub asks to' in outcome['message']
    )
    _, [outcome] = upload(hub, staged, '--tag', 'v1')
    assert outcome['status'] == 'unchanged' and hub.repos[REPO].tags == {'v1': hub.repos[REPO].head}


@pytest.mark.parametrize('action', ['drop', 'drop_after', 503])
def test_a_lost_commit_is_looked_up_before_it_counts_as_failed(hub, staged, action):
    hub.fault(f'POST /api/models/{REPO}/commit/main', action, times=10 if action == 503 else 1)
    run, [outcome] = upload(hub, staged)
    if action == 'drop_after':  # committed, and the answer lost
        assert outcome['status'] == 'published' and outcome['commit'] == hub.repos[REPO].head, run.stderr
    else:
        assert outcome['status'] == 'failed' and 'model.safetensors' not in hub.repos[REPO].files()
    hub.faults.clear()
    _, [outcome] = upload(hub, staged)
    assert outcome['status'] == ('unchanged' if action == 'drop_after' else 'published')
    assert len(hub.repos[REPO].commits) == 2  # the initial one and ours


def test_an_upload_corrupted_on_the_way_is_refused(hub, staged):
    hub.fault('PUT /upload/', 'corrupt_body', times=20)
    run, [outcome] = upload(hub, staged)
    assert run.returncode == 1 and outcome['status'] == 'failed' and 'model.safetensors' not in hub.repos[REPO].files()


def test_a_publication_that_comes_back_changed_is_not_announced(hub, staged):
    hub.fault('GET /cdn/', 'corrupt', times=20)
    run, [outcome] = upload(hub, staged, '--tag', 'v1')
    assert outcome['status'] == 'failed', run.stderr
    assert 'came back with other bytes' in outcome['message']
    assert not hub.repos[REPO].tags and read_table(staged / 'releases.json')[NAME].commit is None


RACE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from timm_robust.release import publishing as hub
hub.check = lambda folder: None  # eight folders of the same weights: loaded once is enough
def one(root):
    try:
        folder, table = root / 'cards' / sys.argv[2], root / 'releases.json'
        done = hub.publish(folder, hub.Options(), table=table, say=lambda line: None)
        return done.status
    except Exception as error:
        return f'{type(error).__name__}: {error}'
with ThreadPoolExecutor(8) as pool:
    print(*pool.map(one, sorted(Path(sys.argv[1]).iterdir())), sep='\\n')
"""


@pytest.mark.slow
def test_of_eight_racing_publishers_one_wins(hub, staged, tmp_path):
    upload(hub, staged)
    for number in range(8):
        root = tmp_path / 'racers' / str(number)
        shutil.copytree(staged, root)
        (root / 'cards' / NAME / 'summary.csv').open('a').write('\n' * (number + 1))
        render(root / 'cards', root / 'releases.json')
    env = environment(hub, tmp_path / 'home', WRITE)
    env['PYTHONPATH'] = str(ROOT)
    run = warm.run(['-c', RACE, tmp_path / 'racers', NAME], env=env, timeout=200)
    ends = run.stdout.strip().splitlines()
    assert ends.count('published') == 1, run.stdout + run.stderr
    assert sum('somebody else committed' in end or '412' in end for end in ends) == 7, ends
    assert len(hub.repos[REPO].commits) == 3


@pytest.mark.slow
def test_killed_half_way_nothing_shows_and_a_rerun_completes(hub, staged):
    hub.fault('PUT /upload/', 'stall', times=9, seconds=30)
    where = ['--cards', str(staged / 'cards'), '--table', str(staged / 'releases.json')]
    env = environment(hub, staged / 'home', WRITE)
    process = warm.Popen([ROOT / 'hub_upload.py', NAME, *where], env=env, cwd=staged)
    while process.poll() is None and not any(request.method == 'PUT' for request in list(hub.requests)):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 'model.safetensors' not in hub.repos[REPO].files()
    assert read_table(staged / 'releases.json')[NAME].commit is None
    hub.faults.clear()
    _, [outcome] = upload(hub, staged)
    assert outcome['status'] == 'published' and 'model.safetensors' in hub.repos[REPO].files()


@pytest.fixture
def published(hub, staged):
    upload(hub, staged)
    hub.requests.clear()
    return staged


@pytest.mark.slow
def test_a_tampered_download_is_refused(hub, published, tmp_path):
    hub.fault('GET /cdn/', 'corrupt', times=50)
    kind, message = stranger(hub, published, tmp_path).split('|')
    assert kind == 'ValueError' and 'does not hold the released file, and it was deleted from the cache' in message
    assert not [
        path for path in (tmp_path / 'stranger').rglob('*') if path.is_file() and path.stat().st_size > 20_000_000
    ]
    hub.faults.clear()
    assert json.loads(stranger(hub, published, tmp_path)) == logits(published)


@pytest.mark.slow
def test_a_damaged_cache_is_fetched_again(hub, published, tmp_path):
    assert json.loads(stranger(hub, published, tmp_path)) == logits(published)
    [blob] = [
        p
        for p in (tmp_path / 'stranger').rglob('*')
        if p.is_file() and p.stat().st_size > 20_000_000 and not p.is_symlink()
    ]
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    message = stranger('http://127.0.0.1:9', published, tmp_path)
    assert 'the cached file is damaged (' in message and 'cannot be reached' in message
    assert json.loads(stranger(hub, published, tmp_path)) == logits(published)


@pytest.mark.slow
def test_loaded_once_it_loads_without_a_network(hub, published, tmp_path):
    expected = logits(published)
    assert json.loads(stranger(hub, published, tmp_path)) == expected
    hub.requests.clear()
    assert json.loads(stranger(hub, published, tmp_path)) == expected and not hub.requests
    assert json.loads(stranger('http://127.0.0.1:9', published, tmp_path)) == expected


@pytest.mark.slow
def test_what_goes_wrong_is_said_in_one_line_with_the_remedy(hub, published, tmp_path):
    repo = hub.repos[REPO]

    def outcome(**kwargs):
        kind, message = stranger(kwargs.pop('hub', hub), published, tmp_path, **kwargs).split('|')
        assert NAME in message and '\n' not in message
        return kind, message

    kind, message = outcome(hub='http://127.0.0.1:9')  # nobody listens there: the network is off
    assert kind == 'ConnectionError' and 'cannot be reached' in message
    repo.private = True
    assert 'missing, private, or closed to your token (401)' in outcome()[1]
    assert outcome(token='hf_wrong')[0] == 'PermissionError'
    repo.private, repo.gated = False, True
    assert 'is gated; ask for access at' in outcome(token=STRANGER)[1]
    repo.gated = False
    release = read_table(published / 'releases.json')[NAME]
    table = {NAME: {k: v for k, v in dataclasses.asdict(release).items() if k != 'name'} | {'commit': 'f' * 40}}
    (published / 'releases.json').write_text(json.dumps(table))
    kind, message = outcome()
    assert kind == 'FileNotFoundError' and 'that commit is gone; type pip install -U timm-robust' in message
    (published / 'releases.json').write_text(json.dumps({NAME: table[NAME] | {'commit': None}}))
    kind, message = outcome()
    assert kind == 'FileNotFoundError' and 'is not on the Hub yet' in message


def test_offline_mode_is_named(hub, published, tmp_path, monkeypatch):
    code = f"""
import os
os.environ['HF_HUB_OFFLINE'] = '1'
import timm, timm_robust
try:
    timm.create_model('{NAME}', pretrained=True)
except ConnectionError as error:
    print(error)
"""
    assert 'has to come from the Hub, but HF_HUB_OFFLINE is set' in stranger(hub, published, tmp_path, code=code)


def test_other_ways_to_load(hub, published, tmp_path):
    code = f"""
import json, timm, timm_robust, torch
from timm_robust.models.load import load_model
x = torch.full((1, 3, 32, 32), 0.5)
by_hub = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()
adapted = timm.create_model('{NAME}', pretrained=True, num_classes=3, in_chans=1)
own = timm.create_model('{NAME}', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='{REPO}', file=None))
checked = load_model('hf-hub:{REPO}')
try:
    load_model('hf-hub:{REPO}2')
except ConnectionError as error:
    missing = str(error)
parts = [by_hub(x)[0].tolist(), list(adapted(x[:, :1]).shape), own.eval()(x)[0].tolist(), checked(x)[0].tolist()]
print(json.dumps([*parts, missing]))
"""
    by_hub, shape, own, checked, missing = json.loads(stranger(hub, published, tmp_path, code=code))
    assert by_hub == own == checked == logits(published) and shape == [1, 3]
    assert missing.startswith(f'hf-hub:{REPO}2 cannot be had from the Hub: ') and '\n' not in missing
