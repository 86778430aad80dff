#!/usr/bin/env python3
"""Training steps: ours beside the loop that one writes around torchattacks, images a second.

    python benchmarks/train_step.py            # ResNet-18, PGD-10; on a CPU also FGSM, on a GPU WRN-28-10, TRADES-10
    python benchmarks/train_step.py --steps 1  # FGSM
    python benchmarks/train_step.py --sizes    # how ours grows with batch, attack steps, width and generated images
    python benchmarks/train_step.py --imagenet # ours on ImageNet networks at 224 pixels, eager and compiled

Each case runs in a process of its own, and they take turns; reported are the median of the repeats, the smallest and
the largest. A table is written to its file as soon as it is done. Ours is what train/adv_train.py runs, on random
images. FLOP/s count 2k + 3 forwards an image for PGD-k (TRADES-k: 2k + 7), over the rate of a large matrix product on
the same machine. Memory is the peak above what the process held before the network was made: the allocator's on a GPU,
the process's on a CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from peers import Peer, pgd_at_step, trades_step
from torch.utils.flop_counter import FlopCounterMode
from turns import RESULTS, Case, Measure, output_folder, serve, spread, take_turns, wait, write

from timm_robust.command_line import Parser, command, count, keep_freed_memory
from timm_robust.training.builder import build
from timm_robust.training.recipe import Recipe

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
VARIANTS = ('fp32', 'bf16', 'fp32+compile', 'bf16+compile')
Found = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Table:
    """Cases that are compared with each other.

    Args:
        name: of its file.
        title: what they share.
        cases: name -> what its process is told.
        report: prints the table, and returns its rows.
    """

    name: str
    title: str
    cases: dict[str, Case]
    report: Callable[[dict[str, Case], Found], dict[str, Any]]


def measure(case: Case) -> Measure:
    """What a case's process does at each turn: some steps, timed."""
    if case['side'] == 'matmul':
        return partial(matmul, case)
    before = peak_memory()
    step, state = (ours if case['side'] == 'ours' else peer)(case), {'number': 0}

    def once() -> dict[str, Any]:
        if DEVICE.type == 'cuda':  # the memory was given back
            step(state['number'])
        wait()
        started = time.perf_counter()
        for _ in range(case['steps_a_turn']):
            loss = step(state['number'])
            state['number'] += 1
        wait()
        seconds = time.perf_counter() - started
        if not loss.isfinite():
            raise ValueError(f'{case}: the loss is not finite')
        return {'images_per_s': case['batch'] * case['steps_a_turn'] / seconds, 'memory': peak_memory() - before}

    once()  # compiles, and the optimizer makes its state
    return once


def peak_memory() -> int:
    """Bytes."""
    if DEVICE.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(case: Case) -> Any:
    """Our step, as train/adv_train.py takes it: step(number) -> loss."""
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    side = case.get('pixels', 32)
    images = rng.integers(0, 256, (4 * case['batch'], side, side, 3), dtype=np.uint8)
    np.savez(folder / 'train.npz', image=images, label=rng.permutation(len(images)) % 10)
    settings: dict[str, Any] = {'attack': 'fgsm' if case['k'] == 1 else 'pgd', 'steps': case['k'], 'step_size': '2/255'}
    if case['k'] == 1:
        settings.pop('step_size')
    if rows := case.get('extra_rows'):
        settings['extra_data'] = str(sparse_images(folder, rows))
    variant = case['variant'].split('+')
    recipe = Recipe(
        model=case['model'],
        model_kwargs={'width': case['width']} if case.get('width') else {},
        dataset='npz',
        data_dir=str(folder),
        val_size=0,
        batch_size=case['batch'],
        loss=case['loss'],
        lr=0.01,
        amp='bf16' in variant,
        torchcompile='compile' in variant,
        device=DEVICE.type,
        **settings,
    )
    run = build(recipe)
    return lambda number: run.train_step(*run.batches[number], number).loss


def sparse_images(folder: Path, rows: int) -> Path:
    """A memory-mapped file of generated images that holds zeros: sparse, so that 61 GB of them need no disk."""
    np.lib.format.open_memmap(folder / 'x_image.npy', 'w+', np.uint8, (rows, 32, 32, 3))
    np.lib.format.open_memmap(folder / 'x_label.npy', 'w+', np.uint8, (rows,))
    return folder / 'x_image.npy'


def peer(case: Case) -> Any:
    """The usual loop: step(number) -> loss. Its bf16 variant has autocast and channels-last switched on."""
    torch.manual_seed(0)
    model: torch.nn.Module = Peer(case['model'], case.get('width')).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    x = torch.rand(case['batch'], 3, 32, 32, device=DEVICE)
    y = torch.randint(10, (case['batch'],), device=DEVICE)
    if case['variant'] == 'bf16':
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    take = trades_step if case['loss'] == 'trades' else pgd_at_step

    def step(number: int) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=case['variant'] == 'bf16'):
            return take(model, optimizer, x, y, case['k'])

    return step


