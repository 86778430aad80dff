"""A small run on digits, and what disturbs it, for the tests of training."""

import dataclasses

import numpy as np
import torch
from PIL import Image

from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.training import loop as engine
from timm_robust.training.recipe import Recipe

TINY = Recipe(
    model='resnet18_pssilu',
    model_kwargs={'width': 4},
    dataset='digits',
    train_split='test',  # a quarter of the images
    val_size=50,
    crop_padding=1,
    hflip=0.0,
    eps=0.1,
    steps=1,
    eval_steps=2,
    epochs=3,
    max_steps=7,
    batch_size=100,
    lr=0.05,
    warmup_epochs=1.0,
    model_ema=True,
    model_ema_decay=0.9,
    experiment='run',
    log_interval=2,
)


def tiny(folder, **changes):
    if 'dataset' in changes:
        changes = {'train_split': 'train', **changes}
    return dataclasses.replace(TINY, output=str(folder), **changes)


def weights(folder, name='last.pth.tar'):
    state = load_checkpoint(folder / 'run' / name)
    return {f'{part}.{k}': v for part in ('state_dict', 'state_dict_ema') for k, v in state[part].items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def draw_pictures(folder, classes=('ant', 'bee', 'cat'), n=10, side=32):
    """Pictures of one colour a class, with noise: what a network learns in a few steps."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        for index in range(n):
            pixels = rng.integers(0, 90, (side, side, 3), dtype=np.uint8)
            pixels[..., number % 3] += 160
            path = folder / name / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


class Killed(Exception):
    pass


def tap_batches(run, tap):
    """Let tap(batches, number) hand out the run's batches."""
    batches = run.batches

    class Tapped:
        steps_per_epoch, data = batches.steps_per_epoch, batches.data

        def __getitem__(self, number):
            return tap(batches, number)

    run.batches = Tapped()


def tap_steps(run, tap):
    """Let tap(take, x, y, number, progress) take the run's steps; take is the train step."""
    take = run.train_step

    class Tapped:
        def __getattr__(self, name):
            return getattr(take, name)

        def __call__(self, *args):
            return tap(take, *args)

    run.train_step = Tapped()


def killed_at(step, run):
    """The run, which will fail before it takes this step."""

    def fail(batches, number):
        if number == step:
            raise Killed
        return batches[number]

    tap_batches(run, fail)
    return run


def signalled_at(step, run):
    """The run, which will be asked to stop in this step."""

    def stop(take, x, y, number, progress):
        run.stop = number == step
        return take(x, y, number, progress)

    tap_steps(run, stop)
    return run


def end_behind_epoch(run, last, monkeypatch):
    """Let the budget of a run end just behind this epoch."""
    done, finish_epoch = [0.5], engine.finish_epoch
    run.clock.progress = lambda step: done[0]

    def finish_slowly(run, row, log, **how):
        finish_epoch(run, row, log, **how)
        if row['epoch'] == last:
            done[0] = 1.0

    monkeypatch.setattr(engine, 'finish_epoch', finish_slowly)
