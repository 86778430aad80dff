"""Pictures for the page: what a visitor uploads, read with care, and ten test images that the package brings."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from timm.data import resolve_data_config
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from ..data import CIFAR10_CLASSES, ImageData, eval_transform
from ..models import trained_classes
from ..pixels import input_channels, to_pixels

EXAMPLES = Path(__file__).with_name('examples.png')
"""The first official CIFAR-10 test image of each class (Krizhevsky 2009), side by side in the order of the labels."""
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')
MAX_BYTES, MAX_PIXELS, MAX_RATIO = 10_000_000, 25_000_000, 20
_ALLOWED = f'allowed: one picture as {", ".join(FORMATS)}'
_ROOM = f'allowed: up to {MAX_PIXELS / 1e6:.0f} million; make it smaller first'


def read_picture(path: str | Path) -> tuple[Image.Image, str]:
    """A picture out of a file of anyone's, upright, in RGB, transparent parts white; and what was done to it.

    The size in the header is checked before a pixel is decoded, and no reader runs but those of FORMATS. Of an
    animation the first frame is taken.

    Raises:
        ValueError: for what is no picture, damaged, or too large, saying what is allowed.
    """
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f'this file has {size / 1e6:.1f} MB; allowed: up to {MAX_BYTES / 1e6:.0f} MB')
    with _opened(path) as image:
        _check_size(*image.size)
        if image.mode[0] in 'IF':
            raise ValueError(f'this picture has pixels of kind {image.mode}; allowed: 8 bits a channel')
        try:
            animated = getattr(image, 'is_animated', False)
            picture = ImageOps.exif_transpose(image).convert('RGBA')
        except Exception:  # on damaged files Pillow's readers end in OSError, SyntaxError, EOFError, struct.error, ...
            raise ValueError(f'this picture is damaged or not whole; {_ALLOWED}') from None
    flat = Image.new('RGBA', picture.size, 'white')
    flat.alpha_composite(picture)
    return flat.convert('RGB'), 'an animation, of which the first frame is taken' if animated else ''


def _opened(path: str | Path) -> Image.Image:
    """The picture with its header read, and nothing decoded."""
    try:
        return Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f'this picture has too many pixels; {_ROOM}') from None
    except Exception:
        raise ValueError(f'this file is no picture that can be read; {_ALLOWED}') from None


def _check_size(width: int, height: int) -> None:
    """Refuse what would fill the memory: many pixels, or a strip, which grows as its short side is brought to size."""
    if width * height > MAX_PIXELS:
        raise ValueError(f'this picture has {width} x {height} pixels; {_ROOM}')
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f'this picture of {width} x {height} pixels is a strip; allowed: a long side of at most {MAX_RATIO} times '
            'the short one'
        )


def example(label: int) -> Image.Image:
    """The example of a class of CIFAR-10, 32 x 32 pixels in RGB."""
    with Image.open(EXAMPLES) as sheet:
        return sheet.convert('RGB').crop((32 * label, 0, 32 * label + 32, 32))


def example_data() -> ImageData:
    """The examples as a data set, one image a class."""
    labels = torch.arange(len(CIFAR10_CLASSES))
    images = torch.stack([pil_to_tensor(example(int(label))) for label in labels])
    return ImageData(images, labels, CIFAR10_CLASSES, 'the ten examples of the page')


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes, by its data configuration."""
    config = dict(getattr(model, 'pretrained_cfg', None) or {})
    found = resolve_data_config({}, pretrained_cfg=config)['input_size']
    side = config.get('img_size')
    height, width = (side, side) if side else found[-2:]
    return input_channels(model) or found[0], height, width


def as_input(picture: Image.Image, model: nn.Module) -> torch.Tensor:
    """What a model sees of a picture, [1, C, H, W] in [0, 1]: resized and cropped as its data configuration says.

    A picture of exactly its size stays as it is. Mean and standard deviation are not applied here: attacks do it.
    """
    channels, height, width = input_size(model)
    picture = picture.convert('L' if channels == 1 else 'RGB')
    if picture.size == (width, height):
        return to_pixels(pil_to_tensor(picture)[None])
    transform = eval_transform((height, width), getattr(model, 'pretrained_cfg', None))
    return to_pixels(transform(picture)[None])


def classes_of(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's classes: those of training, CIFAR-10's for weights whose tag says so, else numbers."""
    config, count = getattr(model, 'pretrained_cfg', None) or {}, int(getattr(model, 'num_classes', 0))
    if names := trained_classes(model):
        return names
    if count == len(CIFAR10_CLASSES) and 'cifar10' in str(config.get('tag')).split('_'):
        return CIFAR10_CLASSES
    return tuple(f'class {number}' for number in range(count))
