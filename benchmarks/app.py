#!/usr/bin/env python3
"""What an answer of `timm-robust app` takes: every attack on one picture, all networks together, without the browser.

    python benchmarks/app.py [MODEL ...] [--repeats 5]

Reported are the medians of wall-clock and CPU seconds of the page's own function, its HTML included; the first call,
which warms up, is left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import torch

from timm_robust.app import ATTACKS, Shown, default_models, load_models
from timm_robust.command_line import Parser, command, count
from timm_robust.provenance import environment


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = Parser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('models', nargs='*', metavar='MODEL', help="as for the page; the page's own if not given")
    parser.add_argument('--repeats', type=count, default=5, help='answers an attack (default: %(default)s)')
    args = parser.parse_args(argv)
    shown = Shown(load_models(args.models or default_models()))
    print(f'{environment()["hardware"]}, {torch.get_num_threads()} threads, {", ".join(shown.models)}\n')
    print(f'{"attack, Linf 8/255":24s}{"wall s":>8s}{"CPU s":>8s}')
    for method in ATTACKS:
        walls, spent = zip(*(once(shown, method) for _ in range(args.repeats + 1)), strict=True)
        print(f'{method:24s}{statistics.median(walls[1:]):8.2f}{statistics.median(spent[1:]):8.2f}')
    return 0


def once(shown: Shown, method: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one answer."""
    wall, cpu = time.perf_counter(), time.process_time()
    answer = shown.attack(None, 'cat', 'Linf', 8, method, '')
    assert '<img' in answer, answer
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == '__main__':
    sys.exit(main())
