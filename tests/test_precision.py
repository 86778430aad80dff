import pytest
import torch

from timm_robust.precision import fastest_convolutions
from timm_robust.training import loop as engine
from timm_robust.training.builder import build
from timm_robust.training.recipe import Recipe


@pytest.mark.parametrize(
    ('device', 'before', 'within'), [('cuda', False, True), ('cpu', False, False), ('cpu', True, True)]
)
def test_cudnn_tries_its_algorithms_on_a_gpu_alone(monkeypatch, device, before, within):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', before)
    with pytest.raises(KeyboardInterrupt), fastest_convolutions(torch.device(device)):
        found = torch.backends.cudnn.benchmark
        raise KeyboardInterrupt
    assert found == within and torch.backends.cudnn.benchmark == before


def test_training_asks_for_it(tmp_path, monkeypatch):
    """On a stand-in of a GPU: only the name of the run's device is looked at."""
    seen = []
    monkeypatch.setattr(engine, 'fastest_convolutions', lambda device: fastest_convolutions(torch.device('cuda')))
    run = build(Recipe(
        model='resnet18_relu', model_kwargs={'width': 2}, dataset='digits', val_size=0, attack='fgsm', max_steps=1,
        batch_size=8, output=str(tmp_path), experiment='run',
    ))  # fmt: skip
    take = run.train_step.perturb
    run.train_step.perturb = lambda *args: seen.append(torch.backends.cudnn.benchmark) or take(*args)
    engine.fit(run)
    assert seen == [True] and not torch.backends.cudnn.benchmark
