"""The one door to RobustBench: load, benchmark, convert, compare, submit.

    pip install 'timm-robust[robustbench]' && pip install --no-deps robustbench==1.1.1
    python -m timm_robust.robustbench benchmark NAME --data-dir DIR -n 200
    python -m timm_robust.robustbench convert Dai2021Parameterizing FILE.pt OUT
    python -m timm_robust.robustbench compare NAME

How its package is imported beside the timm of today: robustbench_package.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .allocator import keep_freed_memory
from .checkpoint import load_model as load_any
from .checkpoint import read_weights
from .command_line import Parser, command, count, whole_number
from .data import ImageData, load_dataset
from .files import read_yaml
from .model_files import write_model
from .pixels import pixel_input
from .releases import RELEASES, STAGED
from .results import atomic_file
from .robustbench_package import SETTINGS, robustbench
from .robustbench_report import compare, submission, write_entries
from .robustbench_zoo import LINF, ZooEntry, check_network, entry_of, to_ours, to_theirs
from .threat_model import LEADERBOARD_EPS, ThreatModel, parse_eps


def load_model(
    name: str, dataset: str = 'cifar10', threat_model: str = 'Linf', norm: str | None = None, **options: Any
) -> nn.Module:
    """RobustBench's load_model, which finds our models too: 'wrn28_10_pssilu', or with its tag, in full or in part.

    Args:
        name: a model of RobustBench's zoo, '<arch>', '<arch>.<method>' or '<arch>.<tag>'.
        dataset: 'cifar10', ...
        threat_model: 'Linf', 'L2' or 'corruptions'.
        norm: RobustBench's older word for threat_model; where both are given, this one counts, as there.
        options: further arguments of RobustBench's own load_model.

    Raises:
        ImportError: if RobustBench is missing.
        ValueError: if no model has that name.
    """
    package, threat_model = robustbench(), norm or threat_model
    end = f'_{dataset}_{threat_model}'.lower()
    name = name.removesuffix(end)
    zoo = package.model_zoo.model_dicts
    enums = package.model_zoo.enums
    known = zoo[enums.BenchmarkDataset(dataset)].get(enums.ThreatModel(threat_model), {})
    ours = f'{name.lower().replace("-", "_")}{end}'
    if name not in known and not (timm.models.is_model_pretrained(ours) if '.' in ours else timm.is_model(ours)):
        raise ValueError(
            f'{name!r} is no model of RobustBench for {dataset} {threat_model}, and none of ours: '
            f'{", ".join(RELEASES) or "nothing is released yet"}'
        )
    return package.utils.load_model(name, dataset=dataset, threat_model=threat_model, **options)


@contextmanager
def _images(package: Any, data: ImageData) -> Iterator[None]:
    """Let RobustBench read these images instead of downloading its own."""
    loaders = package.data._clean_dataset_loaders
    key = package.model_zoo.enums.BenchmarkDataset(data.name)
    kept = loaders[key]
    loaders[key] = lambda n, data_dir, prepr: (data.first(n).pixels(), data.labels[:n])
    try:
        yield
    finally:
        loaders[key] = kept


def benchmark(
    model: nn.Module,
    data: ImageData,
    *,
    norm: str = 'Linf',
    eps: float | str | None = None,
    n: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str = 'cpu',
) -> dict[str, Any]:
    """What RobustBench itself measures, on local images, with a fixed seed and batch size.

    Args:
        model: images in [0, 1] -> logits.
        data: test images of cifar10 or cifar100.
        norm: 'Linf' or 'L2'.
        eps: radius in pixels; the leaderboard's if None.
        n: the first n images; all if None.
        batch_size: AutoAttack's random numbers depend on it.
        seed: of AutoAttack.
        device: where to run.

    Returns:
        'clean_acc' and 'autoattack_acc' as RobustBench computes them, and 'robust', the verdict on every image [n].

    Raises:
        ImportError: if RobustBench is missing.
        ValueError: for a radius that cannot be meant.
    """
    threat_model = ThreatModel(norm, parse_eps(LEADERBOARD_EPS[norm] if eps is None else eps))
    threat_model.check_scale()
    package, n = robustbench(), len(data) if n is None else n
    SETTINGS.seed, SETTINGS.x_adv = seed, []
    model = model.to(device).eval()
    with _images(package, data):
        clean, robust = package.eval.benchmark(
            model,
            n_examples=n,
            dataset=data.name,
            threat_model=norm,
            device=torch.device(device),
            batch_size=batch_size,
            eps=threat_model.eps,
        )
    y = data.labels[:n]
    with torch.no_grad():
        verdicts = [model(part.to(device)).argmax(1).cpu() for part in SETTINGS.x_adv[-1].split(batch_size)]
    return {'clean_acc': clean, 'autoattack_acc': robust, 'robust': torch.cat(verdicts) == y.cpu()}


def corruptions(
    model: nn.Module, folder: str | Path, *, n: int = 10_000, batch_size: int = 250, device: torch.device | str = 'cpu'
) -> dict[str, Any]:
    """Accuracy on CIFAR-10-C: 15 corruptions, 5 severities, through RobustBench's loader and its clean_accuracy.

    RobustBench's own path ends in a TypeError (it passes prepr= to a loader that names that argument _), and behind it
    asks for AlexNet's accuracies, which no file of it holds for CIFAR-10: so the loop is run here, without the mCE.

    Args:
        model: images in [0, 1] -> logits.
        folder: holds CIFAR-10-C/ with 15 .npy files and labels.npy (Zenodo record 2535967).
        n: the first n images of each corruption and severity.
        batch_size: images a batch.
        device: where to run.

    Returns:
        'corruptions_acc', the mean, and 'accuracies', {corruption: [of severity 1, ..., 5]}.

    Raises:
        FileNotFoundError: naming the file that is missing, before anything runs.
    """
    package = robustbench()
    names, folder = package.data.CORRUPTIONS, Path(folder)
    for name in (*names, 'labels'):
        if not (folder / 'CIFAR-10-C' / f'{name}.npy').is_file():
            raise FileNotFoundError(
                f'{folder / "CIFAR-10-C" / name}.npy is missing; unpack CIFAR-10-C.tar of https://zenodo.org/records/2535967'
            )
    model = model.to(device).eval()
    accuracies: dict[str, list[float]] = {}
    for name in names:
        accuracies[name] = []
        for severity in range(1, 6):
            x, y = package.data.load_cifar10c(n, severity, str(folder), False, [name])
            share = package.utils.clean_accuracy(model, x, y, batch_size, torch.device(device))
            accuracies[name].append(share)
    return {
        'corruptions_acc': sum(sum(row) for row in accuracies.values()) / (5 * len(names)),
        'accuracies': accuracies,
    }


def convert(name: str, source: str | Path, target: str | Path) -> Path:
    """A checkpoint of RobustBench's zoo as a folder that timm loads ('local-dir:'), or the way back.

    Args:
        name: the entry of the zoo (CIFAR-10 Linf), see robustbench_zoo.LINF.
        source: RobustBench's .pt file; or, for the way back, our folder, checkpoint or .safetensors file.
        target: the folder to write; or, for the way back, the .pt file.

    Raises:
        ValueError: if the entry does not convert, the weights or the network are not its, or the target exists.
        FileNotFoundError: if the source does not exist.
    """
    entry, target = entry_of(name), Path(target)
    if target.exists():
        raise ValueError(f'{target} exists; name a new one, or remove it')
    if target.suffix == '.pt':
        return _to_robustbench(name, entry, source, target)
    weights = to_ours(read_weights(source), entry)
    statistics = {'mean': entry.mean, 'std': entry.std}
    model = timm.create_model(entry.arch, pretrained_cfg_overlay=statistics, **entry.model_kwargs)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f'{source} is not {name}: {" ".join(str(error).split())[:400]}') from None
    write_model(
        model,
        target,
        release_name(name, entry),
        model_args=entry.model_kwargs,
        half=False,
        source=f'RobustBench {name}',
    )
    return target


def _to_robustbench(name: str, entry: ZooEntry, source: str | Path, target: Path) -> Path:
    """Our weights as RobustBench would publish them: a state dict that its class loads strictly."""
    robustbench()  # imported first: what it makes on import must not land on 'meta'
    path = Path(source)
    model = load_any(path if path.exists() else str(source))
    check_network(model, name, entry)
    with torch.device('meta'):
        theirs = zoo_network(name)
    weights = to_theirs(model.state_dict(), list(theirs.state_dict()), entry)
    theirs.load_state_dict(weights, strict=True, assign=True)
    with atomic_file(target) as file:
        torch.save({key: value.contiguous() for key, value in theirs.state_dict().items()}, file)
    return target


def release_name(name: str, entry: ZooEntry) -> str:
    """An entry of the zoo as a name of ours: 'wrn34_10_relu.jia2022lasat_cifar10_linf'."""
    return f'{entry.arch}.{re.sub("[^a-z0-9]", "", name.partition("_")[0].lower())}_cifar10_linf'


def zoo_network(name: str) -> nn.Module:
    """RobustBench's network of an entry of its zoo, CIFAR-10 Linf, with random weights."""
    package = robustbench()
    enums = package.model_zoo.enums
    zoo = package.model_zoo.model_dicts[enums.BenchmarkDataset.cifar_10][enums.ThreatModel.Linf]
    return zoo[name]['model']()


