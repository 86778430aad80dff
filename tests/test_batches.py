import pytest
import torch
from tiny_runs import tiny

from timm_robust.training.builder import build
from timm_robust.training.loop import fit


def test_held_out_images_are_never_trained_on(tmp_path):
    run = build(tiny(tmp_path))
    held = {image.numpy().tobytes() for image in run.held_out.images}
    assert not held & {image.numpy().tobytes() for image in run.batches.data.images}
    assert len(run.held_out) == 50 and len(run.batches.data) == 1437 - 50


def test_extra_images_are_mixed_in(tmp_path):
    numpy = pytest.importorskip('numpy')
    extra = tmp_path / 'extra.npz'
    rng = numpy.random.default_rng(0)
    numpy.savez(extra, image=rng.integers(0, 256, (300, 32, 32, 3), dtype=numpy.uint8), label=rng.integers(0, 10, 300))
    run = build(tiny(tmp_path, extra_data=str(extra), extra_fraction=0.5, max_steps=1, val_size=0))
    x, y = run.batches[0]
    assert x.shape == (400, 3, 32, 32) and len(y) == 400
    assert (x[:, 0] != x[:, 1]).flatten(1).any(1).sum() == 200  # digits are grey, noise is not
    run.train_step(x, y, 0)


def test_image_folder_streams_through_timm(tmp_path):
    from PIL import Image

    for split, n in (('train', 6), ('validation', 3)):
        for name in ('cat', 'dog'):
            (tmp_path / 'folder' / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / 'folder' / split / name / f'{i}.png')
    recipe = tiny(
        tmp_path, dataset='folder', data_dir=str(tmp_path / 'folder'), val_split='validation', batch_size=4, workers=0,
        img_size=32, max_steps=3, model_ema=False,
    )  # fmt: skip
    line = fit(build(recipe))
    assert line['steps'] == 3 and 'val_pgd_acc' in line
