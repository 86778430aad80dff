import pytest
import torch
from torch import nn

from timm_robust.training.averaging import ModelEma


def test_decay_warms_up_to_what_was_asked_for():
    ema = ModelEma(nn.Linear(1, 1), decay=0.999)
    assert [ema.get_decay(step) for step in (0, 8, 90)] == [0.1, 0.5, 0.91]
    assert ema.get_decay(8_980) < 0.999 and ema.get_decay(8_990) == 0.999 and ema.get_decay(10**6) == 0.999
    assert ema.get_decay(None) == 0.999


def test_average_follows_the_recursion():
    model = nn.Linear(1, 1)
    ema = ModelEma(model, decay=0.5)
    average = model.weight.item()
    for step, value in enumerate([1.0, -2.0, 3.0, 5.0, 0.0, 1.0, 2.0, 7.0, 4.0, 4.0]):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(model, step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(average, rel=1e-5)