def fetch(name: str, target: str | Path) -> Path:
    """Download an entry of the zoo with RobustBench's own link, and convert it.

    Raises:
        ConnectionError: if the file cannot be had.
        ValueError: if what came is not the checkpoint, such as a web page.
    """
    entry_of(name)
    package = robustbench()
    enums = package.model_zoo.enums
    drive_id = package.model_zoo.model_dicts[enums.BenchmarkDataset.cifar_10][enums.ThreatModel.Linf][name]['gdrive_id']
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'{name}.pt'
        try:
            package.utils.download_gdrive_new(drive_id, path)
        except Exception as error:  # of requests, or gdown's own
            raise ConnectionError(
                f'{name} (drive id {drive_id}) cannot be fetched: {type(error).__name__}; download it elsewhere and '
                f'type: python -m timm_robust.robustbench convert {name} FILE.pt {target}'
            ) from None
        if not path.is_file():
            raise ConnectionError(
                f'{name} (drive id {drive_id}) did not arrive; download it in a browser, then convert'
            )
        return convert(name, path, target)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if it ended well, 2 for bad input."""
    args = _parser().parse_args(argv)
    keep_freed_memory()
    answer = args.run(args)
    if answer is not None:
        print(json.dumps(answer, indent=2))
    return 0


def _run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    path = Path(args.name)
    model = pixel_input(load_any(path if path.exists() else args.name, device=args.device))
    if args.threat_model == 'corruptions':
        options = {'n': args.n or 10_000, 'batch_size': args.batch_size, 'device': args.device}
        return corruptions(model, args.data_dir, **options)
    data = load_dataset(args.dataset, args.data_dir, 'test')
    options = {key: getattr(args, key) for key in ('eps', 'n', 'batch_size', 'seed', 'device')}
    result = benchmark(model, data, norm=args.threat_model, **options)
    return result | {'robust': result['robust'].int().tolist()}


def _run_convert(args: argparse.Namespace) -> dict[str, Any]:
    return {'written': str(convert(args.entry, args.source, args.target))}


def _run_fetch(args: argparse.Namespace) -> dict[str, Any]:
    return {'written': str(fetch(args.entry, args.target))}


def _run_compare(args: argparse.Namespace) -> None:
    print(compare(args.cards / args.name, args.picture))


def _run_submission(args: argparse.Namespace) -> dict[str, Any]:
    info, _ = read_yaml(args.paper)
    if not isinstance(info, dict):
        raise ValueError(f'{args.paper} holds no paper; write link, name, authors and venue, each as KEY: VALUE')
    return {'written': str(submission(args.cards / args.name, args.target, args.data_dir, info))}


def _run_table(args: argparse.Namespace) -> dict[str, Any]:
    return write_entries(args.model_info, args.commit)


def _parser() -> Parser:
    """The commands."""
    parser = Parser('python -m timm_robust.robustbench', description='The door to RobustBench.')
    commands = parser.add_subparsers(dest='command', required=True)
    one = commands.add_parser('benchmark', help="RobustBench's own benchmark() on our model and local images")
    one.add_argument('name', help='registry name, checkpoint file or folder')
    one.add_argument('--data-dir', required=True, help='folder that holds the data, or CIFAR-10-C/')
    one.add_argument('--dataset', default='cifar10', choices=('cifar10', 'cifar100'))
    one.add_argument('--threat-model', default='Linf', choices=('Linf', 'L2', 'corruptions'))
    one.add_argument('--eps', help="radius, such as 8/255; the leaderboard's if not given")
    one.add_argument('-n', type=count, help='number of images, the first of the test set; all if not given')
    one.add_argument('--batch-size', type=count, default=250)
    one.add_argument('--seed', type=whole_number(0, 2**32 - 1), default=0, metavar='N')
    one.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    one.set_defaults(run=_run_benchmark)
    two = commands.add_parser('convert', help="RobustBench's .pt to a folder of ours, or the way back")
    two.add_argument('entry', help=f'entry of the zoo: {", ".join(LINF)}')
    two.add_argument('source', help='.pt file; for the way back our folder or checkpoint')
    two.add_argument('target', help='folder to write; for the way back a .pt file')
    two.set_defaults(run=_run_convert)
    three = commands.add_parser('fetch', help='download an entry of the zoo and convert it')
    three.add_argument('entry')
    three.add_argument('target', help='folder to write')
    three.set_defaults(run=_run_fetch)
    four = commands.add_parser('compare', help="a staged model beside RobustBench's published entries")
    four.add_argument('name', help='<arch>.<tag>')
    four.add_argument('--picture', metavar='FILE.png', help='save clean against AutoAttack accuracy there')
    four.set_defaults(run=_run_compare)
    five = commands.add_parser('submission', help='write a folder that submits a staged model')
    five.add_argument('name', help='<arch>.<tag>')
    five.add_argument('target', help='folder to write')
    five.add_argument('--data-dir', required=True, help='holds the official cifar-10-batches-py')
    five.add_argument(
        '--paper',
        required=True,
        metavar='FILE.yaml',
        help='link, name, authors, venue, footnote, additional_data',
    )
    five.set_defaults(run=_run_submission)
    six = commands.add_parser('table', help='renew the published numbers that compare uses')
    six.add_argument('model_info', help="folder model_info of a checkout of RobustBench's repository")
    six.add_argument('commit', help='the commit that it is of')
    six.set_defaults(run=_run_table)
    for one in (four, five):
        one.add_argument('--cards', type=Path, default=STAGED, help='folder of staged models')
    return parser


if __name__ == '__main__':
    sys.exit(main())
