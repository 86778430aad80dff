import pytest
from tiny_runs import tiny

from timm_robust.training.builder import build


def test_extra_images_are_mixed_in(tmp_path):
    numpy = pytest.importorskip('numpy')
    extra = tmp_path / 'extra.npz'
    rng = numpy.random.default_rng(0)
    numpy.savez(extra, image=rng.integers(0, 256, (300, 32, 32, 3), dtype=numpy.uint8), label=rng.integers(0, 10, 300))
    run = build(tiny(tmp_path, extra_data=str(extra), extra_fraction=0.5, max_steps=1, val_size=0))
    x, y = run.batches[0]
    assert x.shape == (100, 3, 32, 32) and len(y) == 100
    assert (x[:, 0] != x[:, 1]).flatten(1).any(1).sum() == 50  # digits are grey, noise is not
    run.train_step(x, y, 0)
