import dataclasses

import pytest
import torch

from timm_robust.training import builder as module
from timm_robust.training import step, validation
from timm_robust.training.builder import build
from timm_robust.training.recipe import Recipe
from timm_robust.training.validation import validate

TINY = Recipe(
    model='resnet18_relu', model_kwargs={'width': 2}, dataset='digits', val_size=50, eps=0.1, eval_steps=2,
    batch_size=20,
)  # fmt: skip


@pytest.mark.parametrize('compiled', [False, True])
def test_batches_have_the_trainings_size_and_fillings_do_not_count(tmp_path, monkeypatch, compiled):
    for place in (module, step):
        monkeypatch.setattr(place, 'compiled', lambda net, *args: net)
    run = build(dataclasses.replace(TINY, torchcompile=compiled, output=str(tmp_path)))
    monkeypatch.setattr(validation, 'pgd', lambda loss_fn, x, threat_model, **settings: 1 - x)
    with torch.no_grad():
        run.model.fc.weight.zero_()
        run.model.fc.bias.copy_(10.0 * (torch.arange(10) == 0))  # it says 0, which is the label of a filling
    share = (run.held_out.labels == 0).double().mean().item()
    assert 0 < share < 0.5
    net = run.attack_forward.folded.net
    sizes, forward = [], net.forward
    monkeypatch.setattr(net, 'forward', lambda x: sizes.append(len(x)) or forward(x))
    assert validate(run.attack_forward, run.held_out, run.recipe) == {'val_clean_acc': share, 'val_pgd_acc': share}
    assert sizes == [20, 20, 20, 20, *([20, 20] if compiled else [10, 10])]
