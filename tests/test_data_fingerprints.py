import dataclasses

import numpy
import pytest
import torch
from PIL import Image

from timm_robust.data import ExtraImages, ImageData, StreamData, fingerprint


def data(n=6, **changes):
    images = torch.arange(n * 12, dtype=torch.uint8).view(n, 3, 2, 2)
    return dataclasses.replace(ImageData(images, torch.arange(n) % 2, ('a', 'b'), 'toy'), **changes)


def test_images_in_memory():
    whole = data()
    assert fingerprint(whole) == fingerprint(data(name='other')) and fingerprint(whole).startswith('6 images #')
    images, labels = whole.images.clone(), whole.labels.clone()
    images[5, 2, 1, 1] += 1
    labels[0] = 1
    others = [data(5), data(images=images), data(labels=labels), whole.subset([1, 0, 2, 3, 4, 5])]
    assert len({fingerprint(other) for other in (whole, *others)}) == 5


def test_generated_images(tmp_path):
    found = set()
    for number in (0, 0, 1):
        images = numpy.full((4, 2, 2, 3), number, numpy.uint8)
        numpy.savez(tmp_path / f'{number}.npz', image=images, label=numpy.arange(4) % 2)
        found.add(fingerprint(ExtraImages(str(tmp_path / f'{number}.npz'), 2)))
    assert len(found) == 2


@pytest.fixture
def folder(tmp_path):
    for place in ('here', 'there/deeper'):
        for number in range(6):
            path = tmp_path / place / 'train' / 'ab'[number % 2] / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8), (number, 0, 0)).save(path)
    return tmp_path


def test_images_in_files_wherever_they_lie(folder):
    def of(root):
        return fingerprint(StreamData('folder', str(root), img_size=8, workers=0))

    first, root = of(folder / 'here'), folder / 'there/deeper'
    assert first == of(root) and first.startswith('6 images #')
    seen = {first}
    image = root / 'train/a/0.png'
    Image.new('RGB', (99, 77)).save(image)  # of the same name, but another
    seen.add(of(root))
    image.rename(root / 'train/a/00.png')
    seen.add(of(root))
    (root / 'train/a/00.png').rename(root / 'train/b/00.png')
    seen.add(of(root))
    (root / 'train/b/00.png').unlink()
    seen.add(of(root))
    assert len(seen) == 5
    half = StreamData('folder', str(folder / 'here'), img_size=8, workers=0).subset([0, 1, 2])
    assert fingerprint(half).startswith('3 images #')
