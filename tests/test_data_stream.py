import importlib.util
import io
import json
import random
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from timm_robust.data import (
    ImageData,
    StreamBatches,
    StreamData,
    fingerprint,
    is_stream,
    load_dataset,
    reader_fault,
    split_holdout,
)
from timm_robust.data.classes import new_labels
from timm_robust.evaluation.split import read_split
from timm_robust.models import load_model
from timm_robust.training.batches import read_data
from timm_robust.training.recipe import Recipe

CLASSES = ('ant', 'bee', 'cat')


def encoded(number, size=(24, 20)):
    """A PNG whose every pixel is its number, so that resizing and cropping leave it readable."""
    buffer = io.BytesIO()
    Image.new('RGB', size, (number, 0, 255)).save(buffer, 'PNG')
    return buffer.getvalue()


def noisy(number, size=(24, 20)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, 'PNG')
    return buffer.getvalue()


def write_folder(root, make=encoded, n=30, split='train'):
    """n images, number i of class i % 3; timm's order is by class, then by number."""
    for number in range(n):
        folder = root / split / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{number:03}.png').write_bytes(make(number, (24 + number % 5, 20)))
    return root


def write_tar(root, n=30):
    write_folder(root / 'unpacked', n=n)
    with tarfile.open(root / 'train.tar', 'w') as tar:
        tar.add(root / 'unpacked' / 'train', '.')
    return root / 'train.tar'


def numbers(x):
    """Which images a batch holds."""
    return (255 * x[:, 0]).round().long().flatten(1).float().mean(1).round().long().tolist()


def in_order(n=30):
    return [number for label in range(3) for number in range(label, n, 3)]


def stream(root, split='train', **settings):
    return StreamData('', root, split, **{'img_size': 16, 'workers': 0, **settings})


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


# StreamData


@pytest.mark.parametrize('name', ['', 'folder'])
@pytest.mark.parametrize('workers', [0, 2])
def test_every_image_once_in_order(folder, name, workers):
    data = StreamData(name, folder, img_size=16, workers=workers)
    assert len(data) == 30 and data.classes == CLASSES and data.num_classes == 3 and data.name == folder.name
    batches = list(data.batches(8))
    assert [len(y) for _, y in batches] == [8, 8, 8, 6]
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    assert x.shape == (30, 3, 16, 16) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert numbers(x) == in_order() and y.tolist() == [number % 3 for number in in_order()]
    assert (x[:, 1] == 0).all() and (x[:, 2] == 1).all()  # not normalised
    assert torch.equal(data.labels, y)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_tar_holds_the_same_images(tmp_path, workers):
    for root in (write_tar(tmp_path), tmp_path):  # the file, and the folder with a .tar for each split
        data = StreamData('folder', root, img_size=16, workers=workers)
        assert len(data) == 30 and data.classes == CLASSES and data.name == tmp_path.name
        assert sorted(number for x, _ in data.batches(8) for number in numbers(x)) == list(range(30))
        x, y = next(iter(data.batches(30)))
        assert [number % 3 for number in numbers(x)] == y.tolist() == data.labels.tolist()


def test_pictures_of_other_formats_are_read_and_folders_without_any_are_named(tmp_path, caplog):
    train = write_folder(tmp_path, n=3) / 'train'
    for ending in ('webp', 'BMP', 'tiff'):
        (train / 'wasp').mkdir(exist_ok=True)
        Image.new('RGB', (20, 20), (90, 90, 90)).save(train / f'wasp/one.{ending}')
    (tmp_path / 'elsewhere').mkdir()
    Image.new('RGB', (20, 20), (90, 90, 90)).save(tmp_path / 'elsewhere/one.png')
    (train / 'flying').mkdir()
    (train / 'flying/moth').symlink_to(tmp_path / 'elsewhere')
    (train / 'fly').mkdir()
    (train / 'fly/one.heic').write_bytes(b'heic')
    data = stream(tmp_path)
    assert data.classes == (*CLASSES, 'moth', 'wasp') and len(data) == 7
    assert numbers(next(data.batches(7))[0])[3:] == [90] * 4
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith(f'{train / "fly"} is no class: it holds no picture (.png, ')
    assert told[1:] == [f'{train}: classes are the innermost folders, such as flying/moth']


