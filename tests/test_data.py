import hashlib
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_robust.data import ImageData, TrainBatches, load_dataset, split_holdout
from timm_robust.data.batches import seed_of
from timm_robust.pixels import to_pixels

CIFAR = Path(__file__).parents[2] / 'shared/data/cifar10'
needs_cifar = pytest.mark.skipif(not CIFAR.is_dir(), reason='shared/data/cifar10 is not on this machine')


def make_data(n=40, size=(6, 8), classes=4, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (n, channels, *size), generator=generator).to(torch.uint8)
    return ImageData(images, torch.arange(n) % classes, tuple('abcdefghij'[:classes]), 'toy')


def png(pixels):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy() if pixels.ndim == 3 else pixels.numpy()).save(buffer, 'PNG')
    return buffer.getvalue()


def write_parquet(file, images, labels, image='img', label='label', names=None):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{'bytes': item, 'path': 'x.png'} for item in images]
    struct = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
    table = pa.table({image: pa.array(rows, struct), label: labels})
    if names:
        info = {'info': {'features': {label: {'names': names, '_type': 'ClassLabel'}}}}
        table = table.replace_schema_metadata({'huggingface': json.dumps(info)})
    pq.write_table(table, file)
    return file


# ImageData


def test_batches_and_pixels_cover_the_data_in_order():
    data = make_data(10)
    batches = list(data.batches(4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    x = torch.cat([x for x, _ in batches])
    assert x.dtype == torch.float32 and torch.equal(x, data.images / 255) and torch.equal(data.pixels(), x)
    assert torch.equal(data.pixels(torch.tensor([7, 2])), x[[7, 2]])
    assert torch.equal(data.subset([3, 1]).images, data.images[[3, 1]])
    assert len(data.first(3)) == 3 and data.first(10).num_classes == 4


class Divisors(TorchDispatchMode):
    """Notes the device of what is divided by, or None for a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'div' in str(func):
            self.seen = str(args[1].device) if isinstance(args[1], torch.Tensor) else None
        return func(*args, **(kwargs or {}))


def test_pixels_have_the_same_bits_on_every_device():
    levels = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(to_pixels(levels).numpy(), np.arange(256, dtype=np.float32) / np.float32(255))
    with FakeTensorMode(), Divisors() as divisors:
        to_pixels(torch.empty(3, dtype=torch.uint8, device='cuda'))
    assert divisors.seen == 'cuda:0'  # by a number a GPU does not divide, but multiply by its inverse


@pytest.mark.parametrize('n', [0, -1, 11])
def test_first_refuses_a_size_it_lacks(n):
    with pytest.raises(ValueError, match=rf'first {n} images of toy; allowed: 1\.\.10'):
        make_data(10).first(n)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'images': torch.zeros(2, 3, 4, 4)}, r'must be \[N, C, H, W\] of uint8, got \[2, 3, 4, 4\] of torch.float32'),
        ({'labels': torch.zeros(3, dtype=torch.int64)}, r'labels must be \[2\] of int64, got \[3\]'),
        ({'labels': torch.tensor([0.0, 1.0])}, r'labels must be .* of torch.float32'),
        ({'labels': torch.tensor([0, 2])}, r'toy, row 1: label 2 is not in 0\.\.1'),
        ({'labels': torch.tensor([-1, 1])}, r'toy, row 0: label -1 is not in 0\.\.1; is it unlabelled'),
    ],
)
def test_image_data_refuses_what_is_no_data_set(change, text):
    fields = {'images': torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 'labels': torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=text):
        ImageData(**{**fields, **change}, classes=('a', 'b'), name='toy')


# TrainBatches


def reference_crop(batches, step):
    """One image at a time, with the same draws."""
    data, pad, size = batches.data, batches.crop_padding, batches.batch_size
    height, width = data.images.shape[2:]
    generator = torch.Generator().manual_seed(seed_of(batches.seed, 'step', step))
    dy, dx = torch.randint(2 * pad + 1, (2, size, 1), generator=generator)[..., 0].tolist()
    flip = (torch.rand(size, 1, generator=generator) < batches.hflip)[:, 0].tolist()
    out = []
    for i, index in enumerate(batches.indices(step).tolist()):
        padded = torch.zeros(data.images.shape[1], height + 2 * pad, width + 2 * pad)
        padded[:, pad : pad + height, pad : pad + width] = data.images[index] / 255
        crop = padded[:, dy[i] : dy[i] + height, dx[i] : dx[i] + width]
        out.append(crop.flip(-1) if flip[i] else crop)
    return torch.stack(out), dy, dx, flip


@pytest.mark.parametrize(('pad', 'hflip'), [(0, 0.0), (0, 1.0), (3, 0.0), (3, 0.5)])
def test_crop_and_flip_equal_the_loop_over_images(pad, hflip):
    batches = TrainBatches(make_data(32), 32, seed=5, crop_padding=pad, hflip=hflip)
    expected, dy, dx, flip = reference_crop(batches, 2)
    x, y = batches[2]
    assert x.dtype == torch.float32 and torch.equal(x, expected)
    assert torch.equal(y, batches.data.labels[batches.indices(2)])
    assert set(dy) == set(dx) == set(range(2 * pad + 1))  # every offset, both ends included
    assert set(flip) == {0.0: {False}, 0.5: {True, False}, 1.0: {True}}[hflip]
    assert (x.amin() == 0) == (pad > 0) and x.amax() <= 1  # zeros come from the padding only


def test_a_batch_depends_on_seed_and_step_alone():
    data = make_data()
    forward = [TrainBatches(data, 8, seed=1)[step] for step in range(12)]
    reused = TrainBatches(data, 8, seed=1)
    torch.manual_seed(123)
    for step in reversed(range(12)):
        assert all(torch.equal(a, b) for a, b in zip(reused[step], forward[step], strict=True))
    assert not torch.equal(TrainBatches(data, 8, seed=2)[0][0], forward[0][0])
    assert not torch.equal(forward[0][0], forward[5][0])


@pytest.mark.parametrize(('size', 'steps'), [(8, 5), (16, 2)])
def test_an_epoch_holds_no_index_twice_drops_the_incomplete_batch_and_the_next_has_another_order(size, steps):
    batches = TrainBatches(make_data(), size, seed=0)
    assert batches.steps_per_epoch == steps
    first, second = (torch.cat([batches.indices(steps * epoch + i) for i in range(steps)]) for epoch in range(2))
    assert len(first.unique()) == len(second.unique()) == steps * size and not torch.equal(first, second)
    assert len(batches[steps - 1][1]) == len(batches[steps][1]) == size


@pytest.mark.parametrize(
    ('kwargs', 'text'),
    [
        ({'batch_size': 41}, r'batch_size 41 must lie in 1\.\.40'),
        ({'batch_size': 0}, 'batch_size 0 must'),
        ({'batch_size': 8, 'crop_padding': -1}, 'crop_padding must be 0 to 6'),
        ({'batch_size': 8, 'hflip': 1.5}, r'hflip in \[0, 1\], got 4 and 1.5'),
    ],
)
def test_train_batches_refuse_what_cannot_be_meant(kwargs, text):
    with pytest.raises(ValueError, match=text):
        TrainBatches(make_data(), seed=0, **kwargs)
    with pytest.raises(IndexError, match='step -1 is negative'):
        TrainBatches(make_data(), 8, seed=0)[-1]


# split_holdout


def test_holdout_is_disjoint_stratified_and_deterministic():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
        torch.randperm(100, generator=torch.Generator().manual_seed(3))
    ]
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)  # each image says which it is
    data = ImageData(images, labels, ('a', 'b', 'c'), 'toy')
    rest, held = split_holdout(data, 11, seed=0)
    assert held.labels.bincount().tolist() == [6, 3, 2]  # 5.5, 3.3, 2.2: the largest remainder gets the eleventh
    assert sorted([*rest.images.flatten().tolist(), *held.images.flatten().tolist()]) == list(range(100))
    assert torch.equal(held.labels, labels[held.images.flatten().long()])
    assert torch.equal(split_holdout(data, 11, seed=0)[1].images, held.images)
    assert not torch.equal(split_holdout(data, 11, seed=1)[1].images, held.images)


def test_holdout_of_none_and_of_too_many():
    rest, held = split_holdout(make_data(10), 0, seed=0)
    assert (len(rest), len(held)) == (10, 0)
    for n in (10, -1):
        with pytest.raises(ValueError, match=rf'cannot hold {n} images of toy out; allowed: 0\.\.9'):
            split_holdout(make_data(10), n, seed=0)


# load_dataset


def test_digits_split_is_stratified_and_scaled():
    pytest.importorskip('sklearn')
    train, test = load_dataset('digits'), load_dataset('digits', split='test')
    assert train.images.shape == (1437, 3, 32, 32) and test.images.shape == (360, 3, 32, 32)
    assert test.labels.bincount().min() >= 35 and test.labels.bincount().max() <= 37
    assert train.images.min() == 0 and train.images.max() > 240 and train.num_classes == 10
    both = {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in test.images}
    assert not both


@pytest.mark.parametrize('folder', ['.', 'data', 'plain_text'])
def test_parquet_round_trip(tmp_path, folder):
    images = make_data(5, (32, 32)).images
    encoded = [png(image) for image in images]
    write_parquet(tmp_path / folder / 'train-00000-of-00002.parquet', encoded[:3], [3, 1, 9])
    write_parquet(tmp_path / folder / 'train-00001-of-00002.parquet', encoded[3:], [0, 2])
    data = load_dataset('cifar10', tmp_path)
    assert torch.equal(data.images, images) and data.labels.tolist() == [3, 1, 9, 0, 2]
    assert data.classes[3] == 'cat' and data.name == 'cifar10'


def test_parquet_of_another_data_set(tmp_path):
    grey = make_data(2, (5, 7), channels=1).images[:, 0]
    file = tmp_path / 'flowers' / 'data' / 'validation.parquet'
    write_parquet(file, [png(image) for image in grey], [1, 0], image='image', names=['rose', 'tulip', 'iris'])
    data = load_dataset('parquet', tmp_path / 'flowers', split='validation')
    assert data.classes == ('rose', 'tulip', 'iris') and data.name == 'flowers'
    assert torch.equal(data.images, grey[:, None].expand(-1, 3, -1, -1))


def test_cifar100_takes_the_fine_labels(tmp_path):
    image = png(make_data(1, (32, 32)).images[0])
    write_parquet(tmp_path / 'cifar100' / 'test.parquet', [image], [99], label='fine_label')
    data = load_dataset('cifar100', tmp_path, split='test')
    assert data.labels.tolist() == [99] and data.num_classes == 100


SMALL, WIDE = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ('images', 'labels', 'kwargs', 'text'),
    [
        ([SMALL, SMALL], [0, 10], {}, r'cifar10, row 1: label 10 is not in 0\.\.9'),
        ([SMALL, SMALL], [-1, 0], {}, 'row 0: label -1 is not in'),
        ([SMALL, SMALL], [0, None], {}, r'train.parquet, row 1: label None is not a whole number'),
        ([SMALL, SMALL], ['cat', 'dog'], {}, "row 0: label 'cat' is not a whole number"),
        ([SMALL, WIDE], [0, 1], {}, 'train.parquet, row 1: the image is 4x6, others are 4x4; resize'),
        ([SMALL, b'junk'], [0, 1], {}, 'train.parquet, row 1: no readable image'),
        ([SMALL, None], [0, 1], {}, 'train.parquet, row 1: no readable image'),
        ([], [], {}, 'train.parquet holds no rows'),
        ([SMALL], [0], {'image': 'photo'}, 'no column img or image; it has photo, label'),
        ([SMALL], [0], {'label': 'target'}, 'no column label or fine_label; it has img, target'),
        ([SMALL], [0], {'names': ['a', 'b']}, 'has 2 classes, cifar10 has 10; to use it, say --dataset parquet'),
    ],
)
def test_parquet_errors_name_the_row(tmp_path, images, labels, kwargs, text):
    encoded = [png(image) if isinstance(image, torch.Tensor) else image for image in images]
    write_parquet(tmp_path / 'train.parquet', encoded, labels, **kwargs)
    with pytest.raises(ValueError, match=text):
        load_dataset('cifar10', tmp_path)


def test_parquet_files_of_other_class_lists_are_refused(tmp_path):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    write_parquet(tmp_path / 'train-0.parquet', [png(image)], [1], names=['ant', 'bee'])
    write_parquet(tmp_path / 'train-1.parquet', [png(image)], [1], names=['bee', 'cow'])
    with pytest.raises(ValueError, match=r'train-1\.parquet has the classes bee, cow, .*train-0\.parquet has ant, bee'):
        load_dataset('parquet', tmp_path)


def test_parquet_pictures_of_more_than_eight_bits_are_refused(tmp_path):
    write_parquet(tmp_path / 'train.parquet', [png(torch.from_numpy(np.full((4, 4), 3000, np.uint16)))], [0])
    with pytest.raises(ValueError, match=r'row 0: no readable image: mode I.* has more than 8 bits a channel'):
        load_dataset('parquet', tmp_path)


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip('pyarrow')
    (tmp_path / 'train.parquet').write_text('version https://git-lfs.github.com/spec/v1')
    with pytest.raises(ValueError, match=r'train\.parquet is no whole parquet file \(or a Git LFS pointer'):
        load_dataset('cifar10', tmp_path)


@pytest.mark.parametrize(
    ('name', 'texts'),
    [
        ('cifar10', ['cifar-10-batches-py/', 'train*.parquet', 'plain_text']),
        ('torch/cifar100', ['cifar-100-python/', 'cifar-100-python.tar.gz']),
        ('parquet', ['train*.parquet']),
        ('npz', ['looked for train.npz']),
        ('npy', ['train_image.npy and train_label.npy']),
    ],
)
def test_missing_data_says_what_was_looked_for(tmp_path, name, texts):
    for folder in (tmp_path, tmp_path / 'absent'):
        with pytest.raises(FileNotFoundError) as caught:
            load_dataset(name, folder)
        message = str(caught.value)
        assert all(text in message for text in [*texts, str(folder), f'no train split of {name}; ', '--data-dir'])
        assert ('does not exist' in message) == (folder != tmp_path)
        assert ('--dataset-download' in message) == ('cifar' in name)
        assert not (folder / 'cifar-10-batches-py').exists()
    with pytest.raises(FileNotFoundError, match=f"dataset '{name}' needs a folder: add --data-dir"):
        load_dataset(name)


def test_torch_spelling_ignores_parquet_files(tmp_path):
    (tmp_path / 'train.parquet').touch()
    with pytest.raises(FileNotFoundError, match='no train split of torch/cifar10'):
        load_dataset('torch/cifar10', tmp_path)


def write_torchvision(folder, monkeypatch, archive):
    """Two files in torchvision's layout, with their MD5s patched in."""
    from torchvision.datasets import CIFAR10

    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)
    lists = {}
    for split, name, shift in (('train', 'data_batch_1', 0), ('test', 'test_batch', 4)):
        pixels = (torch.arange(2 * 3072) % 251 + shift).to(torch.uint8).view(2, 3072).numpy()
        (base / name).write_bytes(pickle.dumps({'data': pixels, 'labels': [6, 9]}))
        lists[split] = [[name, hashlib.md5((base / name).read_bytes()).hexdigest()]]
    (base / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('abcdefghij')}))
    monkeypatch.setattr(CIFAR10, 'train_list', lists['train'])
    monkeypatch.setattr(CIFAR10, 'test_list', lists['test'])
    md5 = hashlib.md5((base / 'batches.meta').read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, 'meta', {'filename': 'batches.meta', 'key': 'label_names', 'md5': md5})
    if archive:
        with tarfile.open(folder / CIFAR10.filename, 'w:gz') as tar:
            tar.add(base, CIFAR10.base_folder)
        monkeypatch.setattr(CIFAR10, 'tgz_md5', hashlib.md5((folder / CIFAR10.filename).read_bytes()).hexdigest())
        for file in base.iterdir():
            file.unlink()
        base.rmdir()
    return base