def matmul(case: Case) -> dict[str, Any]:
    """FLOP/s of a large square product."""
    n = 2048 if DEVICE.type == 'cpu' else 8192
    a = torch.rand(n, n, device=DEVICE, dtype=getattr(torch, case['dtype']))
    wait()
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    wait()
    return {'flops': 8 * n**3 / (time.perf_counter() - started)}


def flops_an_image(model: str, width: int | None, loss: str, k: int) -> float:
    """Arithmetic of a step, in FLOP: forwards, and a backward as two of them (one where only the images need it)."""
    net = timm.create_model(model, **({'width': width} if width else {})).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() * (2 * k + (7 if loss == 'trades' else 3))


def compare(args: argparse.Namespace) -> Iterator[Table]:
    """Ours and the peer, all variants; a table for each loss and attack."""
    width = 8 if args.toy else None
    jobs = [(args.models, 'pgd_at', k, args.batch) for k in args.steps]
    if DEVICE.type == 'cuda' and 10 in args.steps:  # in fp32 the peer keeps about 130 MB an image
        jobs.append((['wrn28_10_pssilu'], 'trades', 10, min(args.batch, 128)))
    for models, loss, k, batch in jobs:
        cases: dict[str, Case] = {}
        shared = {'batch': batch, 'loss': loss, 'k': k, 'width': width, 'steps_a_turn': 1 if k > 1 else 3}
        if models[0].startswith('wrn'):  # its width is another setting
            shared['width'] = None
        for side, variants in (('peer', args.peer_variants), ('ours', args.variants)):
            for variant in variants:
                for model in models:
                    cases[f'{side} {model} {variant}'] = shared | {'side': side, 'variant': variant, 'model': model}
        for dtype in ('float32', 'bfloat16'):
            cases[f'matmul {dtype}'] = {'side': 'matmul', 'dtype': dtype}
        title = f'{loss}, {k} attack step{"s" * (k > 1)}, batch {batch}'
        yield Table(f'{loss}-{k}', title, cases, report)


def report(cases: dict[str, Case], found: Found) -> dict[str, Any]:
    """Ours beside the peer."""
    rows: dict[str, Any] = {}
    heads = f'{"images/s":>9s}{"min to max":>18s}{"x peer":>8s}{"x silu":>8s}{"of peak":>9s}{"MiB/image":>11s}'
    print(f'{"":38s}{heads}')
    for name, case in cases.items():
        if case['side'] == 'matmul':
            continue
        row: dict[str, Any] = spread([one['images_per_s'] for one in found[name]])
        base, model = f'peer {case["model"]} fp32', case['model']
        silu = f'{case["side"]} {model.rpartition("_")[0]}_silu {case["variant"]}'
        peak = f'matmul {"float32" if case["variant"].startswith("fp32") else "bfloat16"}'
        row['x_peer'] = ratio(found, name, base)
        row['x_silu'] = ratio(found, name, silu)
        flops = row['median'] * flops_an_image(model, case['width'], case['loss'], case['k'])
        row['of_peak'] = flops / spread([one['flops'] for one in found[peak]])['median']
        memory = found[name][-1]['memory']
        row['mib_per_image'] = memory / 2**20 / case['batch']
        rows[name] = row
        cells = [f'{row[key]:.2f}' if row[key] else '-' for key in ('x_peer', 'x_silu', 'of_peak', 'mib_per_image')]
        between = f'{row["min"]:.1f} to {row["max"]:.1f}'
        print(f'{name:38s}{row["median"]:9.1f}{between:>18s}{cells[0]:>8s}{cells[1]:>8s}{cells[2]:>9s}{cells[3]:>11s}')
    return rows


def ratio(found: dict[str, list[dict[str, Any]]], name: str, base: str) -> float | None:
    """Median over the turns of this case's rate over the base's in the same turn."""
    if base not in found:
        return None
    pairs = zip(found[name], found[base], strict=True)
    return spread([one['images_per_s'] / other['images_per_s'] for one, other in pairs])['median']


