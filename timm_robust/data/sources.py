"""timm's data sets behind one door: what may be named, and where it lies."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
from pathlib import Path, PurePath
from typing import Any

from timm.data import add_img_extensions, create_dataset

_FOLDER = ('', 'folder')
_logger = logging.getLogger('timm_robust')
_LIBRARIES = {
    'torch': 'torchvision',
    'hfds': 'datasets',
    'wds': 'webdataset',
    'hfids': 'datasets',
    'tfds': 'tensorflow_datasets',
}
_PICTURES = ['.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm']
"""Endings of what is read in folders and tars."""
_TRAIN_AND_TEST = {'torch/mnist', 'torch/kmnist', 'torch/fashion_mnist', 'torch/qmnist'}
_SPLITS = (('train', 'training'), ('validation', 'val', 'valid', 'eval'), ('test', 'testing'))
"""The names of each split, in the order in which its folder is looked for."""
_SPLIT_NAMES = {name for names in _SPLITS for name in names}


def is_stream(name: str) -> bool:
    """Whether `StreamData` reads a data set of this name, rather than `load_dataset`."""
    return name in _FOLDER or (_reader(name) in _LIBRARIES and name not in ('torch/cifar10', 'torch/cifar100'))


def _reader(name: str) -> str:
    return name.partition('/')[0].lower()


def open_dataset(name: str, root: str | None, split: str, download: bool, **options: Any) -> Any:
    """A data set as timm opens it, without a transform.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `StreamData` says.
    """
    folder, reader = name in _FOLDER, _reader(name)
    if not folder and reader not in _LIBRARIES:
        raise ValueError(
            f'dataset {name!r} is unknown; allowed: folder, {", ".join(f"{r}/<name>" for r in _LIBRARIES)}'
        )
    library = _LIBRARIES.get(reader)
    if library and importlib.util.find_spec(library) is None:
        raise ImportError(f'{library} is not installed; dataset {name!r} needs it; type: pip install {library}')
    if name.lower() in _TRAIN_AND_TEST and split not in ('train', 'test'):
        raise ValueError(f'{name} has the splits train and test, not {split!r}')  # timm would take test
    if root is None and reader not in ('hfds', 'hfids', 'tfds'):
        raise FileNotFoundError(f'dataset {name!r} needs a folder: add --data-dir FOLDER')
    if folder:
        root = str(_locate(Path(str(root)), split))
        # an open file shared by worker processes would share its position
        options = {'cache_tarfiles': False} if root.endswith('.tar') else {}
        add_img_extensions(_PICTURES)  # timm by itself passes over all but the first three
        if Path(root).is_dir():
            _tell_folders_without_pictures(Path(root))
    else:
        options['download'] = download
        if reader in ('wds', 'hfids'):
            options['input_img_mode'] = ''  # timm would cut 16 bits off at 255
    try:
        dataset = create_dataset(name, root, split, search_split=not folder, **options)
        if folder and Path(str(root)).is_dir():
            _check_places(dataset, str(root))
        return dataset
    except pickle.UnpicklingError as error:  # timm keeps an index beside tars of more than 10 GB, and reads it back
        index = Path(str(root)).with_name(f'_{Path(str(root)).stem}_tarinfos.pickle')
        raise ValueError(f'{index} is no index that timm wrote ({error}); delete it') from None
    except (AssertionError, RuntimeError, KeyError) as error:
        raise ValueError(f'cannot open split {split!r} of dataset {name!r} in {root}: {error}') from error


def _tell_folders_without_pictures(root: Path) -> None:
    """Warn of each sub-folder that makes no class."""
    for path in sorted(root.iterdir()):
        names = (name for _, _, files in os.walk(path, followlinks=True) for name in files)
        if path.is_dir() and not any(Path(name).suffix.lower() in _PICTURES for name in names):
            _logger.warning('%s is no class: it holds no picture (%s)', path, ', '.join(_PICTURES))


def _check_places(dataset: Any, root: str) -> None:
    """Refuse folders whose pictures would get wrong labels: timm takes the innermost folder's name for the class.

    Raises:
        ValueError: for a picture outside of any class, a hidden folder, two folders of one name, a class in a class.
    """
    folders = sorted({os.path.dirname(path)[len(root) :].strip(os.sep) for path, _ in dataset.reader.samples})
    by_name: dict[str, str] = {}
    for folder in folders:
        name, parents = os.path.basename(folder), [str(parent) for parent in PurePath(folder).parents]
        other = by_name.setdefault(name, folder)
        if not folder:
            fault = 'pictures lie beside the folders of the classes'
        elif any(part.startswith('.') for part in PurePath(folder).parts):
            fault = f'{folder} is hidden and holds pictures'
        elif other != folder:
            fault = f'{other} and {folder} would be one class, {name}'
        elif around := [parent for parent in parents if by_name.get(os.path.basename(parent)) == parent]:
            fault = f'{folder} lies in {around[0]}, and both hold pictures'
        else:
            continue
        raise ValueError(
            f'{root}: {fault}; put the pictures of each class into a folder of its own, right below {root}, or name '
            'the folder that holds those'
        )
    if deeper := [folder for folder in folders if os.sep in folder]:
        _logger.warning('%s: classes are the innermost folders, such as %s', root, ', '.join(deeper[:3]))


def _locate(root: Path, split: str) -> Path:
    """The folder or `.tar` of a split: the one of its name, or of its other name in timm, else the root itself."""
    if not root.exists():
        raise FileNotFoundError(f'folder {root} does not exist; name the right one with --data-dir')
    if root.is_file():
        return root
    for name in (split, *_names(split)):
        for path in (root / name, root / f'{name}.tar'):
            if path.exists():
                return path
    places = (path for path in sorted(root.iterdir()) if path.is_dir() or path.suffix == '.tar')
    if held := [path.name for path in places if path.stem.lower() in _SPLIT_NAMES]:
        raise FileNotFoundError(
            f'{root} holds {", ".join(held)}, but no split {split!r}; name one of them with --split (in training with '
            '--train-split and --val-split)'
        )
    return root


def same_split(one: str | None, other: str | None) -> bool:
    """Whether two names are of one split: 'val', 'valid' and 'eval' are 'validation', 'training' is 'train'."""
    return one == other or (one is not None and other in _names(one))


def _names(split: str) -> tuple[str, ...]:
    """All names of a split."""
    return next((names for names in _SPLITS if split in names), (split,))


def has_split(name: str, root: str | None, split: str) -> bool:
    """Whether a folder of pictures holds a folder or `.tar` for this split, rather than the classes themselves."""
    if name not in _FOLDER or root is None or not Path(root).is_dir():
        return False
    try:
        return _locate(Path(root), split) != Path(root)
    except FileNotFoundError:
        return False


def source_name(name: str, root: str | None) -> str:
    """The data set as model tags spell it: the last part of its name, or the name of its folder."""
    if name not in _FOLDER:
        return name.rstrip('/').rpartition('/')[2]
    path = Path(str(root)).resolve()
    path = path.with_suffix('') if path.is_file() else path
    return path.parent.name if path.name.lower() in _SPLIT_NAMES else path.name
