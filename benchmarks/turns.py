"""Cases that take turns, each in a process of its own: a busy machine slows all alike, and none inherits another's
allocator, caches or compiled code.

One process is at work at a time, and on a GPU the others hold their weights alone: what a case needs to compute is
given back after each turn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from timm_robust.files import atomic_file
from timm_robust.provenance import environment, git_commit

RESULTS = Path(__file__).parent / 'results'
Case = dict[str, Any]
Measure = Callable[[], dict[str, Any]]


class Worker:
    """A process that measures one case whenever it is asked."""

    def __init__(self, script: str, case: Case) -> None:
        """Start it, and wait until it has warmed up."""
        command = [sys.executable, script, '--worker', json.dumps(case)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask()

    def ask(self) -> dict[str, Any]:
        """One line of JSON out of the process.

        Raises:
            ChildProcessError: if the process ended; its own message is on stderr.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{'):
                return json.loads(line)
        raise ChildProcessError(f'a case ended early, with status {self.process.wait()}; its message is above')

    def measure(self) -> dict[str, Any]:
        """One repeat."""
        assert self.process.stdin is not None
        print('go', file=self.process.stdin, flush=True)
        return self.ask()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def serve(case: Case, build: Callable[[Case], Measure]) -> None:
    """The process's side: build, warm up, then measure at each line read."""
    measure = build(case)
    answer(measure, ready=True)
    for _ in sys.stdin:
        answer(measure)


def answer(measure: Measure, **more: Any) -> None:
    """Measure, give the GPU's memory back, and only then say so: the next process begins at that."""
    found = more | measure()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    print(json.dumps(found), flush=True)


def take_turns(
    script: str, cases: dict[str, Case], repeats: int, until: float = float('inf')
) -> dict[str, list[dict[str, Any]]]:
    """Measure the cases one after the other, `repeats` times over; name -> what each repeat said.

    Args:
        script: calls `serve`.
        cases: name -> what the script's process is told.
        repeats: turns.
        until: no further turn begins when `time.perf_counter()` is past this; there is one at least.
    """
    workers: dict[str, Worker] = {}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    try:
        for name, case in cases.items():
            print(f'preparing {name}', file=sys.stderr, flush=True)
            workers[name] = Worker(script, case)
        for turn in range(repeats):
            if turn and time.perf_counter() > until:
                print(f'time is over after {turn} of {repeats} turns', file=sys.stderr, flush=True)
                break
            for name, worker in workers.items():
                found[name].append(worker.measure())
    finally:
        for worker in workers.values():
            worker.stop()
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def wait() -> None:
    """Until the GPU is done, if one is at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def output_folder(path: str) -> str:
    """A type of argparse: a folder for the JSON, which is made; '' for none."""
    if path:
        Path(path).mkdir(parents=True, exist_ok=True)
    return path


def version(package: str) -> str | None:
    """Of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(name: str, record: dict[str, Any], output: str, device: torch.device) -> None:
    """benchmarks/results/<name>-<hardware>.json with hardware, versions and commit; nothing for output ''."""
    if not output:
        return
    where = environment(device)
    slug = 'cpu' if device.type == 'cpu' else where['hardware'].split(',')[0].lower().replace(' ', '-')
    path = Path(output) / f'{name}-{slug}.json'
    about = {
        'benchmark': name,
        'threads': torch.get_num_threads(),
        **where,
        'peers': {name: version(name) for name in ('torchattacks', 'pyautoattack')},
        'commit': git_commit(Path(__file__).parent),
    }
    with atomic_file(path) as file:
        file.write((json.dumps(about | record, indent=2) + '\n').encode())
    print(f'written: {path}')