def sizes(args: argparse.Namespace) -> Iterator[Table]:
    """Ours alone: one quantity at a time is changed."""
    base = {'side': 'ours', 'variant': args.variants[-1], 'model': args.models[0], 'loss': 'pgd_at'}
    base |= {'batch': 16 if args.toy else 64, 'k': 2, 'width': 8 if args.toy else 32, 'steps_a_turn': 2}
    grids = {
        'batch': [16, 32] if args.toy else [32, 128, 512],
        'k': [1, 2] if args.toy else [1, 2, 5, 10],
        'width': [8, 16] if args.toy else [16, 32, 64],
        'extra_rows': [0, 10_000] if args.toy else [0, 1_000_000, 20_000_000],
    }
    for what, values in grids.items():
        small = {'width': 4, 'steps_a_turn': 20 if args.toy else 100, 'k': 1} if what == 'extra_rows' else {}
        cases = {f'{what} {value:,}': base | small | {what: value} for value in values}
        yield Table(f'sizes-{what}', what, cases, report_ours)


def report_ours(cases: dict[str, Case], found: Found) -> dict[str, Any]:
    """Rate and memory, and the rate beside the first case's."""
    rows = {}
    for name, turns in found.items():
        row: dict[str, Any] = spread([one['images_per_s'] for one in turns])
        row['mib'] = turns[-1]['memory'] / 2**20
        row['mib_per_image'] = row['mib'] / cases[name]['batch']
        row['of_first'] = ratio(found, name, next(iter(cases)))
        rows[name] = row
        rate = f'{row["median"]:10.2f} images/s ({row["min"]:.2f} to {row["max"]:.2f})'
        print(
            f'{name:36s}{rate:42s}{row["mib"]:8.0f} MiB{row["mib_per_image"]:8.1f} MiB/image'
            f'{row["of_first"]:8.2f} of the first'
        )
    return rows


def imagenet(args: argparse.Namespace) -> Iterator[Table]:
    """Ours on ImageNet networks with one attack step, eager and compiled; a table for each network."""
    shared = {'side': 'ours', 'loss': 'pgd_at', 'k': 1, 'steps_a_turn': 1, 'pixels': 32 if args.toy else 224}
    shared['batch'] = 4 if args.toy else args.batch // 8
    names = ['resnet50_relu', 'resnet50_silu', 'resnet50_pssilu', 'efficientnet_b0_silu']
    for name in ['resnet50_silu'] if args.toy else names:
        variants = args.variants[:1] if args.toy else args.variants
        cases = {
            f'{name} {variant}': shared | {'model': name.replace('_relu', ''), 'variant': variant}
            for variant in variants
        }
        title = f'pgd_at, 1 attack step, batch {shared["batch"]}, {shared["pixels"]} pixels'
        yield Table(f'imagenet-{name}', title, cases, report_ours)


def measure_tables(tables: Iterator[Table], args: argparse.Namespace) -> None:
    """One after the other, each written when it is done; none is begun when --seconds are over."""
    until = time.perf_counter() + args.seconds
    for table in tables:
        if time.perf_counter() > until:
            print(f'\n{table.name}: not begun, for --seconds {args.seconds:g} are over')
            continue
        found = take_turns(__file__, table.cases, args.repeats, until)
        print(f'\n{table.title}')
        record = {'repeats': len(next(iter(found.values()))), 'title': table.title}
        write(f'train_step-{table.name}', record | {'rows': table.report(table.cases, found)}, args.output, DEVICE)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--models', nargs='+', default=['resnet18_pssilu', 'resnet18_silu', 'resnet18_relu'])
    on_gpu = DEVICE.type == 'cuda'
    add('--steps', nargs='+', type=count, default=[10] if on_gpu else [10, 1], help='attack steps; 1 is FGSM')
    add('--batch', type=count, default=512 if on_gpu else 128)
    add('--variants', nargs='+', default=['bf16', 'bf16+compile'], choices=VARIANTS, help='of ours')
    peers = ['fp32', 'bf16'] if on_gpu else ['fp32']
    add(
        '--peer-variants',
        nargs='*',
        default=peers,
        choices=('fp32', 'bf16'),
        help='fp32; bf16: autocast and channels-last; nothing for ours alone',
    )
    add('--repeats', type=count, default=5)
    add(
        '--seconds', type=float, default=480 if on_gpu else 1e9, help='begin no table and no further turn after so many'
    )
    add('--sizes', action='store_true', help='how rate and memory change with batch, attack steps, width, extra images')
    add('--imagenet', action='store_true', help='ImageNet networks at 224 pixels')
    add('--toy', action='store_true', help='tiny networks, to see that it runs')
    add('--output', type=output_folder, default=str(RESULTS), help="folder for the JSON; '' for none")
    add('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        serve(json.loads(args.worker), measure)
        return 0
    if unknown := [name for name in args.models if not timm.is_model(name)]:
        raise ValueError(f'{", ".join(unknown)}: no such model in the timm registry')
    if args.toy:
        args.batch = 16
    take = sizes if args.sizes else imagenet if args.imagenet else compare
    measure_tables(take(args), args)
    return 0


if __name__ == '__main__':
    sys.exit(main())
