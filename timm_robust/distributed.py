"""Several processes, one run: what every process must agree on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

T = TypeVar('T')
logger = logging.getLogger('timm_robust')


def _check_device(device: str) -> None:
    """Refuse a device that is none, or not here."""
    if str(device).startswith('cuda') and not torch.cuda.is_available():
        raise ValueError(f'device {device!r}: PyTorch finds no CUDA device here; type --device cpu')
    try:
        if (torch.device(device).index or 0) >= torch.cuda.device_count() > 0:
            raise RuntimeError(f'there are {torch.cuda.device_count()}, counted from 0')
        if torch.device(device).type != 'cuda':  # of which every process may have its own
            torch.zeros(1, device=device).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'device {device!r} cannot be used here ({reason}); type --device cpu') from None


@dataclass(frozen=True)
class World:
    """This process among the others.

    Args:
        device: where it computes.
        rank: its number.
        size: how many there are.
        local_rank: its number on its machine.
        cpu_group: a group of all processes, over the CPU, that waits for days: one may work while the others are done.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cpu_group: Any = None

    @classmethod
    def join(cls, device: str | None) -> World:
        """Join the processes that torchrun or srun started, if any; by default on CUDA where there is one.

        Raises:
            ValueError: for a device that is not here.
        """
        _check_device(device or 'cpu')
        if dist.is_initialized():
            ranks = dist.get_rank(), dist.get_world_size(), int(os.environ.get('LOCAL_RANK', dist.get_rank()))
            return cls(torch.device(device or 'cpu'), *ranks, _cpu_group())
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        tasks = os.environ.get('SLURM_NTASKS', '1')
        steps = os.environ.get('SLURM_STEP_NUM_TASKS', '1')
        if tasks != '1' and steps == '1' and 'WORLD_SIZE' not in os.environ:  # in an allocation, without srun
            logger.warning('SLURM_NTASKS is %s, but neither srun nor torchrun started this: it runs alone', tasks)
            alone = torch.device(device)
            if alone.type == 'cuda' and alone.index is not None:
                torch.cuda.set_device(alone)
            return cls(alone)
        info = init_distributed_device_so(device)
        group = _cpu_group() if info['world_size'] > 1 else None
        ranks = info['global_rank'], info['world_size'], info['local_rank']
        return cls(torch.device(info['device']), *ranks, group)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def max(self, value: float) -> float:
        """The largest of the processes' numbers; over the CPU, so that the device is not waited for."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.cpu_group)
        return tensor.item()

    def broadcast_object(self, value: T) -> T:
        """The first process's value, of any type; over the CPU, so that the device is not waited for."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.cpu_group)
        return values[0]

    @contextmanager
    def in_turn(self, wanted: bool = True) -> Iterator[None]:
        """The first process of each machine does this before the others, if that is wanted."""
        wanted = wanted and self.size > 1
        if wanted and self.local_rank:
            dist.barrier(group=self.cpu_group)
        yield
        if wanted and not self.local_rank:
            dist.barrier(group=self.cpu_group)

    def gather(self, items: dict[int, T]) -> dict[int, T]:
        """The entries of all processes' dictionaries, in the order of their keys; tensors in them are on the CPU."""
        every = [items]
        if self.size > 1:
            every = [{} for _ in range(self.size)]
            dist.all_gather_object(every, items, group=self.cpu_group)
        return dict(sorted({key: item for part in every for key, item in part.items()}.items()))

    def leave(self) -> None:
        """Part from the others, at the end of the program."""
        if self.size > 1:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)


def _cpu_group() -> Any:
    """All processes, over the CPU; every process must ask for it at the same point."""
    return dist.new_group(backend='gloo', timeout=timedelta(days=7))
