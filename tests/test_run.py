from subprocess import PIPE

import pytest
import warm
from tiny_runs import tiny

from timm_robust.training import run as run_module
from timm_robust.training.builder import build
from timm_robust.training.loop import fit


def test_a_folder_that_nobody_named_is_the_runs_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, 'strftime', lambda _: 'now')
    settings = {'experiment': None, 'max_steps': 1, 'val_size': 0, 'epochs': 1}
    runs = [build(tiny(tmp_path, **settings)), build(tiny(tmp_path, resume='auto', **settings))]  # in one second
    folders = [fit(run)['output'] for run in runs]
    assert folders == [str(tmp_path / name) for name in ('now-resnet18_pssilu', 'now-resnet18_pssilu-2')]


@pytest.mark.slow
def test_a_folder_in_use_is_refused(undisturbed, tmp_path):
    code = 'import sys, pathlib; from timm_robust.files import lock_folder; '
    code += 'lock = lock_folder(pathlib.Path(sys.argv[1])); print(1, flush=True); input()'
    (tmp_path / 'run').mkdir()
    with warm.Popen(['-c', code, tmp_path / 'run'], stdin=PIPE, stdout=PIPE) as other:
        assert other.stdout.readline()
        for go in (lambda: fit(build(tiny(tmp_path))), lambda: build(tiny(tmp_path, resume='auto'))):
            with pytest.raises(BlockingIOError, match=f'is held by process {other.pid} on'):
                go()
        assert [path.name for path in (tmp_path / 'run').iterdir()] == ['run.lock']
        other.communicate('\n')
    assert build(tiny(tmp_path, resume='auto')).lock is not None


def test_a_new_run_does_not_mix_with_an_old_one(undisturbed):
    folder = undisturbed[0]
    before = (folder / 'run/last.pth.tar').read_bytes()
    with pytest.raises(FileExistsError, match='holds a run already; go on with it by --resume auto, name another'):
        fit(build(tiny(folder, lr=0.1)))
    assert (folder / 'run/last.pth.tar').read_bytes() == before
