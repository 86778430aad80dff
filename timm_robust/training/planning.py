"""What a run will take, told before it starts: time, memory, images and device-hours."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from ..data import StreamData
from ..precision import fastest_convolutions
from .advice import images_per_class
from .run import Run, training_batch
from .warmup import Timing, pays, reserve, saving_seconds, synchronise, warm_up


def plan(run: Run, steps: int = 5) -> dict[str, Any]:
    """Measure a few steps, and tell time, memory, images and device-hours of the whole run before it starts.

    The run itself is spent: build it anew to train.
    """
    recipe, batch = run.recipe, run.recipe.batch_size * run.world.size
    start_up = run.clock.elapsed()
    with fastest_convolutions(run.world.device):
        timing = warm_up(run)
        if pays(run) or recipe.torchcompile:
            start_up = run.clock.elapsed()
        loader = _loader_seconds(run)
        steps_of = {share: max(_step_seconds(run, share, steps), loader) for share in timing.steps}
        timing = Timing(steps_of, timing.validation)
    saving = saving_seconds(run)
    ends = [*list(timing.steps)[1:], 1.0]  # of the part of the run that each kind of step holds for
    parts = {share: end - share for share, end in zip(timing.steps, ends, strict=True)}
    if run.clock.budget is None:  # parts of the steps
        step_seconds = sum(part * timing.steps[share] for share, part in parts.items())
    else:  # parts of the time
        step_seconds = 1 / sum(part / timing.steps[share] for share, part in parts.items())
    per_epoch = run.batches.steps_per_epoch * step_seconds
    if run.clock.budget is not None:
        reserve(run, timing, saving)
        total = run.clock.budget
        epochs = run.clock.training_seconds(start_up) / per_epoch
    else:
        epochs = run.total_steps / run.batches.steps_per_epoch
        saves = max(epochs / recipe.val_interval, 1)  # no other epoch is saved
        validations = 1 if run.held_out is None else saves  # then at the end, of the average
        total = start_up + epochs * per_epoch + validations * timing.validation + saves * saving
    sides = {recipe.side_at(share): seconds for share, seconds in timing.steps.items() if recipe.stages}
    counts = images_per_class(run.batches.data)
    images = round(epochs * run.batches.steps_per_epoch) * batch
    return {
        'model': run.recipe.model,
        'images_per_s': batch / step_seconds,
        **{f'images_per_s_at_{side}': batch / seconds for side, seconds in sides.items()},
        'step_ms': 1e3 * step_seconds,
        'start_up_s': start_up,
        'validation_s': timing.validation,
        'saving_s': saving,
        'epochs': epochs,
        'images': images,
        **({} if counts is None else {'least_images_per_class': int(counts.min())}),
        'parameters': sum(parameter.numel() for parameter in run.model.parameters()),
        'hours': total / 3600,
        'device_hours': total / 3600 * run.world.size,
        'peak_memory_gib': _peak_memory(run.world.device) / 2**30,
        'devices': run.world.size,
    }


def _step_seconds(run: Run, share: float, steps: int) -> float:
    """Mean duration of a training step at this share of the run, with the making of its batch."""
    run.side = run.recipe.side_at(share)
    for number in range(steps + 2):
        if number == 2:
            synchronise(run.world.device)
            started = time.perf_counter()
        x, y = training_batch(run, number)
        run.train_step(x, y, number, share)
    synchronise(run.world.device)
    return (time.perf_counter() - started) / steps


def _loader_seconds(run: Run) -> float:
    """Seconds between batches of a stream that nothing but its worker processes hold up; 0 for data in memory.

    The first batches of all of them are read at the same time, so that a few steps would not wait for any.
    """
    if not isinstance(run.batches.data, StreamData):
        return 0.0
    workers = max(run.batches.data.readers, 1)
    training_batch(run, 0)
    started = time.perf_counter()
    for number in range(1, 2 * workers):
        training_batch(run, number)
    return (time.perf_counter() - started) / workers


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
