"""The exponential moving average of the weights of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.utils import ModelEmaV3
from torch import nn


class ModelEma(ModelEmaV3):
    """timm's average with a shorter warm-up: at step t the decay is min(decay, (1 + t) / (10 + t)).

    That is TensorFlow's ExponentialMovingAverage with num_updates: the average spans about the last ninth of the run
    until the decay is reached, 0.999 at step 8,990. timm's own warm-up, 1 - (1 + t)^(-2/3), reaches it at step 31,622.

    Args:
        model: the network.
        decay: of the average per step, once warmed up.
    """

    def get_decay(self, step: int | None = None) -> float:
        """Decay of the update after step number `step`, counted from 0; None: the decay once warmed up."""
        return self.decay if step is None else min(self.decay, (1 + step) / (10 + step))


@contextmanager
def averaged_weights(model: nn.Module, ema: ModelEmaV3 | None) -> Iterator[None]:
    """Lend the averaged weights, if any, to the model, so that what was compiled for it serves both.

    What the body does to the statistics of batch norm stays with the average.
    """
    if ema is None:
        yield
        return
    own = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(ema.module.state_dict())
    try:
        yield
        ema.module.load_state_dict(model.state_dict())
    finally:
        model.load_state_dict(own)
