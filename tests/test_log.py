import csv
import logging
import os
import struct
import sys

import pytest

from timm_robust.training.log import RunLog, _duration, _fit

CONFIG = {
    'model': 'resnet18_pssilu',
    'batch_size': 128,
    'model_kwargs': {'width': 0.5},
}


def row(epoch, **more):
    step = 10 * (epoch + 1)
    return {'epoch': epoch, 'step': step, 'images': 128 * step, 'train_loss': 2.0 - epoch, 'seconds': 3700.0} | more


def part(step, epoch=0, **more):
    """An epoch's numbers up to this step."""
    numbers = {'train_loss': 1.8, 'train_acc': 0.25, 'lr': 0.1, 'images_per_s': 312.0}
    return {'epoch': epoch, 'step': step, 'images': 128 * step} | numbers | more


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
    history = [row(0), row(1, val_pgd_acc=0.512, val_clean_acc=0.75)]
    history.append(row(2, val_pgd_acc=float('nan'), max_curvature=float('inf')))
    with make(tmp_path / 'new' / 'run') as log:
        for n in (1, 2, 3):
            log.epoch(history[:n])
            assert len(table(log.folder)) == n
    rows = table(log.folder)
    start = ['epoch', 'step', 'images', 'train_loss', 'seconds']
    assert list(rows[0]) == [*start, 'val_pgd_acc', 'val_clean_acc', 'max_curvature']
    assert [r['val_pgd_acc'] for r in rows] == ['', '0.512', 'nan']
    assert [r['val_clean_acc'] for r in rows] == ['', '0.75', '']
    assert rows[1]['max_curvature'] == '' and rows[2]['max_curvature'] == 'inf'
    assert [p.name for p in log.folder.iterdir()] == ['summary.csv']
    assert caplog.messages[1] == (
        'epoch 1 done  step 20/30  train loss 1.0000  time 1:01:40  val PGD acc 51.20 %  val clean acc 75.00 %'
    )


def test_resume_restores_summary_at_once(tmp_path):
    (tmp_path / 'summary.csv').write_text('half a r')
    with make(tmp_path, history=[row(0), row(1)]):
        assert [r['epoch'] for r in table(tmp_path)] == ['0', '1']


def test_other_ranks_are_quiet(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, 'timm_robust')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with make(tmp_path / 'run', rank=1, tensorboard=True, wandb=True) as log:
        log.step(part(5), 4000.0)
        log.epoch([row(0)])
    assert not caplog.messages and not sys.stderr.writes and not (tmp_path / 'run').exists()


def test_progress_is_a_plain_line_without_a_terminal(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, 'timm_robust')
    with make(tmp_path) as log:
        log.step(part(5), 4000.0)
        log.step(part(6, train_loss=float('nan')), float('inf'))
    assert caplog.messages[0] == (
        'epoch 0  step 5/30 (16 %)  loss 1.8000  acc 25.00 %  1:06:40 left  lr 0.1  312 images/s'
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
        log.step(part(5, epoch=10), 4000.0)
        log.step(part(6), 4.0)
        assert len(terminal.lines) == 1 and len(terminal.writes) == 2  # each in one piece: no flicker
        assert terminal.lines[0].rstrip() == 'epoch 0  step 6/30 (20 %)  loss 1.8000  acc 25.00 %  0:00:04 left  lr 0.1'
        logging.getLogger('timm_robust.checkpoint').warning('careful')  # other lines take its place
        assert [line.rstrip() for line in terminal.lines] == ['careful', '']
        log.step(part(7), 4000.0)
        log.epoch([row(0)])
        log.step(part(8, epoch=1), 4000.0)
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
        with make(tmp_path) as log:
            log.step(part(5), 4000.0)
            log.step(part(6), 4000.0)
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
        log.step(part(5), 4000.0)
        log.epoch([row(0, val_pgd_acc=0.5, max_curvature=float('inf'))])
        log.step(part(15, epoch=1, train_loss=float('nan')), 4000.0)
        log.epoch([row(0), row(1)])  # then it is killed, and resumed from the first epoch
    with make(tmp_path, tensorboard=True, history=[row(0)], images=1280) as log:
        log.step(part(15, epoch=1, train_loss=1.5), 4000.0)
    events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    assert read['train/loss'] == [(640, pytest.approx(1.8)), (1920, 1.5)]
    assert read['epoch/train_loss'] == [(1280, 2.0)] and read['val/pgd_acc'] == [(1280, 0.5)]
    assert read['epoch/max_curvature'] == [(1280, float('inf'))]
    assert not {'epoch/epoch', 'epoch/images'} & set(read)
    text = events.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()
    assert '"model": "resnet18_pssilu"' in text


def test_wandb_offline_with_resume(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    for name in ('WANDB_CACHE_DIR', 'WANDB_CONFIG_DIR', 'WANDB_DATA_DIR'):
        monkeypatch.setenv(name, str(tmp_path / 'wandb_home'))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('WANDB_PROJECT', 'a-project')
    folder, history = tmp_path / 'a-run-name', [row(0, val_pgd_acc=0.5, max_curvature=float('inf'))]
    with make(folder, wandb=True) as log:
        log.step(part(5, train_loss=float('nan')), 4000.0)
        log.epoch(history)
    first = (folder / 'wandb_id.txt').read_text().strip()
    with make(folder, wandb=True, history=history, images=1280) as log:
        log.epoch([*history, row(1)])
    assert (folder / 'wandb_id.txt').read_text().strip() == first
    with make(folder, wandb=True):  # a fresh start in the same folder is another run
        assert (folder / 'wandb_id.txt').read_text().strip() != first
    files = sorted((folder / 'wandb').glob(f'offline-run-*/run-{first}.wandb'))
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
