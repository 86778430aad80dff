"""Train a robust model: timm-robust train RECIPE --data-dir DIR, or python train/adv_train.py -c RECIPE.yaml.

Every flag is a field of `timm_robust.training.Recipe`; flags win over the recipe file, the file over the defaults. The
folder output/train/<experiment> gets args.yaml, summary.csv, last.pth.tar, model_best.pth.tar (best PGD accuracy on
held-out images) and the newest checkpoints. The last line of the output is the result as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .command_line import command, is_input_error, keep_freed_memory
from .data import reader_fault
from .provenance import __version__
from .training import Diverged, Run, Stopped, build, few_images, fit, parse_recipe, plan


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe of the command line; 0 if it ended well, 1 if it diverged, 2 bad input, 128 + n signal n."""
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr, force=True)
    rest = list(sys.argv[1:] if argv is None else argv)
    planned = '--plan' in rest
    recipe = parse_recipe([word for word in rest if word != '--plan'])
    keep_freed_memory()
    run = None
    try:
        run = build(recipe)
        for doubt in [*recipe.find_problems(), *few_images(run)] if not run.world.rank else ():
            print(f'warning: {doubt}', file=sys.stderr)
        if planned:
            line = plan(run)
            if not run.world.rank:
                print_plan(line)
            return 0
        signals: list[int] = []
        with listen(run, signals):
            logging.info('timm_robust %s', __version__)
            line = fit(run)
    except Stopped as stopped:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(stopped, file=sys.stderr)
        return 128 + (signals or [signal.SIGTERM])[0]  # another process may have got it
    except Diverged as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except torch.cuda.OutOfMemoryError:
        advice = 'type --grad-checkpointing, or a smaller --batch-size with another --experiment'
        raise MemoryError(f'out of memory; {advice}') from None
    except Exception as error:
        fault = reader_fault(error)
        if fault is not None and (run is None or not run.step):
            raise OSError(fault) from error
        if run is None or not run.step or not (is_input_error(error) or isinstance(error, RuntimeError)):
            raise
        if not is_input_error(error) and fault is None:  # of the device, the compiler or the other processes
            traceback.print_exc()
        again = f'go on with --resume {run.folder / "last.pth.tar"} and the same settings'
        raise OSError(f'{fault or error}; when that is mended, {again}') from error
    if not run.world.rank:
        if run.held_out is not None:
            print(f'what it learned, class by class: timm-robust report {run.folder}', file=sys.stderr)
        print(json.dumps(line))
    return 0


@contextlib.contextmanager
def listen(run: Run, signals: list[int]) -> Iterator[None]:
    """In the body, on a signal that ends programs finish the step, save and end; a second one ends at once.

    SIGHUP comes from a terminal that closes (nohup has it ignored), SIGUSR1 from SLURM's --signal ahead of the limit.
    """

    def note(number: int, _: Any) -> None:
        signals.append(number)
        run.stop = True
        signal.signal(number, signal.SIG_DFL)

    before = {}
    for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):
        asked = getattr(signal, name, None)  # Windows lacks some
        if asked is not None and not (name == 'SIGHUP' and signal.getsignal(asked) is signal.SIG_IGN):
            before[asked] = signal.signal(asked, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def print_plan(line: dict[str, Any]) -> None:
    """The plan as a table, and as JSON on the last line."""
    for key, value in line.items():
        print(f'{key:18s}{value:,.4g}' if isinstance(value, float) else f'{key:18s}{value}')
    print(json.dumps(line))


if __name__ == '__main__':
    sys.exit(main())
