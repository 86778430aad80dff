#!/usr/bin/env python3
"""What PSSiLU costs beside F.silu and beside its formula written out: forward and backward, eager and compiled.

    python benchmarks/activation.py    # 4 million elements; a table, and benchmarks/results/activation-*.json

The cases take turns in one process, so that a busy machine slows all of them alike; reported are the median and the
quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from turns import RESULTS, output_folder, wait, write

from timm_robust.activations.pssilu import pssilu
from timm_robust.command_line import Parser, command, count, whole_number
from timm_robust.distributed import World


def formula(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """PSSiLU as one writes it down, and the paper prints it."""
    return x * (torch.sigmoid(alpha.abs() * x) - beta.abs()) / (1 - beta.abs())


def cases(device: torch.device) -> dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]:
    """Name -> function and the parameters that follow x."""
    learned = [torch.full((1,), value, device=device, requires_grad=True) for value in (1.1, 0.1)]
    frozen = [p.detach() for p in learned]
    compiled = torch.compile(pssilu, fullgraph=True, dynamic=False)
    return {
        'F.silu': (F.silu, []),
        'formula': (formula, learned),
        'formula, frozen': (formula, frozen),
        'pssilu': (pssilu, learned),
        'pssilu, frozen': (pssilu, frozen),
        'compiled pssilu': (compiled, learned),
        'compiled pssilu, frozen': (compiled, frozen),
    }


def once(f: Callable[..., torch.Tensor], x: torch.Tensor, params: list[torch.Tensor], grad: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    leaf = x.detach().requires_grad_()
    wait()
    start = time.perf_counter()
    f(leaf, *params).backward(grad)
    wait()
    return time.perf_counter() - start


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--elements', type=count, default=4_000_000)
    parser.add_argument('--repeats', type=whole_number(2), default=30)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--output', type=output_folder, default=str(RESULTS), help="folder for the JSON; '' for none")
    args = parser.parse_args(argv)
    device = World.join(args.device).device
    x = torch.randn(args.elements, device=device, dtype=getattr(torch, args.dtype))
    grad, functions = torch.randn_like(x), cases(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(args.repeats + 3):  # three turns to compile and warm up
        for name, (f, params) in functions.items():
            once(f, x, params, grad)  # what ran before leaves the allocator and the caches in another state
            seconds = once(f, x, params, grad)
            if turn >= 3:
                times[name].append(seconds)
    rows = {}
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        rows[name] = {'ms': 1e3 * median, 'ms_quartiles': [1e3 * low, 1e3 * high]}
    print(f'{"forward + backward":26s}{"ms":>8s}{"quartiles":>18s}{"x F.silu":>10s}{"x formula":>11s}')
    for name, row in rows.items():
        row['x_silu'] = row['ms'] / rows['F.silu']['ms']
        row['x_formula'] = row['ms'] / rows['formula, frozen' if 'frozen' in name else 'formula']['ms']
        low, high = row['ms_quartiles']
        print(
            f'{name:26s}{row["ms"]:8.2f}{f"{low:.2f} to {high:.2f}":>18s}{row["x_silu"]:10.2f}{row["x_formula"]:11.2f}'
        )
    record = {'elements': args.elements, 'dtype': args.dtype, 'repeats': args.repeats, 'rows': rows}
    write(f'activation-{args.dtype}', record, args.output, device)
    return 0


if __name__ == '__main__':
    sys.exit(main())