@pytest.mark.parametrize(
    ('places', 'fault'),
    [
        (['ant/2019', 'ant/2020', 'bee/2019', 'bee/2020'], 'ant/2019 and bee/2019 would be one class, 2019;'),
        (['ant', 'bee', '.'], 'pictures lie beside the folders of the classes;'),
        (['ant', 'ant/.ipynb_checkpoints', 'bee'], 'ant/.ipynb_checkpoints is hidden and holds pictures;'),
        (['ant', 'ant/old', 'bee'], 'ant/old lies in ant, and both hold pictures;'),
    ],
)
def test_pictures_that_would_get_wrong_labels_are_refused(tmp_path, places, fault):
    for place in places:
        (tmp_path / 'train' / place).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 20)).save(tmp_path / 'train' / place / 'one.png')
    with pytest.raises(ValueError, match=re.escape(f'{tmp_path / "train"}: {fault} put the pictures of each class')):
        stream(tmp_path)


def test_pictures_of_more_than_eight_bits_are_named_not_cut_off(tmp_path, caplog):
    train = write_folder(tmp_path, n=300) / 'train'
    Image.fromarray(np.full((20, 20), 3000, np.uint16)).save(train / 'ant/000.tiff')
    data = stream(tmp_path)
    assert len(data) == 301 and sum(len(y) for _, y in data.batches(100)) == 300
    assert list(data.unreadable.values()) == ['ant/000.tiff']
    assert 'more than 8 bits a channel; save it with 8' in caplog.text


def test_reading_is_timed_though_a_picture_cannot_be_read(tmp_path):
    train = write_folder(tmp_path, n=300) / 'train'
    (train / 'ant/000.png').write_bytes(b'junk')
    data = stream(tmp_path)
    with pytest.raises(ValueError, match=r'1 of 20 pictures of .* cannot be read'):
        data.first(20).in_memory()
    assert len(data.probe(20).in_memory()) == 19 and len(data.probe(1000)) == 300
    assert sum(len(y) for _, y in data.batches(100)) == 299


def test_a_tar_holds_pictures_of_other_formats_too(tmp_path):
    train = write_folder(tmp_path / 'unpacked', n=3) / 'train'
    Image.new('RGB', (20, 20), (90, 90, 90)).save(train / 'ant/one.webp')
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(train, '.')
    assert len(stream(tmp_path)) == 4


