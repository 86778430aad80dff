import contextlib
import itertools
import math
import sys

import pytest
import torch
import warm

from timm_robust.plots import _best, _names, adversarial_figure, main, read_run, run_figure
from timm_robust.threat_model import ThreatModel
from timm_robust.training.log import RunLog

figure_module = pytest.importorskip('matplotlib.figure')
PNG = b'\x89PNG'


def rows(n=6, images=50_000, **more):
    return [
        {
            'epoch': e,
            'images': images * (e + 1),
            'train_loss': 2 - e / n,
            'lr': 0.1,
            'val_pgd_acc': 0.3 + 0.1 * (e == 3),
        }
        | {key: value(e) for key, value in more.items()}
        for e in range(n)
    ]


@pytest.fixture
def run(tmp_path):
    with RunLog(tmp_path / 'out' / 'run', config={}, total_steps=6) as log:
        history = rows(val_clean_acc=lambda e: 0.5 + e / 20 if e % 2 else None, max_curvature=lambda e: math.inf)
        log.epoch([{'step': row['epoch'] + 1, **row} for row in history])
    return log.folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, 'savefig', lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))
    )
    return figures


def labels(figure):
    return [axis.get_ylabel() for axis in figure.axes]


def test_a_panel_for_each_quantity_with_numbers(tmp_path, drawn):
    run_figure(tmp_path / 'a.png', {'relu': rows(), 'pssilu': rows(alpha=lambda e: 1.0, images=400_000)})
    (figure,) = drawn
    assert (tmp_path / 'a.png').read_bytes()[:4] == PNG
    assert labels(figure) == ['training loss', 'PGD accuracy, held out (%)', 'learning rate', r'activation $\alpha$']
    assert figure.axes[-1].get_xlabel() == 'training images seen (millions)'
    lines = [line for line in figure.axes[1].lines if len(line.get_xdata()) > 1]
    assert [line.get_color() for line in lines] == ['#0072B2', '#D55E00']
    assert lines[1].get_xdata()[-1] == 2.4 and lines[0].get_ydata()[3] == 40
    stars = [line for line in figure.axes[1].lines if line.get_marker() == '*']
    assert [(star.get_xdata()[0], star.get_ydata()[0]) for star in stars] == [(0.2, 40), (1.6, 40)]
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ['relu (PGD 40.0 %, epoch 3)', 'pssilu (PGD 40.0 %, epoch 3)', 'best epoch']


def test_gaps_are_skipped_and_infinities_break_the_line(run, drawn):
    main([str(run)])
    assert 'clean accuracy, held out (%)' in labels(drawn[0]) and not any('curvature' in t for t in labels(drawn[0]))
    line = drawn[0].axes[1].lines[0]
    assert list(line.get_xdata()) == [100, 200, 300] and list(line.get_ydata()) == pytest.approx([55, 65, 75])
    run_figure(run / 'b.png', {'run': rows(max_curvature=lambda e: math.inf if e == 1 else 2.0)})
    assert [math.isnan(y) for y in drawn[1].axes[-1].lines[0].get_ydata()] == [False, True] + 4 * [False]


def test_beta_over_orders_of_magnitude_is_logarithmic(tmp_path, drawn):
    run_figure(tmp_path / 'a.png', {'run': rows(beta=lambda e: 10.0 ** (e - 8))})
    run_figure(tmp_path / 'a.png', {'run': rows(beta=lambda e: 0.1 * e)})
    assert [figure.axes[-1].get_yscale() for figure in drawn] == ['log', 'linear']


@pytest.mark.parametrize(('suffix', 'start'), [('png', PNG), ('pdf', b'%PDF'), ('svg', b'<?xm')])
def test_odd_names_many_runs_and_formats(tmp_path, suffix, start):
    names = ['_hidden', 'cash $x$ $', 'long' * 40, *map(str, range(8))]
    run_figure(tmp_path / f'a.{suffix}', {name: rows(1) for name in names})
    assert (tmp_path / f'a.{suffix}').read_bytes()[:4] == start


def test_best_epoch():
    assert _best(rows(), 'val_pgd_acc')['epoch'] == 3
    tie = [{'val_pgd_acc': a, 'val_clean_acc': b} for a, b in ((None, 0.9), (0.2, 0.1), (math.nan, 0.8), (0.2, 1.0))]
    assert _best(tie, 'val_pgd_acc')['epoch'] == 1 and _best(tie, 'val_clean_acc')['epoch'] == 3
    assert _best([{'val_clean_acc': 0.5}], 'val_pgd_acc')['metric'] == 'val_clean_acc'
    assert _best([{'train_loss': 1.0}], 'val_pgd_acc') == {}
    sides = [{'epoch': n, 'side': side, 'val_pgd_acc': acc} for n, (side, acc) in enumerate(((24, 0.9), (32, 0.5)))]
    assert _best(sides, 'val_pgd_acc')['epoch'] == 1  # smaller images are another task


