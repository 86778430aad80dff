"""Damaged and hostile files: each must be read right, or refused with one clear line.

    python tests/reliability/fuzz.py --count 400 [--kind checkpoint] [--seed 0]

Makes a valid file of each kind, damages copies of it in every way that disks, networks and attackers do, and reads them
under a limit of memory and time. The last line is JSON: kind -> {'read': n, 'refused': n, 'crashed': [messages]}.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import timm_robust  # noqa: F401  (registers the models)
from timm_robust.data import load_dataset
from timm_robust.models.checkpoint import load_checkpoint, read_weights
from timm_robust.models.load import load_model
from timm_robust.results import RobustnessResult
from timm_robust.training.checkpoints import save_checkpoint
from timm_robust.training.recipe import Recipe
from timm_robust.weights.releases import read_table

ALLOWED = (ValueError, FileNotFoundError, IsADirectoryError, ImportError)
MEMORY = 6 << 30  # of address space beyond what is used at the start
SECONDS = 20
CANARY = 'timm_robust_canary'


class Payload:
    """What an attacker's pickle does: leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


def valid(kind: str, folder: Path) -> Path:
    """A good file of a kind."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18_pssilu', width=2)
    if kind == 'checkpoint':
        state = {'arch': 'resnet18_pssilu', 'model_kwargs': {'width': 2}, 'num_classes': 10}
        save_checkpoint(folder / 'a.pth.tar', state | {'state_dict': model.state_dict(), 'step': 3})
        return folder / 'a.pth.tar'
    if kind == 'safetensors':
        save_file(model.state_dict(), folder / 'a.safetensors')
        return folder / 'a.safetensors'
    if kind == 'config':
        save_for_hf(model, folder / 'hub', safe_serialization=True)
        return folder / 'hub/config.json'
    if kind == 'recipe':
        Recipe(eps='4/255', model_kwargs={'width': 2}, decay_milestones=[1, 2], budget='5m').to_yaml(folder / 'a.yaml')
        return folder / 'a.yaml'
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, 20)
    if kind == 'npz':
        np.savez(folder / 'test.npz', image=images, label=labels)
        return folder / 'test.npz'
    if kind == 'parquet':
        return parquet(folder / 'test-00000-of-00001.parquet', images, labels)
    if kind == 'result':
        record = {
            'model': 'm',
            'dataset': 'cifar10',
            'split': 'test',
            'n': 5,
            'norm': 'Linf',
            'eps': 0.1,
            'eps_text': '0.1',
        }
        record |= {
            'attack': 'pgd',
            'clean_acc': 0.5,
            'pgd_acc': 0.4,
            'seed': 0,
            'batch_size': 5,
            'dtype': 'float32',
            'wall_time_s': 1.0,
        }
        record |= {'images_per_s': 5.0, 'hardware': 'x', 'versions': {}, 'commit': None, 'date': '2026-01-01'}
        RobustnessResult(**record).to_json(folder / 'r.json')
        return folder / 'r.json'
    if kind == 'releases':
        entry = {'sha256': 'a' * 64, 'size': 5, 'autoattack_acc': 0.5, 'repo': 'o/r', 'commit': None}
        (folder / 'releases.json').write_text(json.dumps({'resnet18_relu.at_cifar10_linf': entry}, indent=2))
        return folder / 'releases.json'
    raise ValueError(kind)


def parquet(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Images as the Hub keeps them."""
    import io

    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    rows = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format='PNG')
        rows.append({'bytes': file.getvalue(), 'path': None})
    pyarrow.parquet.write_table(pyarrow.table({'img': rows, 'label': labels.tolist()}), path)
    return path


READERS = {
    'checkpoint': lambda path: (load_checkpoint(path), load_model(path)),
    'safetensors': read_weights,
    'config': lambda path: load_model(path.parent),
    'recipe': Recipe.from_yaml,
    'npz': lambda path: load_dataset('npz', path.parent, 'test'),
    'parquet': lambda path: load_dataset('parquet', path.parent, 'test'),
    'result': RobustnessResult.from_json,
    'releases': read_table,
}


def damage(content: bytes, rng: random.Random) -> bytes:
    """One of the ways in which a file arrives broken."""
    data, size = bytearray(content), len(content)
    way = rng.randrange(8)
    if way == 0:
        return content[: rng.randrange(size)]
    if way == 1:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif way == 2:
        start = rng.randrange(size)
        data[start : start + rng.randrange(1, 200)] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200)))
    elif way == 3:
        return content + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 500)))
    elif way == 4:
        data[:8] = struct.pack('<Q', rng.choice([2**31, 2**40, 2**63, size, size * 2]))  # a header of 2 GB and more
    elif way == 5:
        start = rng.randrange(size)
        return bytes(data[start:] + data[:start])
    elif way == 6:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(2000)))
    else:
        return rng.choice(
            [b'', b'\0' * 4096, b'<!DOCTYPE html><html></html>', b'version https://git-lfs.github.com/spec/v1\n']
        )
    return bytes(data)


