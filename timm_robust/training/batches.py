"""The images of a run: read, held out, and this process's stream of training batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from ..data import (
    ExtraImages,
    ImageData,
    MixedBatches,
    StreamBatches,
    StreamData,
    TrainBatches,
    fingerprint,
    has_split,
    is_stream,
    load_dataset,
    split_holdout,
)
from ..distributed import World
from ..models import class_list, load_checkpoint
from .changes import find_changes
from .recipe import Recipe

HELD_OUT = 'held_out'
"""The split of a run's own images that it validated on."""
HELD_OUT_NAMES = 'held_out.txt'
"""The file of a run that lists what was drawn out of a folder of pictures."""
TRAINING, VALIDATION = 'training data', 'validation data'
"""What checkpoints call the images whose fingerprints they hold."""


def read_data(recipe: Recipe, split_seed: int, classes: Sequence[str] | None = None) -> tuple[Any, Any]:
    """Training images, and those held out of them by this seed or of a validation split (None for none), on the CPU.

    The classes of the validation split are those of training by name, and those of training what they were in the run
    that is resumed.
    """
    train = _split_of(recipe, recipe.train_split, classes)
    if (split := validation_split(recipe)) is not None:
        return train, _split_of(recipe, split, train.classes)
    count = recipe.held_out_of(len(train))
    return split_holdout(train, count, split_seed) if count else (train, None)


def _split_of(recipe: Recipe, split: str, classes: Sequence[str] | None) -> Any:
    """A split of the recipe's data set, in memory or streamed, with these classes if there are any."""
    if not is_stream(recipe.dataset):
        data = load_dataset(recipe.dataset, recipe.data_dir, split, recipe.dataset_download)
        return data.with_classes(classes) if classes else data
    size = recipe.img_size or default_size(recipe.model)
    settings: dict[str, Any] = {'workers': recipe.workers, 'download': recipe.dataset_download}
    settings['data_config'] = _data_config(recipe.model)
    settings |= {'num_classes': recipe.num_classes, 'classes': classes}
    return StreamData(recipe.dataset, recipe.data_dir, split, size, **settings)


def validation_split(recipe: Recipe) -> str | None:
    """The split that the recipe validates on; None: images held out of the training split."""
    if recipe.val_split != 'auto':
        return recipe.val_split
    return 'validation' if has_split(recipe.dataset, recipe.data_dir, 'validation') else None


def held_out_names(recipe: Recipe, held_out: Any) -> list[str]:
    """The files that were drawn out of a folder of pictures to validate on."""
    drawn = isinstance(held_out, StreamData) and validation_split(recipe) is None
    return held_out.names() if drawn else []


def held_out_images(path: Path, data_dir: str | None = None) -> ImageData:
    """The images that a run validated on, or had held out of its training images, in memory.

    Args:
        path: checkpoint of the run.
        data_dir: where its data is now; None: where it was.

    Raises:
        ValueError: if the run held none out; if these are other images than it had, so that some of those that it was
            trained on could be taken for held out; and if the checkpoint is none of ours.
    """
    state = load_checkpoint(path)
    if 'recipe' not in state:
        raise ValueError(f'{path} does not say what was held out of its training: it is no checkpoint of timm_robust')
    recipe = Recipe.from_checkpoint(state)
    if data_dir is not None:
        recipe = replace(recipe, data_dir=data_dir)
    seed = int(state.get('split_seed', recipe.seed))
    train, held_out = read_data(recipe, seed, class_list(state.get('classes'), state.get('num_classes')))
    if held_out is None:
        raise ValueError(f'{path} held no images out; name the data: --dataset NAME --data-dir DIR --split SPLIT')
    images = {TRAINING: fingerprint(train), VALIDATION: fingerprint(held_out)}
    changes = find_changes(state, recipe, images)
    for earlier in state.get('changes', ()):
        changes |= {name: values for name, values in earlier['changes'].items() if name in images}
    if changes:
        listed = '; '.join(f'{name} {was}, then {now}' for name, (was, now) in changes.items())
        raise ValueError(
            f'{path} has {listed}: images that it was trained on could be taken for held out; give the folder as it '
            'was, or measure other images: --dataset NAME --data-dir DIR --split SPLIT'
        )
    return held_out.in_memory() if isinstance(held_out, StreamData) else held_out


def default_size(model: str) -> int:
    """Pixels a side of the images that a registered model was made for."""
    return int(_data_config(model).get('input_size', (3, 224, 224))[-1])


def _data_config(model: str) -> dict[str, Any]:
    """What a registered model says of its images; nothing where it says nothing."""
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return cfg.to_dict() if cfg else {}


def make_batches(recipe: Recipe, data: Any, seed: int, world: World) -> Any:
    """This process's part of the stream of training batches; batch_size is each one's, and a batch is all of theirs."""
    size = recipe.batch_size * world.size
    own = slice(world.rank * recipe.batch_size, (world.rank + 1) * recipe.batch_size)
    if isinstance(data, StreamData):
        if recipe.extra_data:
            raise ValueError(f'extra_data goes with data in memory, not with dataset {recipe.dataset!r}')
        if data.iterable:  # timm's reader has given this process images of its own
            return StreamBatches(data, recipe.batch_size, seed, hflip=recipe.hflip)
        return StreamBatches(data, size, seed, own=own, hflip=recipe.hflip)
    settings: dict[str, Any] = {'crop_padding': recipe.crop_padding, 'hflip': recipe.hflip, 'own': own}
    if recipe.extra_data:
        extra = ExtraImages(recipe.extra_data, data.num_classes)
        return MixedBatches(data, extra, recipe.extra_fraction, size, seed, **settings)
    return TrainBatches(data, size, seed, **settings)


def image_shape(data: Any) -> tuple[int, int, int]:
    """Channels, height and width of a data set's images, as training batches hold them."""
    if isinstance(data, StreamData):
        return data.channels, data.img_size, data.img_size
    channels, height, width = data.images.shape[1:]
    return channels, height, width
