"""The images of a run: read, held out, and this process's stream of training batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm

from ..data import (
    ExtraImages,
    MixedBatches,
    StreamBatches,
    StreamData,
    TrainBatches,
    is_stream,
    load_dataset,
    split_holdout,
)
from ..distributed import World
from .recipe import Recipe


def read_data(recipe: Recipe, world: World, split_seed: int, classes: Sequence[str] | None = None) -> tuple[Any, Any]:
    """Training images, and those held out of them by this seed or of a validation split (None for none), on the CPU.

    The classes of the validation split are those of training by name, and those of training what they were in the run
    that is resumed.
    """
    if is_stream(recipe.dataset):
        size = recipe.img_size or default_size(recipe.model)
        settings: dict[str, Any] = {'img_size': size, 'workers': recipe.workers, 'download': recipe.dataset_download}
        settings['num_classes'] = recipe.num_classes
        train: Any = StreamData(recipe.dataset, recipe.data_dir, recipe.train_split, classes=classes, **settings)
        held_out: Any = None
        if recipe.val_split:
            split = recipe.val_split
            held_out = StreamData(recipe.dataset, recipe.data_dir, split, classes=train.classes, **settings)
        elif recipe.val_size:
            train, held_out = split_holdout(train, recipe.val_size, split_seed)
        return train, held_out
    data = load_dataset(recipe.dataset, recipe.data_dir, recipe.train_split, recipe.dataset_download)
    data = data.with_classes(classes) if classes else data
    rest, held = data, None
    if recipe.val_split:
        held = load_dataset(recipe.dataset, recipe.data_dir, recipe.val_split, recipe.dataset_download)
        held = held.with_classes(data.classes)
    elif recipe.val_size:
        rest, held = split_holdout(data, recipe.val_size, split_seed)
    return rest, held


def default_size(model: str) -> int:
    """Pixels a side of the images that a registered model was made for."""
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return cfg.input_size[-1] if cfg else 224


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
        size = data.img_size
        return (3, size, size) if isinstance(size, int) else (3, *size)
    channels, height, width = data.images.shape[1:]
    return channels, height, width
