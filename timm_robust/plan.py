"""What a run will take, told before it starts: time, memory, images and device-hours."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from .run import Run
from .validation import closing_seconds


def plan(run: Run, steps: int = 5) -> dict[str, Any]:
    """Measure a few steps, and tell time, memory, images and device-hours of the whole run before it starts.

    The run itself is spent: build it anew to train.
    """
    device, batch = run.world.device, run.recipe.batch_size * run.world.size
    recipe = run.recipe
    starts = [recipe.late_start] * (recipe.late_steps is not None) + [recipe.awp_start] * bool(recipe.awp_gamma)
    share = min(starts, default=1.0)  # from here on steps are taken as dear as the last ones
    seconds = {}
    for at in sorted({0.0, 1.0 if share < 1 else 0.0}):
        for number in range(steps + 2):
            if number == 2:
                _synchronise(device)
                started = time.perf_counter()
            x, y = run.batches[number]
            run.train_step(x, y, number, at)
        _synchronise(device)
        seconds[at] = (time.perf_counter() - started) / steps
    step_seconds = seconds[0.0] * share + seconds.get(1.0, seconds[0.0]) * (1 - share)
    validation = closing_seconds(run)
    epochs = run.total_steps / run.batches.steps_per_epoch
    total = run.total_steps * step_seconds + validation * max(epochs / run.recipe.val_interval, 1)
    if run.clock.budget is not None:
        total = run.clock.budget
        epochs = (total - validation) / step_seconds / run.batches.steps_per_epoch
    images = round(epochs * run.batches.steps_per_epoch) * batch
    line = {
        'model': run.recipe.model,
        'images_per_s': batch / step_seconds,
        'step_ms': 1e3 * step_seconds,
        'validation_s': validation,
        'epochs': epochs,
        'images': images,
        'hours': total / 3600,
        'device_hours': total / 3600 * run.world.size,
        'peak_memory_gib': _peak_memory(device) / 2**30,
        'devices': run.world.size,
    }
    return line


def _synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