def test_clean_training_is_best_in_clean_accuracy(run, drawn):
    (run / 'args.yaml').write_text('model: x\nloss: clean\n')
    main([str(run)])
    assert drawn[0].legends[0].get_texts()[0].get_text() == 'run (clean 75.0 %, epoch 5)'


def test_names_tell_runs_apart(tmp_path):
    a, b, c = tmp_path / 'a/run', tmp_path / 'b/run', tmp_path / 'c'
    assert list(_names([a, c])) == ['run', 'c']
    assert list(_names([a, b, a])) == ['a/run', 'b/run']


def test_command_line(run, tmp_path, capsys):
    main([str(run)])
    assert capsys.readouterr().out == f'{run / "plots.png"}\n' and (run / 'plots.png').read_bytes()[:4] == PNG
    main([str(run), f'{run}/', '-o', str(tmp_path / 'two.pdf')])
    assert capsys.readouterr().out == f'{tmp_path / "two.pdf"}\n'
    assert read_run(run)[0]['val_clean_acc'] is None and read_run(run)[5]['val_clean_acc'] == 0.75


def test_as_a_module(run):
    done = warm.run(['-m', 'timm_robust.plots', run.parent])
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert done.stderr.startswith('error: run ') and 'holds no summary.csv; it holds run/' in done.stderr


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'holds no row'),
        ('epoch,images\n', 'holds no row'),
        ('epoch,images,train_loss\n0,128,1.5\n1,256,oops\n', "summary.csv:3: cannot read 'oops' (column 'train_loss')"),
        ('epoch,images\n0,128,7\n', "cannot read ['7'] (more cells than the header has columns)"),
        ('epoch,train_loss\n0,1.5\n', 'has a train_loss without images, the x axis; its columns: epoch, train_loss'),
        ('epoch,images\n0,128\n', 'nothing to draw'),
        (b'\xff\xfe\x00', 'is not a table'),
    ],
)
def test_bad_tables_are_one_line_and_status_2(tmp_path, capsys, text, message):
    (tmp_path / 'summary.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    status = main([str(tmp_path)])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith('error: ') and error.count('\n') == 1 and message in error
    assert not (tmp_path / 'plots.png').exists()


def test_bad_arguments(run, tmp_path, capsys):
    for argv, message in (
        ([str(tmp_path / 'nix')], f'nix is not a folder; {tmp_path} holds out/'),
        ([str(run), '-o', str(tmp_path)], 'is a folder; name a file there'),
        ([str(run), '-o', str(tmp_path / 'a.xyz')], "Format 'xyz' is not supported"),
        ([str(run), '-o', str(tmp_path / 'no' / 'a.png')], 'mkdir -p'),
    ):
        status = main(argv)
        error = capsys.readouterr().err
        assert status == 2 and error.count('\n') == 1 and message in error


def test_nothing_to_draw_and_no_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='no run has a number in train_loss'):
        run_figure(tmp_path / 'a.png', {})
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match='pip install matplotlib'):
        run_figure(tmp_path / 'a.png', {'run': rows()})


@pytest.mark.parametrize(('norm', 'channels', 'magnified'), [('Linf', 3, 5), ('L2', 1, 10)])
def test_the_adversarial_figure_names_every_image_and_no_two_names_touch(tmp_path, drawn, norm, channels, magnified):
    x, y = torch.rand(3, channels, 8, 8) / 2, torch.tensor([0, 1, 1])
    broken = torch.cat([x[:1] + 0.05, x[1:]])
    attempts = {
        'resnet18_pssilu.fgsm_cifar10_linf': (broken, torch.tensor([1, 1, 0])),
        'resnet18_relu.trades_cifar10_linf': (x, y),
    }
    adversarial_figure(tmp_path / 'a.png', x, y, attempts, ['automobile', 'airplane'], ThreatModel(norm, 0.1))
    assert (tmp_path / 'a.png').read_bytes()[:4] == PNG
    (figure,) = drawn
    panels = [part.get_axes() for part in figure.subfigs]
    titles = [[axes.get_title() for axes in part] for part in panels]
    assert titles == [
        ['automobile', 'airplane', 'airplane'],
        ['airplane', f'perturbation x {magnified}', 'airplane', 'resists', 'automobile', 'wrong unattacked'],
        ['automobile', 'resists', 'airplane', 'resists', 'airplane', 'resists'],
    ]
    shown = [axes.title for part in panels for axes in part] + [part._suptitle for part in (figure, *figure.subfigs)]
    boxes = [text.get_window_extent() for text in shown]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def half(self, target, **options):
        with contextlib.nullcontext(target) if hasattr(target, 'write') else open(target, 'wb') as file:
            file.write(b'half')
        raise KeyboardInterrupt

    (tmp_path / 'a.png').write_text('old')
    x, y = torch.rand(1, 3, 8, 8), torch.tensor([0])
    monkeypatch.setattr(figure_module.Figure, 'savefig', half)
    with pytest.raises(KeyboardInterrupt):
        adversarial_figure(tmp_path / 'a.png', x, y, {'net': (x, y)}, ['cat'], ThreatModel())
    assert (tmp_path / 'a.png').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
