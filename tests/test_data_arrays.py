import io
import zipfile

import numpy as np
import pytest
import torch
import warm

from timm_robust.data import ExtraImages, load_dataset
from timm_robust.data import arrays as arrays_module

RGB = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 2, 0, 1, 2])
FIRST = torch.from_numpy(RGB).permute(0, 3, 1, 2)


def save(folder, kind, images=RGB, labels=LABELS, split='train'):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == 'npz':
        np.savez(folder / f'{split}.npz', image=images, label=labels)
        return folder / f'{split}.npz'
    np.save(folder / f'{split}_image.npy', images)
    np.save(folder / f'{split}_label.npy', labels)
    return folder / f'{split}_image.npy'


def both(kind, folder):
    """The same data set as `load_dataset` and as `ExtraImages` read it: images and labels."""
    data, extra = load_dataset(kind, folder), ExtraImages(folder, 3)
    images, labels = extra[torch.arange(len(extra))]
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and extra.shape == tuple(images.shape[1:])
    return (data.images, data.labels), (images, labels)


@pytest.mark.parametrize('kind', ['npz', 'npy'])
@pytest.mark.parametrize('dtype', ['int64', 'uint8', '>i4'])
def test_every_layout_is_read_whole_and_mapped(tmp_path, kind, dtype):
    grey = torch.from_numpy(RGB[..., 0])[:, None].expand(-1, 3, -1, -1)
    layouts = {'nhwc': (RGB, FIRST), 'nchw': (FIRST.numpy(), FIRST), 'nhw': (RGB[..., 0].copy(), grey)}
    for name, (stored, expected) in layouts.items():
        stored = np.ascontiguousarray(stored)
        save(tmp_path / name, kind, stored, LABELS.astype(dtype))
        for images, labels in both(kind, tmp_path / name):
            assert torch.equal(images, expected) and labels.tolist() == LABELS.tolist()


