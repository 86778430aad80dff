"""Before the first step: compile what will run, let cuDNN choose its algorithms, and learn how long things take.

Under a budget this keeps compilation out of the schedule; without one, what does not compile shows at once, not when
the attack changes in the middle of the run.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..activations import has_kernels
from ..data import StreamData
from ..pixels import resized
from .batches import image_shape
from .run import Run
from .state import save
from .validation import reestimation_batches, validate


@dataclass(frozen=True)
class Timing:
    """How long the parts of a run take, in seconds.

    Args:
        steps: share of the run -> a training step from there on.
        validation: a whole validation of the last stage, with the re-estimation of batch norm.
    """

    steps: dict[float, float]
    validation: float


def pays(run: Run) -> bool:
    """Whether a run begins with a warm-up; kernels of activations alone, on a CPU, are compiled when it is built."""
    compiles = run.recipe.torchcompile and not (run.world.device.type == 'cpu' and has_kernels(run.model, 'cpu'))
    return run.recipe.budget is not None or compiles


def warm_up(run: Run) -> Timing:
    """Take one training step of each kind and validate one batch of each size, twice where the first is slower.

    This leaves no trace in the run.
    """
    recipe, device = run.recipe, run.world.device
    twice = recipe.torchcompile or device.type == 'cuda'
    data, generator = run.batches.data, torch.Generator().manual_seed(0)
    x = torch.rand(recipe.batch_size, *image_shape(data), generator=generator).to(device)
    y = (torch.arange(recipe.batch_size) % data.num_classes).to(device)
    steps, validation = {}, 0.0
    with untouched(run):
        for share in recipe.turning_points:
            run.side = recipe.side_at(share)
            for _ in range(1 + twice):
                started = time.perf_counter()
                run.train_step(resized(x, run.side), y, run.step, share)
                synchronise(device)
                steps[share] = run.world.max(time.perf_counter() - started)
        if run.held_out is not None:
            if isinstance(run.held_out, StreamData):
                part = run.held_out.probe(recipe.batch_size).in_memory()
                reading = reading_seconds(run.held_out, recipe.batch_size)
            else:
                part, reading = run.held_out.first(min(recipe.batch_size, len(run.held_out))), 0.0
            for side in dict.fromkeys(recipe.side_at(share) for share in steps):
                run.side = side
                for _ in range(1 + twice):
                    started = time.perf_counter()
                    validate(run, part)
                    validation = (time.perf_counter() - started) * len(run.held_out) / len(part)
            # worker processes read while the network computes
            beside = isinstance(run.held_out, StreamData) and run.held_out.readers > 0
            validation = run.world.max(max(validation, reading) if beside else validation + reading)
        if run.ema is not None:  # at most: a step does more
            validation += reestimation_batches(run, recipe.ema_bn_batches) * max(steps.values())
    return Timing(steps, validation)


def reading_seconds(data: StreamData, batch_size: int) -> float:
    """How long one pass takes that does nothing but read, from two rounds of batches of all worker processes.

    The first batch needs start-up and one round, whatever follows one round after the other.
    """
    rounds = len(data) / (batch_size * max(data.readers, 1))
    part = data.probe(2 * batch_size * max(data.readers, 1))
    timed = len(part) / (batch_size * max(part.readers, 1))  # one process reads the first of what has no numbers
    first, started = 0.0, time.perf_counter()
    for _ in part.batches(batch_size):
        first = first or time.perf_counter() - started
    total = time.perf_counter() - started
    if len(part) == len(data) or timed <= 1:
        return total
    return first + (total - first) / (timed - 1) * max(rounds - 1, 0.0)


def reserve(run: Run, timing: Timing, saving: float) -> None:
    """Tell the clock what a budget must leave time for."""
    in_flight = run.recipe.log_interval if run.world.device.type == 'cuda' else 1  # a GPU is waited for at a log line
    run.clock.last_step = in_flight * max(timing.steps.values())
    run.clock.expect(timing.validation, saving, training_interval(run) * timing.steps[0.0])


def training_interval(run: Run) -> int:
    """Steps from one validation to the next."""
    return run.batches.steps_per_epoch * (1 if run.held_out is None else run.recipe.val_interval)


def saving_seconds(run: Run) -> float:
    """What saving an epoch takes: it is done once, in a folder of its own, which is deleted."""
    folder = run.folder
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix='.saving-', dir=place) as probe:
        run.folder, started = Path(probe), time.perf_counter()
        try:
            save(run, 0, is_best=True)
            run.writer.wait()
            return run.world.max(time.perf_counter() - started)
        finally:
            run.folder = folder


@contextmanager
def untouched(run: Run) -> Iterator[None]:
    """Whatever the body does to weights, statistics, average, optimizer and random numbers is undone."""
    optimizer = run.train_step.optimizer
    nets = [run.model] if run.ema is None else [run.model, run.ema.module]
    weights = [{key: value.clone() for key, value in net.state_dict().items()} for net in nets]
    moments, numbers = copy.deepcopy(optimizer.state_dict()), np.random.get_state()
    devices, side = [run.world.device] if run.world.device.type == 'cuda' else [], run.side
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numbers)
        run.side = side
        for net, kept in zip(nets, weights, strict=True):
            net.load_state_dict(kept)
        optimizer.load_state_dict(moments)
        optimizer.zero_grad(set_to_none=True)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
