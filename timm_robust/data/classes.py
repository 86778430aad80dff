"""The classes of a data set: how many, their names, and each image's label among those of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..threat_model import MAX_CLASSES


def number_classes(labels: Any, where: object) -> tuple[str, ...]:
    """Numbers as names of the classes: as many as the largest label, of an array or a list, says.

    Raises:
        ValueError: for a label that no set of images has.
    """
    largest = int(max(labels))
    if largest >= MAX_CLASSES:
        raise ValueError(f'{where}: label {largest} is too large, allowed: up to {MAX_CLASSES - 1}; are these labels?')
    return tuple(map(str, range(largest + 1)))


def class_names(dataset: Any, num_classes: int | None, name: str, fill: bool) -> tuple[str, ...]:
    """Names of the classes; numbers where the reader has none, and up to num_classes if they are to be filled up.

    Raises:
        ValueError: if the number is not known, or smaller than what the reader knows.
    """
    reader = getattr(dataset, 'reader', dataset)
    index = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
    named = {number: str(key) for key, number in reversed(index.items())}
    known = max(named, default=-1) + 1
    count = known if known and not fill else num_classes or known
    if not count:
        raise ValueError(f'{name}: the reader does not know the number of classes; add --num-classes N')
    if count > MAX_CLASSES:
        raise ValueError(f'{name}: {count} classes are too many; allowed: up to {MAX_CLASSES}')
    if count < known:
        raise ValueError(f'{name} has {known} classes, so num_classes {count} is too small')
    return tuple(named.get(number, str(number)) for number in range(count))


def read_labels(dataset: Any, name: str) -> Sequence[int]:
    """The label of each image of a map-style data set, without decoding the images.

    Raises:
        ValueError: if the reader cannot tell them.
    """
    reader = getattr(dataset, 'reader', dataset)
    if hasattr(reader, 'iter_targets'):
        return list(reader.iter_targets())
    if hasattr(reader, 'targets'):
        targets = torch.as_tensor(reader.targets)
        return [int(label) for label in (targets[:, 0] if targets.ndim > 1 else targets).tolist()]  # QMNIST's are rows
    if hasattr(reader, 'samples'):
        return [int(sample[1]) for sample in reader.samples]
    raise ValueError(f'{name}: its reader cannot tell the labels alone; validate on its own split, with --val-size 0')


def new_labels(theirs: Sequence[str], ours: Sequence[str], name: str) -> list[int] | None:
    """The label of each class of a data set among the classes of training, by name; None where labels stay.

    Classes that are called by their numbers, '0', '1', ..., on either side have no names and keep their labels, unless
    all of theirs are found among ours.

    Args:
        theirs: the classes of the data set; it may lack some of ours.
        ours: those that a network was trained on.
        name: of the data set, for the message.

    Raises:
        ValueError: naming the classes that training did not have.
    """
    # the Hub's CIFAR-100 misspells crab
    theirs, ours = (tuple('crab' if c == 'cra' else c for c in names) for names in (theirs, ours))
    if theirs == ours[: len(theirs)]:
        return None
    unknown = [c for number, c in enumerate(theirs) if c not in ours and c != str(number)]
    nameless = any(list(names) == [str(number) for number in range(len(names))] for names in (theirs, ours))
    if nameless and not set(theirs) <= set(ours):
        unknown = list(theirs[len(ours) :])
        if not unknown:
            return None
    table = [ours.index(c) if c in ours else number for number, c in enumerate(theirs)]
    if len(set(table)) < len(table):  # a number that is no name beside names
        unknown = unknown or [c for c in theirs if c not in ours]
    if unknown:
        raise ValueError(
            f'{name} has classes that training did not have: {_few(unknown)}; those of training are {_few(ours)}; '
            'take these folders away, or name them as in training'
        )
    return table


def _few(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    more = f' and {len(names) - 8} more' if len(names) > 8 else ''
    return ', '.join(names[:8]) + more
