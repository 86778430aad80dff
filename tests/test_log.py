import csv
import logging
import os
import struct
import sys

import pytest
import torch

from timm_robust.training.log import RunLog, _duration, _fit

CONFIG = {
    'model': 'resnet18_pssilu',
    'batch_size': 128,
    'model_kwargs': {'width': 0.5},
}
STEP = {'loss': 1.8, 'acc': 0.25, 'lr': 0.1, 'images_per_s': 312.0, 'seconds_left': 4000.0}


def row(epoch, **more):
    step = 10 * (epoch + 1)
    return {'epoch': epoch, 'step': step, 'images': 128 * step, 'train_loss': 2.0 - epoch, 'seconds': 3700.0} | more


def table(folder):
    with (folder / 'summary.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def make(folder, **options):
    return RunLog(folder, config=CONFIG, total_steps=30, **options)


class Terminal:
    """What a screen of one line shows of what is written to it."""

    def __init__(self):
        self.lines, self.column, self.writes = [''], 0, []

    def write(self, text):
        self.writes.append(text)
        for char in text:
            if char == '\r':
                self.column = 0
            elif char == '\n':
                self.lines.append('')
                self.column = 0
            else:
                self.lines[-1] = self.lines[-1][: self.column] + char + self.lines[-1][self.column + 1 :]
                self.column += 1

    def flush(self):
        pass

    def isatty(self):
        return True

    def fileno(self):
        raise OSError


def test_summary_is_whole_after_every_epoch_and_keeps_its_columns(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'timm_robust')
    with make(tmp_path / 'new' / 'run') as log:
        log.epoch(row(0))
        assert len(table(log.folder)) == 1
        log.epoch(row(1, val_pgd_acc=0.512, val_clean_acc=torch.tensor(0.75), alpha=None))
        log.epoch(row(2, val_pgd_acc=float('nan'), max_curvature=float('inf')))
    rows = table(log.folder)
    start = ['epoch', 'step', 'images', 'train_loss', 'seconds']
    assert list(rows[0]) == [*start, 'val_pgd_acc', 'val_clean_acc', 'alpha', 'max_curvature']
    assert [r['val_pgd_acc'] for r in rows] == ['', '0.512', 'nan']
    assert [r['val_clean_acc'] for r in rows] == ['', '0.75', '']
    assert rows[1]['alpha'] == '' and rows[2]['max_curvature'] == 'inf'
    assert [p.name for p in log.folder.iterdir()] == ['summary.csv']
    assert caplog.messages[1] == (
        'epoch 1 done  step 20/30  train loss 1.0000  time 1:01:40  val PGD acc 51.20 %  val clean acc 75.00 %'
    )


def test_resume_restores_summary_at_once_and_copies_history(tmp_path):
    history = [row(0), row(1)]
    (tmp_path / 'summary.csv').write_text('half a r')
    log = make(tmp_path, history=history)
    assert [r['epoch'] for r in table(tmp_path)] == ['0', '1']
    log.epoch(row(2))
    log.close()
    assert len(table(tmp_path)) == 3 and len(history) == 2 and log.history == [*history, row(2)]


def test_other_ranks_are_quiet(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, 'timm_robust')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with make(tmp_path / 'run', rank=1, tensorboard=True, wandb=True) as log:
        log.step(step=5, epoch=0, **STEP)
        log.epoch(row(0))
    assert not caplog.messages and not sys.stderr.writes and not (tmp_path / 'run').exists()
    assert log.history == [row(0)]


def test_progress_is_a_plain_line_without_a_terminal(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, 'timm_robust')
    with make(tmp_path) as log:
        log.step(step=5, epoch=0, **STEP, curvature=0.5)
        log.step(step=6, epoch=0, **{**STEP, 'loss': float('nan'), 'seconds_left': float('inf')})
    assert caplog.messages[0] == (
        'epoch 0  step 5/30 (16 %)  loss 1.8000  acc 25.00 %  1:06:40 left  lr 0.1  312 images/s  curvature 0.5'
    )
    assert 'loss nan  acc 25.00 %  ? left' in caplog.messages[1]
    assert capsys.readouterr().err == ''


def test_progress_is_one_line_rewritten_on_a_terminal(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    monkeypatch.delenv('TERM', raising=False)
    root, handler = logging.getLogger(), logging.StreamHandler(terminal)
    monkeypatch.setattr(root, 'handlers', [handler])
    monkeypatch.setattr(logging.getLogger('timm_robust'), 'level', logging.INFO)
    with make(tmp_path) as log:
        log.step(step=5, epoch=0, **STEP, a_long_name_that_does_not_fit_any_more=1)
        log.step(step=6, epoch=0, **{**STEP, 'seconds_left': 4.0})
        assert len(terminal.lines) == 1 and len(terminal.writes) == 2  # each in one piece: no flicker
        assert terminal.lines[0].rstrip() == 'epoch 0  step 6/30 (20 %)  loss 1.8000  acc 25.00 %  0:00:04 left  lr 0.1'
        logging.getLogger('timm_robust.checkpoint').warning('careful')  # other lines take its place
        assert [line.rstrip() for line in terminal.lines] == ['careful', '']
        log.step(step=7, epoch=0, **STEP)
        log.epoch(row(0))
        log.step(step=8, epoch=1, **STEP)
    assert [line.split('  ')[0] for line in terminal.lines] == ['careful', 'epoch 0 done', 'epoch 1', '']
    assert max(map(len, terminal.lines)) < 80 and not handler.filters


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='no pseudo-terminals here')
@pytest.mark.parametrize('columns', [20, 60, 200])
def test_progress_fits_a_real_terminal(tmp_path, monkeypatch, columns):
    fcntl, termios = pytest.importorskip('fcntl'), pytest.importorskip('termios')
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr(logging.getLogger('timm_robust'), 'level', logging.INFO)
    with os.fdopen(slave, 'w') as stream:
        monkeypatch.setattr(sys, 'stderr', stream)
        log = make(tmp_path)
        log.step(step=5, epoch=0, **STEP)
        log.step(step=6, epoch=0, **STEP)
        log.close()
        seen = ''
        while '\n' not in seen:
            seen += os.read(master, 10000).decode()
    os.close(master)
    lines = seen.removesuffix('\r\n').split('\r')
    assert len(lines) == 3 and lines[0] == '' and all(0 < len(line) < columns for line in lines[1:])
    assert ('images/s' in seen) == (columns == 200)


def test_times_and_fitting():
    assert [_duration(s) for s in (0, 59.6, 3725, 90061, float('nan'), -1)] == [
        '0:00:00', '0:01:00', '1:02:05', '25:01:01', '?', '?',
    ]  # fmt: skip
    assert _fit(['abc', 'de', 'f'], 7) == 'abc  de' and _fit(['abcdef', 'g'], 3) == 'abc'


@pytest.mark.parametrize(
    ('module', 'options', 'message'),
    [
        ('torch.utils.tensorboard', {'tensorboard': True}, 'pip install tensorboard'),
        ('wandb', {'wandb': True}, "pip install 'wandb"),
    ],
)
def test_a_missing_library_says_what_to_type(tmp_path, monkeypatch, module, options, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        make(tmp_path, **options)


def test_tensorboard_over_images_with_resume(tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    with make(tmp_path, tensorboard=True) as log:
        log.step(step=5, epoch=0, **STEP, extra=7)
        log.epoch(row(0, val_pgd_acc=0.5, max_curvature=float('inf'), note=None))
        log.step(step=15, epoch=1, **{**STEP, 'loss': float('nan')})
        log.epoch(row(1))  # then it is killed, and resumed from the first epoch
    with make(tmp_path, tensorboard=True, history=[row(0)]) as log:
        log.step(step=15, epoch=1, **{**STEP, 'loss': 1.5})
        log.step(step=16, epoch=1, **STEP, images=5000)
    events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    assert read['train/loss'] == [(640, pytest.approx(1.8)), (1920, 1.5), (5000, pytest.approx(1.8))]
    assert read['epoch/train_loss'] == [(1280, 2.0)] and read['val/pgd_acc'] == [(1280, 0.5)]
    assert read['epoch/max_curvature'] == [(1280, float('inf'))] and read['train/extra'] == [(640, 7)]
    assert not {'epoch/note', 'epoch/epoch', 'epoch/images'} & set(read)
    text = events.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()
    assert '"model": "resnet18_pssilu"' in text


def test_wandb_offline_with_resume(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    for name in ('WANDB_CACHE_DIR', 'WANDB_CONFIG_DIR', 'WANDB_DATA_DIR'):
        monkeypatch.setenv(name, str(tmp_path / 'wandb_home'))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('WANDB_PROJECT', 'a-project')
    with make(tmp_path, wandb=True, wandb_name='a-run-name') as log:
        log.step(step=5, epoch=0, **{**STEP, 'loss': float('nan')})
        log.epoch(row(0, val_pgd_acc=0.5, max_curvature=float('inf')))
    first = (tmp_path / 'wandb_id.txt').read_text().strip()
    with make(tmp_path, wandb=True, history=log.history) as log:
        log.epoch(row(1))
    assert (tmp_path / 'wandb_id.txt').read_text().strip() == first
    make(tmp_path, wandb=True).close()  # a fresh start in the same folder is another run
    assert (tmp_path / 'wandb_id.txt').read_text().strip() != first
    files = sorted((tmp_path / 'wandb').glob(f'offline-run-*/run-{first}.wandb'))
    data = b''.join(file.read_bytes() for file in files)
    for word in (
        b'a-project',
        b'a-run-name',
        b'resnet18_pssilu',
        b'train/loss',
        b'val/pgd_acc',
        b'epoch/max_curvature',
    ):
        assert word in data
    for word in sys.argv[1:]:
        assert len(word) < 5 or os.fsencode(word) not in data


def test_wandb_that_does_not_start_says_what_to_type(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')

    def init(**_):
        raise wandb.errors.UsageError('No API key configured.')

    monkeypatch.setattr(wandb, 'init', init)
    with pytest.raises(OSError, match=r'No API key configured; type: wandb login, or set WANDB_MODE=offline'):
        make(tmp_path, wandb=True)
