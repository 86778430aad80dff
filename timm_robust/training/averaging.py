"""The exponential moving average of the weights of a run."""

from __future__ import annotations

from timm.utils import ModelEmaV3


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
