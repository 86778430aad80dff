"""Where the numbers of a run go: summary.csv, a live progress line, TensorBoard and wandb.

Accuracies are fractions in [0, 1]; the x axis of TensorBoard and wandb is the number of training images seen. What
leaves the machine (the config) carries no secrets and no machine paths.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text

logger = logging.getLogger('timm_robust')
Row = Mapping[str, Any]
"""An epoch's numbers by name; 'epoch', 'step' and 'images' seen are among them."""


class RunLog:
    """Where a run's numbers go: summary.csv, a live progress line, TensorBoard, wandb. Quiet on ranks > 0.

    It is a context manager, which leaves the terminal on a fresh line and finishes TensorBoard and wandb.

    Args:
        folder: the run's folder; it gets summary.csv, tensorboard/ and wandb/ with wandb_id.txt.
        config: the settings, for TensorBoard and wandb: those that may be public.
        total_steps: steps of the whole schedule.
        tensorboard: write TensorBoard events.
        wandb: log to wandb, in the project of WANDB_PROJECT or 'timm-robust'; WANDB_MODE=offline keeps it here.
        rank: of this process; above 0 nothing is written or shown.
        history: rows of the run that is resumed: summary.csv is whole again.
        images: that it has seen: TensorBoard drops what came after them, and wandb goes on with the run of
            wandb_id.txt.

    Raises:
        ImportError: if tensorboard or wandb is missing, with what to type.
        OSError: if wandb does not start, for example for want of an API key.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: dict[str, Any],
        total_steps: int,
        tensorboard: bool = False,
        wandb: bool = False,
        rank: int = 0,
        history: Sequence[Row] = (),
        images: int = 0,
    ) -> None:
        self.folder, self.config, self.total_steps, self.rank = folder, config, total_steps, rank
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._stream, self._shown = sys.stderr, ''
        self._handlers: list[logging.Handler] = []
        if rank > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if history:
            self._write_summary(history)
        if tensorboard:
            self._tensorboard = self._open_tensorboard(images + 1 if images else 0)
        if wandb:
            self._wandb = self._open_wandb(resumed=images > 0)
        self._handlers = [*logging.getLogger().handlers, *logger.handlers]
        for handler in self._handlers:
            handler.addFilter(self._wipe)

    def step(self, row: Row, seconds_left: float) -> None:
        """Show how far the run is, and write train/* to TensorBoard and wandb; call it once every so many steps.

        Args:
            row: the present epoch's numbers so far.
            seconds_left: estimated time to the end.
        """
        if self.rank > 0:
            return
        keys = ('train_loss', 'train_acc', 'lr', 'images_per_s')
        values = {key.removeprefix('train_'): row[key] for key in keys}
        self._scalars({f'train/{key}': value for key, value in values.items()}, row['images'])
        loss, acc, *rest = (_entry(*entry) for entry in values.items())
        step = f'step {row["step"]}/{self.total_steps} ({100 * row["step"] // self.total_steps} %)'
        parts = [f'epoch {row["epoch"]}', step, loss, acc, f'{_duration(seconds_left)} left', *rest]
        if not (self._stream.isatty() and os.environ.get('TERM') != 'dumb' and logger.isEnabledFor(logging.INFO)):
            logger.info('%s', '  '.join(parts))
            return
        width = _width(self._stream)
        text = _fit(parts, width)
        self._show('\r' + text.ljust(min(len(self._shown), width)), text)

    def epoch(self, history: Sequence[Row]) -> None:
        """Write the rows to summary.csv, log the last one as a line, and write it to TensorBoard and wandb."""
        if self.rank > 0:
            return
        self._write_summary(history)
        row = history[-1]
        skip = ('epoch', 'step', 'images')
        names = {key: f'val/{key[4:]}' if key.startswith('val_') else f'epoch/{key}' for key in row if key not in skip}
        self._scalars({name: row[key] for key, name in names.items()}, row['images'])
        if self._tensorboard is not None:
            self._tensorboard.flush()
        parts = [f'epoch {row["epoch"]} done', f'step {row["step"]}/{self.total_steps}']
        logger.info('%s', '  '.join(parts + [_entry(key, row[key]) for key in names]))

    def __enter__(self) -> RunLog:
        """The log itself."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close it; an exception marks the run as failed in wandb."""
        for handler in self._handlers:
            handler.removeFilter(self._wipe)
        if self._shown:
            self._show('\n', '')
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))

    def _open_tensorboard(self, first: int) -> Any:
        """An event file of its own in tensorboard/ that hides what older ones there say from so many images on."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('TensorBoard logging needs tensorboard; type: pip install tensorboard') from error
        writer = SummaryWriter(str(self.folder / 'tensorboard'), purge_step=first)
        writer.add_text('config', f'```json\n{json.dumps(self.config, indent=2, default=str)}\n```', first)
        return writer

    def _open_wandb(self, resumed: bool) -> Any:
        """The run of wandb_id.txt where this one is resumed, else a new one, noted there."""
        try:
            import wandb
        except ImportError as error:
            raise ImportError("wandb logging needs wandb; type: pip install 'wandb>=0.19'") from error
        file = self.folder / 'wandb_id.txt'
        stored = file.read_text().strip() or None if resumed and file.is_file() else None
        try:
            run = wandb.init(
                project=os.environ.get('WANDB_PROJECT') or 'timm-robust',
                name=self.folder.resolve().name,
                dir=str(self.folder),
                config=self.config,
                id=stored,
                resume='allow' if stored else None,
                # no command line, host, user, git remote or copy of the terminal
                settings=wandb.Settings(
                    console='off', disable_git=True, disable_code=True, host='', x_disable_meta=True
                ),
            )
        except wandb.errors.Error as error:
            why = str(error).rstrip('.')
            hint = 'type: wandb login, or set WANDB_MODE=offline to log on this machine only'
            raise OSError(f'wandb did not start: {why}; {hint}') from error
        run.define_metric('images')
        run.define_metric('*', step_metric='images')
        write_text(file, f'{run.id}\n')
        return run

    def _scalars(self, values: Mapping[str, float], images: int) -> None:
        """Write the values to TensorBoard and wandb at x = images."""
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, images)
        if self._wandb is not None:
            self._wandb.log({**values, 'images': images})

    def _write_summary(self, history: Sequence[Row]) -> None:
        """summary.csv anew: never half a row; columns in the order they first came up."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in history for key in row)))
        writer.writeheader()
        writer.writerows(history)
        write_text(self.folder / 'summary.csv', text.getvalue())

    def _wipe(self, record: logging.LogRecord) -> bool:
        """A filter of the log handlers that passes everything: the live line makes room for what is logged."""
        if self._shown:
            self._show('\r' + ' ' * len(self._shown) + '\r', '')
        return True

    def _show(self, output: str, shown: str) -> None:
        """Write to the terminal, in one piece, and note what its last line now says."""
        self._shown = shown
        with contextlib.suppress(OSError):  # the terminal was closed; the run saves, and ends
            self._stream.write(output)
            self._stream.flush()


def _entry(key: str, value: float) -> str:
    """A number for people: 'val PGD acc 51.20 %', '312 images/s', 'time 1:02:03', 'alpha 1.02'."""
    if key == 'images_per_s':
        return f'{value:.0f} images/s' if value >= 100 else f'{value:.3g} images/s'
    if key == 'seconds':
        return f'time {_duration(value)}'
    label = key.replace('pgd', 'PGD').replace('_', ' ')
    if key.endswith('acc') and math.isfinite(value):
        return f'{label} {100 * value:.2f} %'
    return f'{label} {value:.4f}' if key.endswith('loss') and abs(value) < 1e4 else f'{label} {value:.4g}'


def _duration(seconds: float) -> str:
    """h:mm:ss, '?' for what is no time."""
    if not math.isfinite(seconds) or seconds < 0:
        return '?'
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{rest:02d}'


def _width(stream: Any) -> int:
    """Columns of the terminal that a line may take; the last stays free, lest the line wrap."""
    try:
        return (os.get_terminal_size(stream.fileno()).columns or 80) - 1
    except (OSError, ValueError):
        return 79


def _fit(parts: list[str], width: int) -> str:
    """The parts on one line; the last ones go where they do not fit."""
    while len(parts) > 1 and len('  '.join(parts)) > width:
        parts = parts[:-1]
    return '  '.join(parts)[:width]
