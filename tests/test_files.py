import errno
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import warm

from timm_robust import files
from timm_robust.files import LOCK, atomic_file, link_file, lock_folder, new_folder, read_yaml, sweep_temporaries
from timm_robust.training.writer import Writer

HOLD = 'import sys, pathlib; from timm_robust.files import lock_folder; lock = lock_folder(pathlib.Path(sys.argv[1])); '


def test_a_writer_does_one_job_at_a_time_beside_its_caller():
    writer, go, done = Writer(), threading.Event(), []

    def work(number):
        assert go.wait(60) and threading.current_thread() is not threading.main_thread()
        done.append(number)

    with writer:
        writer.start(lambda: work(1))
        assert not done
        go.set()
        writer.start(lambda: work(2))  # waits for the first
        assert done[0] == 1
    assert done == [1, 2] and writer.seconds >= 0


def test_what_goes_wrong_in_the_thread_is_raised_once_by_whoever_waits():
    def fail():
        raise OSError('the disk is full')

    writer = Writer()
    for wait in (writer.wait, lambda: writer.start(print), lambda: writer.__exit__(None)):
        writer.start(fail)
        with pytest.raises(OSError, match='the disk is full'):
            wait()
        writer.wait()
    writer.start(fail)
    while not writer.job.done():
        pass
    with pytest.raises(OSError, match='the disk is full'):
        writer.check()
    writer.check()


def test_an_exception_on_its_way_goes_before_that_of_the_thread(caplog):
    def fail():
        raise OSError('the disk is full')

    with pytest.raises(KeyError), Writer() as writer:
        writer.start(fail)
        raise KeyError
    assert 'the disk is full' in caplog.text


@pytest.mark.parametrize('links', [True, False])
def test_a_second_name_takes_the_place_of_what_had_it(tmp_path, monkeypatch, links):
    source, target = tmp_path / 'a', tmp_path / 'b'
    source.write_text('new')
    target.write_text('old')
    if not links:
        monkeypatch.setattr(os, 'link', lambda *args: (_ for _ in ()).throw(PermissionError(1, 'no links here')))
    for _ in range(2):  # of names of one file a rename leaves both
        link_file(source, target)
        assert target.read_text() == 'new' and target.samefile(source) is links
        assert sorted(os.listdir(tmp_path)) == ['a', 'b']


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    alive = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    left = [f'.{name}.{pid}.0f3ab210.tmp' for name in ('last.pth.tar', 'args.yaml') for pid in (dead.pid, os.getpid())]
    kept = [f'.last.pth.tar.{alive.pid}.0f3ab210.tmp', '.last.pth.tar', '.git', '.summary.csv.1.tmp', 'last.pth.tar']
    for name in left + kept:
        (tmp_path / name).touch()
    sweep_temporaries(tmp_path)
    alive.communicate(b'\n')
    assert set(os.listdir(tmp_path)) == set(kept)


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path):
    """Of whatever it dies, and though what it forked lives on, as the workers of a loader do for some seconds."""
    work = 'import os, time; child = os.fork(); child and print(child, flush=True); time.sleep(600)'
    process = warm.Popen(['-c', HOLD + work, tmp_path], stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    with pytest.raises(BlockingIOError, match=rf'held by process {process.pid} on .* since .*--experiment') as error:
        lock_folder(tmp_path)
    assert '\n' not in str(error.value)
    process.kill()
    process.wait()
    with lock_folder(tmp_path):
        assert f'process {os.getpid()} on' in (tmp_path / LOCK).read_text()
    os.kill(child, signal.SIGKILL)  # it had lived on
    process.stdout.close()


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(files.fcntl, 'lockf', refuse)
    assert lock_folder(tmp_path) is None
    assert f'{tmp_path} cannot be locked' in caplog.text and 'let no other run write there' in caplog.text


def test_a_new_folder_is_nobody_elses(tmp_path):
    assert [new_folder(tmp_path / 'a/run').name for _ in range(3)] == ['run', 'run-2', 'run-3']


@pytest.mark.parametrize('value', ['!!bool maybe', '!!int ""', '!!timestamp x'])
def test_values_that_their_tags_do_not_fit(tmp_path, value):
    (tmp_path / 'a.yaml').write_text(f'a: {value}\n')
    with pytest.raises(ValueError, match=r'a\.yaml: not valid YAML: a value is not what its tag says'):
        read_yaml(tmp_path / 'a.yaml')


def test_a_folder_that_went_meanwhile_is_said_with_the_file(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    with pytest.raises(OSError, match=r'cannot write .*run/last: No such file'), atomic_file(folder / 'last'):
        shutil.rmtree(folder)
