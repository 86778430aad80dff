"""A training step's twins: recomputed, of half the bits, and with a learned activation instead of a fixed one."""

import dataclasses

import pytest
import timm
import torch

from timm_robust.attacks.gradient import input_gradient
from timm_robust.attacks.surrogates import cross_entropy
from timm_robust.training.builder import build
from timm_robust.training.loop import fit
from timm_robust.training.recipe import Recipe

TINY = Recipe(
    model='resnet18_pssilu',
    model_kwargs={'width': 4},
    dataset='digits',
    crop_padding=1,
    hflip=0.0,
    val_size=0,
    eps=0.1,
    steps=1,
    epochs=3,
    batch_size=32,
    lr=0.05,
    experiment='run',
)


def kept_bytes(model: torch.nn.Module, x: torch.Tensor, frozen: bool) -> int:
    """Bytes that a forward keeps for its backward, each piece of memory once, weights aside."""
    model.requires_grad_(not frozen)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()  # the tensor stays alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x.clone().requires_grad_(frozen))
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize('frozen', [True, False], ids=['attack', 'update'])
def test_pssilu_keeps_no_more_for_backward_than_silu(frozen):
    x, sizes = torch.rand(8, 3, 32, 32), {}
    for act in ('silu', 'pssilu'):
        model = timm.create_model(f'wrn28_10_{act}', depth=10, widen_factor=1)
        sizes[act] = kept_bytes(model, x, frozen)
        model.set_grad_checkpointing()
        sizes[f'{act}, recomputed'] = kept_bytes(model, x, frozen)
    slack = 200  # alpha, beta and what follows from them
    assert sizes['pssilu'] <= sizes['silu'] + slack
    assert sizes['pssilu, recomputed'] <= sizes['silu, recomputed'] + slack
    assert sizes['pssilu, recomputed'] < 0.5 * sizes['pssilu']


@pytest.mark.parametrize(
    'settings',
    [{'loss': 'trades', 'steps': 2}, {'awp_gamma': 0.01, 'steps': 2}, {'attack_bn': 'train'}, {'amp': True}],
    ids=['trades', 'awp', 'attack in train mode', 'bf16'],
)
def test_recompute_takes_the_same_step(tmp_path, settings):
    weights = []
    for recompute in (False, True):
        recipe = dataclasses.replace(
            TINY, output=str(tmp_path), grad_checkpointing=recompute, batch_size=16, **settings
        )
        run = build(recipe)
        assert run.model.stages[0].grad_checkpointing == recompute
        for number in range(2):
            run.train_step(*run.batches[number], number, 0.5)
        weights.append(run.model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-6, rtol=1e-5, msg=key)


def test_the_attacks_gradient_is_that_of_the_plain_network(tmp_path):
    run = build(dataclasses.replace(TINY, output=str(tmp_path), batch_size=32))
    for number in range(3):  # statistics and activation away from their start
        run.train_step(*run.batches[number], number)
    x, y = run.batches[3]
    run.model.eval()
    expected = input_gradient(lambda x: cross_entropy(run.model(x), y), x)
    with run.attack_forward.ready('eval') as forward:
        assert run.attack_forward.folded is not None and forward is not run.forward
        found = input_gradient(lambda x: cross_entropy(forward(x), y), x)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-3)


@pytest.mark.slow
def test_bf16_trains_as_well_as_fp32(tmp_path):
    found = {}
    for amp in (False, True):
        changes = {'model_kwargs': {'width': 8}, 'attack': 'fgsm', 'epochs': 5, 'max_steps': None, 'batch_size': 64}
        changes |= {'val_size': 200, 'lr': 0.1, 'eval_steps': 10, 'amp': amp}
        found[amp] = fit(build(dataclasses.replace(TINY, output=str(tmp_path / str(amp)), **changes)))
    clean, robust = (abs(found[True][key] - found[False][key]) for key in ('val_clean_acc', 'val_pgd_acc'))
    assert found[False]['val_pgd_acc'] > 0.3
    assert clean < 0.1 and robust < 0.1  # two standard errors of a difference between two shares of 200 images
