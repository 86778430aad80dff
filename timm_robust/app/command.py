"""A page in the browser that attacks a picture on two networks, a robust and a standard one, side by side.

    timm-robust app [MODEL ...] [--port 7860]

MODEL is a release's name, a run's folder, a checkpoint or a folder of weights. Nothing leaves the machine: the page is
served to this machine alone, keeps uploads for an hour at most, and asks no other server for anything.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..command_line import Parser, command, count, whole_number
from ..data import DATASETS, ImageData, load_dataset
from ..models import load_model
from ..provenance import public_name
from ..release import RESULTS, percent, read_results, results_of
from ..results import RobustnessResult
from ..weights import RELEASES, STAGED
from .page import Shown, build_page
from .pictures import MAX_BYTES, example_data

ROBUST = 'resnet18_pssilu.fgsm_cifar10_linf'
STANDARD = Path(__file__).with_name('standard')
_NAMES = {str(STANDARD): 'standard training: resnet18_relu, a quarter of the width', ROBUST: f'robust: {ROBUST}'}
MAX_MODELS = 4


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until it is interrupted."""
    args = parser().parse_args(argv)
    for stop in (signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)):
        if signal.getsignal(stop) is not signal.SIG_IGN:  # as under nohup
            signal.signal(stop, lambda number, _: sys.exit(128 + number))  # so that the uploads are deleted
    given = args.data_dir or not DATASETS[args.dataset].in_folder
    if not given and (args.n or args.dataset != 'cifar10'):
        raise ValueError(f'--dataset {args.dataset} and -n are of images in a folder; add --data-dir FOLDER')
    data = load_dataset(args.dataset, args.data_dir, 'test').first(args.n or 50) if given else None
    page = launch(args.models, host=args.host, port=args.port, data=data)
    print(f'the page is at {page.local_url}; Ctrl-C ends it', flush=True)
    page.block_thread()
    return 0


def parser() -> Parser:
    """The options."""
    made = Parser(description=(__doc__ or '').partition('\n')[0])
    add = made.add_argument
    add('models', nargs='*', metavar='MODEL', help='release, run, checkpoint or folder; a robust and a standard one')
    add('--host', default='127.0.0.1', help='address to serve at; 0.0.0.0: to the network too (default: %(default)s)')
    add('--port', type=whole_number(1, 65_535), help='port to serve at; the first free one from 7860 on if not given')
    add(
        '--data-dir', help='folder of the data set that accuracy over eps is measured on; the ten examples if not given'
    )
    add('--dataset', default='cifar10', choices=DATASETS, help='which it is (default: %(default)s)')
    add('-n', type=count, help='its first images that are measured on, 50 if not given')
    return made


def launch(
    models: Sequence[str] = (), *, host: str = '127.0.0.1', port: int | None = None, data: ImageData | None = None
) -> Any:
    """Serve the page from a thread.

    Args:
        models: as load_model takes them; none: the released robust model and a standard one of the package.
        host: address to serve at.
        port: to serve at; None: the first free one from 7860 on.
        data: images for accuracy over eps; None: the ten examples.

    Returns:
        Gradio's Blocks, with local_url and close().

    Raises:
        ImportError: if Gradio is missing, with what to type.
        ValueError, OSError: for models as load_model, for more than four, and for a port in use.
    """
    specs = list(models) or default_models()
    shown = Shown(load_models(specs), example_data() if data is None else data, records_of(specs))
    for name in ('GRADIO_ALLOWED_PATHS', 'GRADIO_SHARE', 'GRADIO_MCP_SERVER'):  # open what the page keeps closed
        os.environ.pop(name, None)
    os.environ |= {'GRADIO_TEMP_DIR': upload_folder(), 'GRADIO_ANALYTICS_ENABLED': 'False'}
    page, look = build_page(shown)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_BYTES,
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        **look,
    )
    return page


@functools.cache
def upload_folder() -> str:
    """The folder of this process that keeps what was uploaded; it is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix='timm-robust-app-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def default_models() -> list[str]:
    """The released robust model and the standard one of the package, as load_model takes them."""
    return [ROBUST, str(STANDARD)]


def load_models(specs: Sequence[str]) -> dict[str, nn.Module]:
    """Title -> model; two of one title get numbers."""
    if len(specs) > MAX_MODELS:
        raise ValueError(f'{len(specs)} models do not fit beside each other; allowed: up to {MAX_MODELS}')
    found: dict[str, nn.Module] = {}
    for number, spec in enumerate(specs, 1):
        title = _NAMES.get(spec, public_name(spec))
        found[f'{number}. {title}' if title in found else title] = load_model(spec).to(
            memory_format=torch.channels_last
        )  # faster
    return found


def records_of(specs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The recorded measurements of released models and of the standard one: attack, radius, n, accuracy in percent."""
    found: dict[str, list[dict[str, Any]]] = {}
    for spec in specs:
        if spec == str(STANDARD):
            found[_NAMES[spec]] = [_row(RobustnessResult.from_json(STANDARD / 'record.json'))]
        elif spec in RELEASES and (STAGED / spec / RESULTS).is_file():
            results = sorted(results_of(read_results(STAGED / spec)), key=lambda result: result.n)
            found[_NAMES.get(spec, spec)] = [_row(result) for result in results]
    return found


def _row(result: RobustnessResult) -> dict[str, Any]:
    attacked = result.attack != 'none'
    return {
        'attack': result.attack_title if attacked else 'none',
        'radius': f'{result.norm} {result.eps_text}' if attacked else '',
        'images': result.n,
        'clean, %': percent(result.clean_acc, result.n),
        'under attack, %': percent(result.robust_acc, result.n),
    }


if __name__ == '__main__':
    sys.exit(main())
