from types import SimpleNamespace

import numpy as np
import pytest
import torch

from timm_robust.data import ExtraImages, ImageData, MixedBatches, TrainBatches

# Images say which they are: pixel (0, 0) of each channel is the row's number, split into base 200, and the kind.


def numbered(n, kind, size=(4, 6)):
    images = torch.zeros(n, 3, *size, dtype=torch.uint8)
    rows = torch.arange(n)
    images[:, 0], images[:, 1], images[:, 2] = (rows // 200)[:, None, None], (rows % 200)[:, None, None], kind
    return images


def make(tmp_path, n=40, n_extra=70, classes=4, size=(4, 6)):
    data = ImageData(numbered(n, 1, size), torch.arange(n) % classes, tuple('abcdefghij'[:classes]), 'toy')
    np.savez(tmp_path / 'x.npz', image=numbered(n_extra, 2).permute(0, 2, 3, 1).numpy(), label=np.arange(n_extra) % 3)
    return data, ExtraImages(tmp_path / 'x.npz', 4)


def rows_of(x):
    """Which images, as `indices` numbers them for 40 real ones, read off the pixels."""
    pixels = (255 * x).round().long().amax((2, 3))
    return pixels[:, 0] * 200 + pixels[:, 1] + torch.where(pixels[:, 2] == 2, 40, 0)


# MixedBatches


@pytest.mark.parametrize(('fraction', 'count'), [(0.7, 7), (0.5, 5), (0.25, 2), (1, 10), (0, 0)])
def test_a_batch_holds_the_share_and_says_which(tmp_path, fraction, count):
    data, extra = make(tmp_path)
    batches = MixedBatches(data, extra, fraction, 10, seed=0, crop_padding=0)
    assert batches.steps_per_epoch == 4 and batches.batch_size == 10 and batches.data is data
    for step in (0, 3, 11):
        x, y = batches[step]
        rows = batches.indices(step)
        assert x.dtype == torch.float32 and x.shape == (10, 3, 4, 6) and y.dtype == torch.int64
        assert (rows >= 40).sum() == count and torch.equal(rows_of(x), rows)
        assert torch.equal(y, torch.where(rows < 40, rows % 4, (rows - 40) % 3))


def test_no_row_comes_twice_before_all_have_come_once(tmp_path):
    batches = MixedBatches(*make(tmp_path), 0.7, 10, seed=0)
    counts = torch.zeros(110, dtype=torch.int64)
    for step in range(80):
        counts += batches.indices(step).bincount(minlength=110)
        for kind in (counts[:40], counts[40:]):
            assert kind.max() - kind.min() <= 1
    assert counts[:40].tolist() == [6] * 40 and counts[40:].tolist() == [8] * 70


def test_rows_are_shuffled_within_the_batch(tmp_path):
    batches = MixedBatches(*make(tmp_path), 0.5, 10, seed=0)
    share = torch.stack([batches.indices(step) >= 40 for step in range(400)]).float().mean(0)
    assert (share - 0.5).abs().max() < 0.125  # five standard deviations


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    data, extra = make(tmp_path)
    batches = MixedBatches(data, extra, 0.7, 8, seed=1)
    forward = [batches[step] for step in range(12)]
    reused = MixedBatches(data, extra, 0.7, 8, seed=1)
    torch.manual_seed(123)
    for step in (11, 3, 4, 5, 0, 7):
        assert all(torch.equal(a, b) for a, b in zip(reused[step], forward[step], strict=True))
    assert not torch.equal(MixedBatches(data, extra, 0.7, 8, seed=2)[0][0], forward[0][0])


def test_both_kinds_are_augmented(tmp_path):
    data, extra = make(tmp_path)
    batches = MixedBatches(data, extra, 0.5, 40, seed=0, crop_padding=3, hflip=0)
    cropped = (batches[0][0][:, 2] == 0).flatten(1).any(1)  # zeros come from the padding only
    for is_extra in (False, True):
        assert cropped[(batches.indices(0) >= 40) == is_extra].float().mean() > 0.7


def test_the_augmentation_is_that_of_train_batches(tmp_path):
    data, extra = make(tmp_path)
    mixed, plain = (MixedBatches(data, extra, 0, 40, 0), TrainBatches(data, 40, 0))
    back = torch.empty(40, dtype=torch.int64)
    back[mixed.indices(2)] = torch.arange(40)
    images = data.images[mixed.indices(2)]
    assert torch.equal(mixed[2][0], plain._augment(images, 2) / 255)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'fraction': 1.5}, r'fraction 1.5 of generated images must lie in \[0, 1\]'),
        ({'fraction': 0.01}, 'fraction 0.01 of 10 images leaves none of one kind'),
        ({'fraction': 0.99}, 'fraction 0.99 of 10 images leaves none'),
        ({'batch_size': 41}, r'batch_size 41 must lie in 1\.\.40'),
    ],
)
def test_mixed_batches_refuse_what_cannot_be_meant(tmp_path, change, text):
    data, extra = make(tmp_path)
    with pytest.raises(ValueError, match=text):
        MixedBatches(data, extra, **{'fraction': 0.5, 'batch_size': 10, 'seed': 0, **change})
    with pytest.raises(IndexError, match='step -1 is negative'):
        MixedBatches(data, extra, 0.5, 10, 0)[-1]


def test_images_that_do_not_go_together(tmp_path):
    for change, text in (
        ({'classes': 5}, r'x\.npz has 4 classes, toy has 5'),
        ({'size': (4, 8)}, r'x\.npz are \[3, 4, 6\], of toy \[3, 4, 8\]; resize'),
    ):
        with pytest.raises(ValueError, match=text):
            MixedBatches(*make(tmp_path, **change), 0.5, 10, 0)


def test_what_is_pinned_has_memory_of_its_own(tmp_path, monkeypatch):
    data, extra = make(tmp_path)
    batches = MixedBatches(data, extra, 0.7, 10, 0)
    # grey images, as ExtraImages gives them
    batches.extra = type(
        'Grey', (), {'__getitem__': lambda self, rows: (torch.zeros(7, 1, 8, 8).expand(7, 3, 8, 8),)}
    )()
    batches.data = SimpleNamespace(images=SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda item: item)
    assert all(item.is_contiguous() for item in batches._fetch(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_the_rows_are_those_of_the_cpu(tmp_path):
    data, extra = make(tmp_path)
    on_cpu, on_gpu = (MixedBatches(data.to(d), extra, 0.7, 10, 0, crop_padding=0, hflip=0) for d in ('cpu', 'cuda'))
    for step in (0, 1, 2, 9, 10):
        x, y = on_gpu[step]
        assert x.is_cuda and torch.equal(x.cpu(), on_cpu[step][0]) and torch.equal(y.cpu(), on_cpu[step][1])