def test_the_centre_is_cropped_after_resizing(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = 255  # of the 35 pixels in the middle, 0.875 of the shorter side, that a square shows
    Image.fromarray(pixels).save(write_folder(tmp_path, n=3) / 'train/ant/000.png')
    x, _ = next(stream(tmp_path, img_size=28).first(1).batches(1))
    assert x.shape == (1, 3, 28, 28) and x.mean() == pytest.approx(20 / 35, abs=0.01)


def test_the_crop_is_that_of_the_models_data_configuration(tmp_path):
    write_folder(tmp_path, n=20, make=lambda number, size: noisy(number, (32, 32)))
    write_folder(tmp_path, n=3, split='val', make=lambda number, size: noisy(number, (32, 32)))
    exact = stream(tmp_path, img_size=32, data_config={'crop_pct': 1.0}).in_memory()
    with Image.open(tmp_path / 'train/ant/000.png') as picture:
        assert torch.equal(exact.images[0], torch.tensor(np.array(picture)).permute(2, 0, 1))
    zoomed = stream(tmp_path, img_size=32).in_memory()
    assert not torch.equal(zoomed.images, exact.images)
    model = load_model('resnet18_relu', width=4)  # made for 32 pixels, and crop_pct 1
    assert torch.equal(read_split(model, 'folder', str(tmp_path), 'train').images, exact.images)
    model.pretrained_cfg = {}
    assert torch.equal(read_split(model, 'folder', str(tmp_path), 'train', img_size=32).images, zoomed.images)
    recipe = Recipe(model='resnet18_relu', dataset='folder', data_dir=str(tmp_path), val_split='auto', workers=0)
    held_out = read_data(recipe, 0)[1]
    assert torch.equal(
        held_out.in_memory().images,
        stream(tmp_path, 'val', img_size=32, data_config={'crop_pct': 1.0}).in_memory().images,
    )


@pytest.mark.parametrize(
    'said', [{'crop_pct': 'much'}, {'interpolation': 'magic'}, {'crop_pct': [1]}, {'crop_pct': 1e-9}, {'crop_pct': 50}]
)
def test_a_data_configuration_that_timm_cannot_resize_by_is_named(folder, said):
    with pytest.raises(ValueError, match='data configuration cannot be resized by') as error:
        stream(folder, data_config=said)
    assert str(next(iter(said.values()))) in str(error.value)


def test_subset_first_holdout_and_memory(folder):
    data = stream(folder)
    assert numbers(next(data.subset([29, 3]).batches(5))[0]) == [in_order()[29], in_order()[3]]
    first = data.first(4)
    assert len(first) == 4 and numbers(next(first.batches(5))[0]) == in_order()[:4] and len(data) == 30
    rest, held = split_holdout(data, 6, seed=0)
    assert (len(rest), len(held)) == (24, 6) and held.labels.bincount().tolist() == [2, 2, 2]
    seen = [numbers(x) for part in (rest, held) for x, _ in part.batches(30)]
    assert sorted(seen[0] + seen[1]) == list(range(30))
    again, _ = split_holdout(rest, 3, seed=0)
    assert set(numbers(next(again.batches(30))[0])) < set(seen[0])
    memory = held.in_memory()
    x, y = next(held.batches(6))
    assert torch.equal(memory.pixels(), x) and torch.equal(memory.labels, y) and memory.classes == CLASSES
    for n in (0, 31):
        with pytest.raises(ValueError, match=rf'first {n} images of .*; allowed: 1\.\.30'):
            data.first(n)


def test_a_split_is_found_by_its_names_and_never_taken_for_another(tmp_path):
    write_folder(tmp_path, n=6), write_folder(tmp_path, n=3, split='val')
    assert len(StreamData('', tmp_path)) == 6 and len(StreamData('', tmp_path, 'validation')) == 3
    for name in ('Training', 'Testing'):
        write_folder(tmp_path / 'capitals', n=3, split=name)
    with pytest.raises(FileNotFoundError, match="holds Testing, Training, but no split 'train'; name one of them"):
        StreamData('', tmp_path / 'capitals', 'train')
    assert len(StreamData('', tmp_path / 'capitals', 'Testing')) == 3
    (tmp_path / 'val/train.txt').touch()
    assert len(StreamData('', tmp_path / 'val', 'test')) == 3  # a folder of classes is what it is
    with pytest.raises(FileNotFoundError, match="holds train, val, but no split 'test'; name one of them with --split"):
        StreamData('', tmp_path, 'test')
    with pytest.raises(FileNotFoundError, match='absent does not exist; name the right one with --data-dir'):
        StreamData('', tmp_path / 'absent')
    with pytest.raises(FileNotFoundError, match=r"'wds/x' needs a folder|webdataset"):
        StreamData('wds/x', None)
    with pytest.raises(ValueError, match=r"cannot open split 'train'.*0 images"):
        (tmp_path / 'empty').mkdir()
        StreamData('', tmp_path / 'empty')


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'name': 'imagenet'}, "dataset 'imagenet' is unknown; allowed: folder, torch/<name>, hfds/<name>, wds/<name>"),
        ({'name': 'torch/nothing'}, 'Unknown torchvision dataset nothing'),
        ({'name': 'torch/MNIST', 'split': 'trian'}, "torch/MNIST has the splits train and test, not 'trian'"),
        ({'num_classes': 2}, 'has 3 classes, so num_classes 2 is too small'),
    ],
)
def test_stream_data_refuses_what_cannot_be_meant(folder, change, text):
    with pytest.raises(ValueError, match=text):
        StreamData(**{'name': '', 'root': folder, **change})


def test_more_classes_than_folders(folder):
    assert StreamData('', folder, num_classes=5).classes == (*CLASSES, '3', '4')


def test_missing_library_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    for name, library in (('wds/x', 'webdataset'), ('hfds/x', 'datasets'), ('tfds/x', 'tensorflow_datasets')):
        with pytest.raises(ImportError, match=f'{library} is not installed; .* pip install {library}'):
            StreamData(name, folder)