@pytest.mark.parametrize('archive', [False, True])
@pytest.mark.parametrize('name', ['cifar10', 'torch/cifar10'])
def test_torchvision_folder_and_archive(tmp_path, monkeypatch, name, archive):
    write_torchvision(tmp_path, monkeypatch, archive)
    data = load_dataset(name, tmp_path, split='test')
    assert data.labels.tolist() == [6, 9] and data.name == 'cifar10' and data.classes[0] == 'a'
    assert torch.equal(data.images[0], ((torch.arange(3072) % 251) + 4).to(torch.uint8).view(3, 32, 32))


def test_damaged_torchvision_folder(tmp_path, monkeypatch):
    base = write_torchvision(tmp_path, monkeypatch, archive=False)
    (base / 'test_batch').write_bytes(b'half')
    with pytest.raises(FileNotFoundError, match=r'incomplete or damaged: .*--dataset-download'):
        load_dataset('cifar10', tmp_path)


def test_a_failed_download_says_where_to_fetch_by_hand(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, 'url', (tmp_path / 'nowhere.tar.gz').as_uri())
    with pytest.raises(OSError, match=r'cannot fetch cifar10 into .*nowhere\.tar\.gz there by hand'):
        load_dataset('cifar10', tmp_path, download=True)


@pytest.mark.parametrize(
    ('args', 'text'),
    [
        (('cifar-10',), "dataset 'cifar-10' is unknown; allowed: cifar10, cifar100"),
        (('digits', None, 'val'), "split 'val' of digits is unknown; allowed: train, test$"),
        (('parquet', None, 'val'), "split 'val' of parquet is unknown; allowed: train, test, validation"),
    ],
)
def test_unknown_names(args, text):
    with pytest.raises(ValueError, match=text):
        load_dataset(*args)


@pytest.mark.parametrize(
    ('name', 'module', 'package'),
    [
        ('digits', 'sklearn.datasets', 'scikit-learn'),
        ('cifar10', 'pyarrow.parquet', 'pyarrow'),
    ],
)
def test_missing_library_says_what_to_install(tmp_path, monkeypatch, name, module, package):
    if name == 'cifar10':
        write_parquet(tmp_path / 'train.parquet', [png(SMALL)], [0])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module} is not installed; type: pip install {package}'):
        load_dataset(name, tmp_path)


@needs_cifar
def test_shared_cifar_has_the_official_order():
    data = load_dataset('cifar10', CIFAR, split='test')
    assert data.images.shape == (10000, 3, 32, 32) and data.labels.bincount().tolist() == [1000] * 10
    assert data.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1] and data.classes[3] == 'cat'
    assert data.images[0, :, 0, 0].tolist() == [158, 112, 49]  # the official first test image, 8-bit RGB