def damage_text(content: bytes, rng: random.Random, mark: Path) -> bytes:
    """Values and keys of a text file that make no sense, or mean harm."""
    words = (
        *(
            'null',
            '-1',
            '1e999',
            'nan',
            '[]',
            '{}',
            '"x"',
            'true',
            '10000000000000',
            '0',
            '../../etc/passwd',
            '\\u0000',
        ),
        *(
            f'!!python/object/apply:os.system ["touch {mark}"]',
            '&a [*a]',
            '99999999999999999999999999',
            '"' * 3,
        ),
    )
    lines = content.decode().splitlines()
    for _ in range(rng.randrange(1, 4)):
        number = rng.randrange(len(lines))
        key, colon, value = lines[number].partition(':')
        way = rng.randrange(4)
        comma = ',' * value.rstrip().endswith(',')
        lines[number] = (
            f'{key}{colon} {rng.choice(words)}{comma}' if way == 0
            else f'{key}x{colon}{value}' if way == 1
            else lines[number] * 2 if way == 2
            else ''
        )  # fmt: skip
    return '\n'.join(lines).encode()


def hostile(kind: str, folder: Path, mark: Path) -> list[Path]:
    """Files that somebody made on purpose."""
    made = []
    if kind in ('checkpoint', 'safetensors'):
        suffix = '.pth.tar' if kind == 'checkpoint' else '.safetensors'
        bomb = folder / f'bomb{suffix}'
        torch.save({'arch': 'resnet18_pssilu', 'state_dict': Payload(mark)}, bomb)
        bare = folder / f'bare{suffix}'
        bare.write_bytes(pickle.dumps(Payload(mark)))
        made += [bomb, bare]
    if kind == 'safetensors':
        nan = folder / 'nan.safetensors'
        save_file({'w': torch.full((3,), float('nan'))}, nan)
        huge = folder / 'huge.safetensors'
        header = json.dumps({'w': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}}).encode()
        huge.write_bytes(struct.pack('<Q', len(header)) + header)
        made += [nan, huge]
    if kind == 'npz':
        objects = folder / 'objects' / 'test.npz'
        objects.parent.mkdir()
        np.savez(objects, image=np.array([Payload(mark)], dtype=object), label=np.zeros(1))
        slip = folder / 'slip' / 'test.npz'
        slip.parent.mkdir()
        with zipfile.ZipFile(slip, 'w') as archive:
            archive.writestr('../../image.npy', b'x')
            archive.writestr('label.npy', b'x')
        made += [objects, slip]
    if kind == 'config':
        for number, change in enumerate(
            ({'architecture': 'os.system'}, {'architecture': '../../resnet18'}, {'num_classes': 10**12},
             {'model_args': {'width': 10**9}}, {'model_args': {'act_layer': '__import__("os")'}},
             {'pretrained_cfg': 'x'})
        ):  # fmt: skip
            target = folder / f'config{number}'
            shutil.copytree(folder / 'hub', target)
            config = json.loads((target / 'config.json').read_text())
            (target / 'config.json').write_text(json.dumps(config | change))
            made.append(target / 'config.json')
    if kind == 'recipe':
        for number, text in enumerate(
            (f'model: !!python/object/apply:os.system ["touch {mark}"]', 'a: &a [*a]', '- 1\n- 2', 'model: [',
             'eps: .inf', 'x' * 100_000,
             'a: &x [1,1,1,1,1,1,1,1,1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x]\nc: [*y,*y,*y,*y,*y,*y,*y]')
        ):  # fmt: skip
            (folder / f'hostile{number}.yaml').write_text(text)
            made.append(folder / f'hostile{number}.yaml')
    return made


def read(kind: str, path: Path) -> str:
    """'read', 'refused', or what went wrong."""
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            READERS[kind](path)
        return 'read'
    except ALLOWED as error:
        return 'refused' if str(error) else f'{type(error).__name__} without a message'
    except MemoryError:
        return 'MemoryError'
    except BaseException as error:  # a crash is what is looked for
        return f'{type(error).__name__}: {str(error)[:200]}'
    finally:
        signal.alarm(0)


def fuzz(kind: str, count: int, seed: int) -> dict:
    """Read `count` damaged copies and the hostile files of a kind."""
    rng, found = random.Random(f'{seed}{kind}'), {'read': 0, 'refused': 0, 'crashed': []}
    with tempfile.TemporaryDirectory() as name:
        folder, mark = Path(name), Path(name) / CANARY
        good = valid(kind, folder)
        content = good.read_bytes()
        if read(kind, good) != 'read':
            raise RuntimeError(f'the undamaged {kind} was not read: {read(kind, good)}')
        text = kind in ('config', 'recipe', 'result', 'releases')

        def note(outcome: str, what: str) -> None:
            if outcome in ('read', 'refused'):
                found[outcome] += 1
            else:
                found['crashed'].append(f'{what}: {outcome}')
            if mark.exists():
                found['crashed'].append(f'{what}: code ran')

        for path in hostile(kind, folder, mark):
            note(read(kind, path), path.name)
        for number in range(count):
            good.write_bytes(damage_text(content, rng, mark) if text and rng.random() < 0.7 else damage(content, rng))
            note(read(kind, good), f'number {number}')
    return found


def main() -> None:
    """Fuzz one kind, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--kind', choices=READERS)
    parser.add_argument('--count', type=int, default=400)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()

    def stop(number, frame):
        raise TimeoutError(f'took more than {SECONDS} s')

    signal.signal(signal.SIGALRM, stop)
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    kinds = [args.kind] if args.kind else list(READERS)
    print(json.dumps({kind: fuzz(kind, args.count, args.seed) for kind in kinds}))


if __name__ == '__main__':
    sys.exit(main())
