import dataclasses

import pytest
import torch

from timm_robust.checkpoint import load_checkpoint
from timm_robust.compact import load_compact, save_compact
from timm_robust.engine import build, fit
from timm_robust.recipe import Recipe

RECIPE = Recipe(
    model='resnet18_pssilu',
    model_kwargs={'width': 4},
    dataset='digits',
    val_size=50,
    eps=0.1,
    steps=1,
    eval_steps=1,
    epochs=2,
    batch_size=400,
    lr=0.05,
    model_ema=True,
    compact_state=True,
    experiment='run',
)


def test_a_state_comes_back_with_matrices_in_bf16(tmp_path):
    torch.manual_seed(0)
    matrix, vector, count = torch.randn(300, 200), torch.randn(7), torch.tensor(3)
    state = {'net': {'w': matrix, 'v': vector, 'n': count}, 'list': [1.5, {'a': matrix.t()}], 'pair': ('x', None)}
    files = save_compact(tmp_path / 'compact', state, part_bytes=150_000)
    assert [file.name for file in files] == ['part-00000.safetensors', 'part-00001.safetensors', 'state.pth.tar']
    assert all(file.stat().st_size < 160_000 for file in files)
    again = load_compact(tmp_path / 'compact')
    assert torch.equal(again['net']['v'], vector) and torch.equal(again['net']['n'], count)
    assert again['net']['w'].dtype == torch.float32
    assert torch.equal(again['net']['w'], matrix.bfloat16().float())
    assert ((again['net']['w'] - matrix).abs() <= matrix.abs() / 256).all()
    assert torch.equal(again['list'][1]['a'], matrix.t().bfloat16().float())
    assert again['pair'] == ('x', None) and again['list'][0] == 1.5


def test_a_missing_or_damaged_part_is_named(tmp_path):
    save_compact(tmp_path / 'compact', {'w': torch.ones(8, 8)})
    part = tmp_path / 'compact/part-00000.safetensors'
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r'part-00000\.safetensors is damaged: .*; copy it again'):
        load_compact(tmp_path / 'compact')
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r'part-00000\.safetensors is missing; the state is 1 such files'):
        load_compact(tmp_path / 'compact')


def test_a_run_goes_on_from_its_compact_state(tmp_path):
    whole = fit(build(dataclasses.replace(RECIPE, output=str(tmp_path / 'whole'))))
    half = build(dataclasses.replace(RECIPE, output=str(tmp_path / 'half')))
    original = half.train_step.__class__.__call__
    steps = []

    def stop_after_an_epoch(self, *args, **kwargs):
        steps.append(1)
        half.stop = len(steps) == 3
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half.train_step.__class__, '__call__', stop_after_an_epoch)
        with pytest.raises(Exception, match='stopped by a signal at step 3'):
            fit(half)
    compact = tmp_path / 'half/run/compact'
    exact, rounded = load_checkpoint(compact.parent / 'last.pth.tar'), load_compact(compact)
    for part in ('state_dict', 'state_dict_ema'):
        for name, value in exact[part].items():
            assert torch.allclose(rounded[part][name], value, rtol=1 / 256, atol=0), name
    assert rounded['seconds'] == exact['seconds'] and rounded['step'] == 3
    again = build(dataclasses.replace(RECIPE, output=str(tmp_path / 'half'), resume=str(compact)))
    other = build(dataclasses.replace(RECIPE, output=str(tmp_path / 'half'), resume=str(compact), seed=7))
    assert torch.equal(other.held_out.images, again.held_out.images)
    line = fit(again)
    assert line['steps'] == whole['steps']
    a, b = (load_checkpoint(tmp_path / name / 'run/last.pth.tar')['state_dict'] for name in ('whole', 'half'))
    for name, value in a.items():
        if value.ndim > 1:  # close, and not equal: bf16 was in between
            assert (b[name] - value).norm() < 0.02 * value.norm(), name
    assert any(not torch.equal(a[name], b[name]) for name in a)