def test_which_names_are_streamed():
    assert all(map(is_stream, ('', 'folder', 'wds/x', 'hfds/a/b', 'torch/imagenet', 'HFDS/x')))
    assert not any(map(is_stream, ('cifar10', 'torch/cifar10', 'npz', 'digits', 'parquet')))
    with pytest.raises(ValueError, match="dataset 'folder' is unknown"):
        load_dataset('folder')


def test_torchvision_data_and_a_label_without_a_class(folder):
    data = StreamData('torch/image_folder', folder, img_size=16, workers=0)
    assert data.classes == CLASSES and numbers(next(data.batches(30))[0]) == in_order()
    assert data.labels.tolist() == [number % 3 for number in in_order()] and data.name == 'image_folder'
    data.dataset.targets[4], data.dataset.samples[4] = 7, (data.dataset.samples[4][0], 7)
    with pytest.raises(ValueError, match=r'label 7 is not in 0\.\.2; is it unlabelled'):
        _ = StreamData.labels.fget(data._with(_all_labels=None))
    with pytest.raises(ValueError, match=r'label 7 is not in 0\.\.2'):
        list(data.batches(8))


# The classes of training, and pictures that cannot be read


def test_a_split_that_lacks_a_class_keeps_its_labels(tmp_path):
    write_folder(tmp_path)
    shutil.copytree(tmp_path / 'train', tmp_path / 'val')
    shutil.rmtree(tmp_path / 'val/ant')
    held = stream(tmp_path, 'val', classes=CLASSES)
    assert held.classes == CLASSES and set(held.labels.tolist()) == {1, 2}
    x, y = next(held.batches(20))
    assert y.tolist() == [number % 3 for number in numbers(x)] == held.labels.tolist()
    (tmp_path / 'val/bee').rename(tmp_path / 'val/dog')
    with pytest.raises(ValueError, match='has classes that training did not have: dog; those of training are ant, bee'):
        StreamData('', tmp_path, 'val', classes=CLASSES)


def test_validation_and_a_resumed_run_keep_the_classes_of_training(tmp_path):
    write_folder(tmp_path)
    shutil.copytree(tmp_path / 'train', tmp_path / 'val')
    shutil.rmtree(tmp_path / 'val/ant')
    recipe = Recipe(model='test_resnet', dataset='folder', data_dir=str(tmp_path), val_split='val', workers=0)
    train, held = read_data(recipe, 0)
    assert train.classes == held.classes == CLASSES and set(held.labels.tolist()) == {1, 2}
    shutil.rmtree(tmp_path / 'train/bee')
    train, held = read_data(recipe, 0, CLASSES)
    assert set(train.labels.tolist()) == {0, 2} and set(held.labels.tolist()) == {1, 2}


def test_classes_are_held_against_each_other_by_name():
    assert new_labels(('a', 'b'), ('a', 'b', 'c'), 'x') is None
    assert new_labels(('c', 'a'), ('a', 'b', 'c'), 'x') == [2, 0]
    assert new_labels(('0', '1', '3'), ('0', '1', '2', '3'), 'x') == [0, 1, 3]  # folders called by numbers
    for theirs, ours in ((('0', '1'), ('a', 'b')), (('a', 'b'), ('0', '1')), (('a', '1'), ('a', 'b'))):
        assert new_labels(theirs, ours, 'x') in (None, [0, 1])  # without names there is nothing to compare
    for theirs in (('a', 'd'), ('A', 'b'), ('0', '1', '2', '3')):
        with pytest.raises(ValueError, match=r'x has classes that training did not have: [dA3];'):
            new_labels(theirs, ('a', 'b', 'c'), 'x')
    assert new_labels(('bee', 'crab'), ('bee', 'cra'), 'x') is None  # as the Hub's CIFAR-100 calls it
    numbers, from_one = (tuple(map(str, range(first, first + 10))) for first in (0, 1))
    assert new_labels(numbers, from_one, 'x') is new_labels(from_one, numbers, 'x') is None  # one side has no names
    with pytest.raises(ValueError, match='x has classes that training did not have: 0;'):
        new_labels(('0', 'cat'), ('cat', 'dog'), 'x')
    data = ImageData(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0]), ('c', 'a'), 'x')
    moved = data.with_classes(('a', 'b', 'c'))
    assert moved.labels.tolist() == [2, 0, 2] and moved.classes == ('a', 'b', 'c')