def test_mapped_rows_of_an_archive_are_those_at_their_offset(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.npz', 'w') as archive:  # other members before and between, zip64 headers
        for name, array in (('a', np.zeros(11)), ('image', RGB), ('b', np.ones(3)), ('label', LABELS)):
            with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
                np.save(member, array)
    extra = ExtraImages(tmp_path / 'x.npz', 3)
    rows = torch.tensor([6, 0, 6, 3])
    images, labels = extra[rows]
    assert torch.equal(images, FIRST[rows]) and labels.tolist() == LABELS[rows.numpy()].tolist() and len(extra) == 7
    assert not extra._images.flags.owndata and not extra._images.flags.writeable


def test_rows_stay_on_the_disk(tmp_path):
    """A sparse file of 60 GB, as 20 million images are: none of it is read."""
    shape, header = (20_000_000, 32, 32, 3), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
    with open(tmp_path / 'x_image.npy', 'wb') as file:
        file.write(header.getvalue())
        try:
            file.truncate(len(header.getvalue()) + int(np.prod(shape)))
        except OSError:
            pytest.skip('this file system has no sparse files of 60 GB')
    np.save(tmp_path / 'x_label.npy', np.zeros(len(range(shape[0])), np.uint8))
    extra = ExtraImages(tmp_path, 10)
    images, labels = extra[torch.tensor([0, 19_999_999])]
    assert len(extra) == 20_000_000 and images.shape == (2, 3, 32, 32) and not images.any() and not labels.any()


@pytest.mark.parametrize('plural', [('s', ''), ('', 's'), ('s', 's')])
def test_plural_names(tmp_path, plural):
    np.save(tmp_path / f'train_image{plural[0]}.npy', RGB)
    np.save(tmp_path / f'train_label{plural[1]}.npy', LABELS)
    for images, _ in both('npy', tmp_path):
        assert torch.equal(images, FIRST)
    assert len(ExtraImages(tmp_path / f'train_image{plural[0]}.npy', 3)) == 7


def test_names_and_classes(tmp_path):
    folder = tmp_path / 'flowers'
    file = save(folder, 'npz')
    save(folder, 'npz', split='validation')
    data = load_dataset('npz', folder, 'validation')
    assert data.name == 'flowers' and data.classes == ('0', '1', '2') and data.images.is_contiguous()
    assert load_dataset('npz', file).name == 'flowers'
    with pytest.raises(ValueError, match=r"train\.npz is not the test split; .*or type 'train'"):
        load_dataset('npz', file, 'test')
    other = file.rename(folder / 'petals.npz')
    (folder / 'classes.txt').write_text('rose\ntulip\niris\nlily\n')
    data = load_dataset('npz', other, 'test')
    assert data.name == 'petals' and data.classes == ('rose', 'tulip', 'iris', 'lily')
    (folder / 'classes.txt').write_text('rose\ntulip\n')
    with pytest.raises(ValueError, match=r'petals, row 1: label 2 is not in 0\.\.1'):
        load_dataset('npz', other)


@pytest.mark.parametrize('kind', ['npz', 'npy'])
@pytest.mark.parametrize(
    ('images', 'labels', 'text'),
    [
        (RGB / 255, LABELS, 'images are float64, they must be uint8 of 0..255; for floats'),
        (RGB.astype('float32'), LABELS, 'images are float32, they must be uint8'),
        (RGB.astype('int64'), LABELS, 'images are int64, they must be uint8'),
        (RGB.reshape(7, -1), LABELS, r'images have the shape \[7, 90\]; allowed: \[N, H, W, 3\]'),
        (RGB[..., :2].copy(), LABELS, r'images have the shape \[7, 5, 6, 2\]'),
        (RGB[:0], LABELS[:0], r'holds no images, its shape is \[0, 5, 6, 3\]'),
        (RGB, LABELS[:6], r'labels have the shape \[6\], 7 images need \[7\]'),
        (RGB, LABELS[:, None], r'labels have the shape \[7, 1\]'),
        (RGB, LABELS / 1, 'labels are float64, they must be whole numbers'),
        (RGB, LABELS - 1, r'row 0: label -1 is not in 0\.\.[12]'),
        (RGB, LABELS.astype(object), 'cannot be read: it holds Python objects'),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, kind, images, labels, text):
    file = save(tmp_path, kind, images, labels)
    for read in (lambda: load_dataset(kind, tmp_path), lambda: ExtraImages(file, 3)):
        with pytest.raises(ValueError, match=text):
            read()


def test_labels_beyond_the_classes_are_found(tmp_path):
    file = save(tmp_path, 'npy', labels=np.array([0, 1, 1, 1, 1, 2, 1], np.uint8))
    with pytest.raises(ValueError, match=r'row 5: label 2 is not in 0\.\.1'):
        ExtraImages(file, 2)
    assert len(ExtraImages(file, 1000)) == 7


def test_a_compressed_archive_is_read_whole_but_not_mapped(tmp_path):
    file = tmp_path / 'train.npz'
    np.savez_compressed(file, image=RGB, label=LABELS)
    assert torch.equal(load_dataset('npz', tmp_path).images, FIRST)
    with pytest.raises(ValueError, match=r'compressed, .* `python -m zipfile -e .*` and name the folder') as caught:
        ExtraImages(file, 3)
    command = str(caught.value).split('`')[1].split()
    warm.run(command[1:], cwd=tmp_path).check_returncode()
    assert torch.equal(
        ExtraImages(tmp_path / 'train', 3)[torch.arange(7)][0], FIRST
    )  # the command of the message works


@pytest.mark.parametrize(
    ('damage', 'text'),
    [
        (lambda whole: whole[:-1], 'cannot be read'),
        (lambda whole: b'version https://git-lfs', 'cannot be read: the magic string'),
        (lambda whole: b'', 'cannot be read'),
        (lambda whole: whole.replace(b'False', b'True '), 'stored column by column'),
        (lambda whole: whole.replace(b'(7, 5', b'(-7,5'), 'cannot be read'),
        (lambda whole: whole.replace(b'(7, 5, 6, 3), }      ', b'(9223372036854775808,),}'), 'cannot be read'),
    ],
)
def test_damaged_files(tmp_path, damage, text):
    file = save(tmp_path, 'npy')
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf'train_image\.npy.*{text}'):
        ExtraImages(file, 3)
    if 'column' not in text and b'(-7' not in file.read_bytes():  # NumPy 2.2 takes -7 for as many as there are
        with pytest.raises(ValueError, match=rf'train_image\.npy.*{text}'):
            load_dataset('npy', tmp_path)


def test_archives_of_something_else(tmp_path):
    (tmp_path / 'train.npz').write_bytes(b'version https://git-lfs')
    np.savez(tmp_path / 'keys.npz', X=RGB, Y=LABELS)
    for name, text in (('train', 'no whole .npz file'), ('keys', 'the file holds X.npy, Y.npy; needed: image.npy')):
        file = tmp_path / f'{name}.npz'
        for read in (lambda file=file: load_dataset('npz', file), lambda file=file: ExtraImages(file, 3)):
            with pytest.raises(ValueError, match=text):
                read()


def test_missing_extra_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'must hold one .npz or one pair .* it holds neither'):
        ExtraImages(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match=r'absent\.npz does not exist; name an .npz'):
        ExtraImages(tmp_path / 'absent.npz', 3)
    file = save(tmp_path, 'npy')
    with pytest.raises(ValueError, match=r'train_label\.npy is neither an .npz file nor the images'):
        ExtraImages(tmp_path / 'train_label.npy', 3)
    save(tmp_path, 'npz')
    with pytest.raises(ValueError, match=r'it holds train\.npz, train_image\.npy'):
        ExtraImages(tmp_path, 3)
    (tmp_path / 'train_label.npy').unlink()
    with pytest.raises(
        FileNotFoundError, match=r'needs its labels beside it, in train_label\.npy or train_labels\.npy'
    ):
        ExtraImages(file, 3)


def test_files_larger_than_memory_are_not_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_module.os, 'sysconf', lambda name: 1)
    assert torch.equal(ExtraImages(save(tmp_path, 'npz'), 3)[torch.arange(7)][0], FIRST)