def spoil(root, count, n=400, split='train'):
    """A folder of n pictures of which some, evenly spread, are cut off, empty, or too large to be meant."""
    write_folder(root, lambda number, size: encoded(number % 256, size), n=n, split=split)
    bomb = Image.new('1', (20_000, 20_000))  # beyond what PIL decodes
    buffer = io.BytesIO()
    bomb.save(buffer, 'PNG')
    names = []
    for k in range(count):
        path = root / split / CLASSES[k % 3] / f'{k:03}.png'
        path.write_bytes([path.read_bytes()[:-40], b'', buffer.getvalue()][k % 3])
        names.append(f'{CLASSES[k % 3]}/{k:03}.png')
    return names


def test_pictures_that_cannot_be_read_are_left_out_counted_and_named(tmp_path, caplog):
    names = spoil(tmp_path, 3)
    data = stream(tmp_path)
    memory = data.in_memory()
    assert len(memory) == 397 and sorted(data.unreadable.values()) == sorted(names)
    assert [number % 256 for number in in_order(400) if number > 2] == numbers(memory.pixels())
    [note] = memory.notes
    assert '3 of 400 pictures' in note and all(name in note for name in names) and str(tmp_path) not in note
    assert all(any(name in line for line in caplog.messages) for name in names)
    few = data.subset(range(40))  # of which one cannot be read: more than 1 %
    with pytest.raises(ValueError, match=r'1 of 40 pictures .* cannot be read \(ant/000.png\); at most 1% may be'):
        few.in_memory()


@pytest.mark.parametrize('workers', [0, 2])
def test_training_puts_others_of_the_batch_in_their_place_and_refuses_many(tmp_path, workers):
    spoil(tmp_path, 3)
    data = stream(tmp_path, workers=workers)
    batches = plain(StreamBatches(data, 100, 0))
    for step in range(4):
        x, y = batches[step]
        assert len(x) == 100 and (x[:, 2].mean((1, 2)) > 0.9).all()  # none is blank
        rows = data.rows[indices(batches, step)]
        good = torch.tensor([row not in data.unreadable for row in rows.tolist()])
        assert torch.equal(y[good], data.labels[rows[good]])
    assert len(data.unreadable) == 3
    spoil(tmp_path, 5)
    batches = StreamBatches(data, 100, 0)  # the workers of the first have read ahead
    with pytest.raises(ValueError, match=r'5 of 400 pictures .* cannot be read .*, \.\.\.\); at most 1%'):
        for step in range(4):
            batches[step]


# StreamBatches


def make_batches(root, workers=0, seed=0):
    return StreamBatches(stream(root, workers=workers), 7, seed)


def indices(batches, step):
    """Which images of its data a batch holds."""
    return batches._order.batch(step, batches.batch_size)[1][batches.own]


def plain(batches):
    """The batches without augmentation."""
    batches.transform = batches.data.transform
    return batches


def test_an_epoch_is_a_permutation_and_drops_the_rest(folder):
    batches = make_batches(folder)
    assert batches.steps_per_epoch == 4 and batches.batch_size == 7 and len(batches.data) == 30
    orders = []
    for epoch in range(2):
        orders.append([])
        for step in range(4 * epoch, 4 * epoch + 4):
            x, y = batches[step]
            assert x.shape == (7, 3, 16, 16) and x.dtype == torch.float32 and y.dtype == torch.int64
            assert y.tolist() == batches.data.labels[indices(batches, step)].tolist()
            orders[-1] += indices(batches, step).tolist()
    assert all(len(set(order)) == 28 for order in orders) and orders[0] != orders[1]


def test_the_rows_of_a_subset(folder):
    data = stream(folder).subset([28, 0, 15, 7])
    batches = plain(StreamBatches(data, 4, 0))
    x, y = batches[0]
    picked = [in_order()[[28, 0, 15, 7][index]] for index in indices(batches, 0).tolist()]
    assert numbers(x) == picked and y.tolist() == [number % 3 for number in picked]
    assert (x[:, 1] == 0).all() and (x[:, 2] == 1).all()  # not normalised


def test_batches_are_the_same_for_any_number_of_workers_and_after_a_restart(tmp_path):
    root = write_folder(tmp_path, noisy)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    alone = make_batches(root)
    expected = [alone[step] for step in range(6)]  # across the end of an epoch
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    many = make_batches(root, workers=2)
    for step in (*range(6), 2, 3, 5):  # 2: a restart in mid-epoch
        assert all(torch.equal(a, b) for a, b in zip(many[step], expected[step], strict=True)), step
    assert torch.equal(alone[5][0], expected[5][0])
    assert not torch.equal(make_batches(root, seed=1)[0][0], expected[0][0])


def test_the_callers_random_numbers_are_left_alone(folder):
    batches = make_batches(folder)
    draws = []
    for use in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if use:
            _ = batches[0], list(batches.data.batches(8))
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]


def test_an_image_is_augmented_anew_in_each_epoch(tmp_path):
    batches = StreamBatches(stream(write_folder(tmp_path, noisy, n=3)), 3, 0)
    pairs = [dict(zip(indices(batches, step).tolist(), batches[step][0], strict=True)) for step in (0, 1)]
    assert all(not torch.equal(pairs[0][index], pairs[1][index]) for index in range(3))


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'batch_size': 31}, r'batch_size 31 must lie in 1\.\.30'),
        ({'hflip': 2}, r'hflip must lie in \[0, 1\], got 2'),
    ],
)
def test_stream_batches_refuse_what_cannot_be_meant(folder, change, text):
    data = StreamData('', folder, workers=0)
    with pytest.raises(ValueError, match=text):
        StreamBatches(data, **{'batch_size': 8, 'seed': 0, **change})
    with pytest.raises(IndexError, match='step -1 is negative'):
        StreamBatches(data, 8, 0)[-1]


def test_a_failure_is_no_end_of_the_stream(folder):
    batches = make_batches(folder)
    for file in (folder / 'train').rglob('*.png'):
        file.rename(file.with_suffix('.gone'))
    for _ in range(2):
        with pytest.raises(ValueError, match=r'7 of 30 pictures of .* cannot be read'):
            _ = batches[0]
    for file in (folder / 'train').rglob('*.gone'):
        file.rename(file.with_suffix('.png'))
    assert len(make_batches(folder)[0][1]) == 7


# Web data sets


def write_shards(root, n=24, shards=2, make=encoded):
    pytest.importorskip('webdataset')
    names = [f'toy-train-{shard}.tar' for shard in range(shards)]
    for shard, name in enumerate(names):
        with tarfile.open(root / name, 'w') as tar:
            for number in range(shard, n, shards):
                for suffix, content in (('png', make(number)), ('cls', str(number % 3).encode())):
                    member = tarfile.TarInfo(f'{number:03}.{suffix}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    lengths = [len(range(shard, n, shards)) for shard in range(shards)]
    train = {'name': 'train', 'num_samples': n, 'filenames': names, 'shard_lengths': lengths}
    (root / '_info.json').write_text(json.dumps({'splits': {'train': train}}))
    return root


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_web_data_is_read_whole(tmp_path, workers):
    data = StreamData('wds/toy', write_shards(tmp_path), img_size=16, workers=workers, num_classes=3)
    assert len(data) == 24 and data.classes == ('0', '1', '2') and data.iterable and data.name == 'toy'
    for _ in range(2):
        seen = [
            (number, label) for x, y in data.batches(5) for number, label in zip(numbers(x), y.tolist(), strict=True)
        ]
        assert sorted(seen) == [(number, number % 3) for number in range(24)]
    first = data.first(5)
    assert [numbers(x) for x, _ in first.batches(4)] == [[0, 2, 4, 6], [8]] and len(first.in_memory()) == 5


def test_no_more_processes_read_web_data_than_it_has_files(tmp_path):
    shards = write_shards(tmp_path)
    found = [StreamData('wds/toy', shards, workers=workers, num_classes=3).readers for workers in (0, 1, 2, 8)]
    assert found == [0, 1, 2, 2]


def test_web_pictures_of_more_than_eight_bits_are_not_cut_off(tmp_path):
    def deep(number):
        buffer = io.BytesIO()
        Image.fromarray(np.full((20, 20), 3000, np.uint16)).save(buffer, 'PNG')
        return buffer.getvalue()

    data = StreamData('wds/toy', write_shards(tmp_path, make=deep), img_size=16, workers=0, num_classes=3)
    with pytest.raises(ValueError, match='more than 8 bits a channel; save it with 8'):
        next(data.batches(4))


@pytest.mark.parametrize('workers', [0, 2])
def test_web_batches_resume_in_mid_epoch(tmp_path, workers):
    data = StreamData('wds/toy', write_shards(tmp_path), img_size=16, workers=workers, num_classes=3)
    batches = plain(StreamBatches(data, 4, 0))
    assert batches.steps_per_epoch == 6
    expected = [batches[step] for step in range(9)]
    epoch = [number for x, _ in expected[:6] for number in numbers(x)]
    assert sorted(epoch) == list(range(24)) and epoch != list(range(24))
    resumed = plain(StreamBatches(data, 4, 0))
    for step in (7, 8, 3):
        assert all(torch.equal(a, b) for a, b in zip(resumed[step], expected[step], strict=True)), step
    assert numbers(expected[6][0]) + numbers(expected[7][0]) != epoch[:8]


def test_a_web_data_set_is_known_by_its_files(tmp_path):
    found = set()
    for number in (24, 24, 23):  # the same files twice
        data = StreamData('wds/toy', write_shards(tmp_path, number), img_size=16, workers=2, num_classes=3)
        found.add(fingerprint(data))
    assert len(found) == 2 and all(text.startswith(('24 images #', '23 images #')) for text in found)


def test_a_worker_that_died_is_told_in_a_line():
    killed = RuntimeError('DataLoader worker (pid 12) is killed by signal: Killed. ')
    full = RuntimeError('Caught it in DataLoader worker process 0.\nunable to write to file </torch_1_2_0>: No space\n')
    for error, start in ((killed, 'DataLoader worker (pid 12) is killed'), (full, 'unable to write to file </torch_')):
        text = reader_fault(error)
        assert text.startswith(start) and '--workers' in text and '--shm-size' in text and '\n' not in text
    assert reader_fault(RuntimeError('Caught RuntimeError in DataLoader worker process 0. Failed to load')) is None


def test_web_data_says_what_it_cannot(tmp_path):
    root = write_shards(tmp_path)
    with pytest.raises(ValueError, match='does not know the number of classes; add --num-classes N'):
        StreamData('wds/toy', root)
    with pytest.raises(ValueError, match=r"cannot open split 'test' .*split test not found"):
        StreamData('wds/toy', root, 'test', num_classes=3)
    (root / '_info.json').unlink()
    with pytest.raises(ValueError, match=r'knows no number of images; type it, as in --split "toy-train-0.tar\|10000"'):
        StreamData('wds/toy', root, 'toy-train-0.tar', num_classes=3)
    data = StreamData('wds/toy', root, 'toy-train-{0..1}.tar|30', img_size=16, workers=0, num_classes=3)
    with pytest.raises(ValueError, match='holds 24 readable images, not the 30 that its split claims'):
        list(data.batches(8))
    with pytest.raises(ValueError, match='labels alone'):
        split_holdout(data, 3, 0)
    with pytest.raises(ValueError, match='has an order, not numbers; validate on its own split'):
        data.subset([0])
    with pytest.raises(ValueError, match='cannot train on its first 8 images'):
        StreamBatches(data.first(8), 4, 0)
    narrow = StreamData('wds/toy', root, 'toy-train-{0..1}.tar|24', img_size=16, workers=0, num_classes=2)
    with pytest.raises(ValueError, match=r'label 2 is not in 0\.\.1'):
        list(narrow.batches(8))


def test_processes_read_their_own_rows_of_a_batch(folder):
    whole = StreamBatches(stream(folder), 8, 3)
    parts = [StreamBatches(stream(folder), 8, 3, own=slice(start, start + 4)) for start in (0, 4)]
    for step in (0, 1, whole.steps_per_epoch):
        x, y = whole[step]
        own = [part[step] for part in parts]
        assert torch.equal(x, torch.cat([one[0] for one in own])) and torch.equal(y, torch.cat([one[1] for one in own]))
        assert indices(whole, step).tolist() == [row for part in parts for row in indices(part, step).tolist()]
