"""Pictures: adversarial examples beside their originals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .threat_model import ThreatModel


def adversarial_figure(
    path: str | Path,
    x: torch.Tensor,
    y: torch.Tensor,
    attempts: dict[str, tuple[torch.Tensor, torch.Tensor]],
    classes: Sequence[str],
    threat_model: ThreatModel,
) -> None:
    """Save a PNG: a row an image, the original first, then each model's adversarial image and perturbation.

    Args:
        path: the PNG.
        x: original images [B, C, H, W] in [0, 1], C 1 or 3.
        y: true labels [B].
        attempts: name of a model -> (adversarial images [B, C, H, W], the model's labels of them [B]).
        classes: class names.
        threat_model: its eps sets the magnification of the perturbation: grey is none, black and white are eps.

    Raises:
        ImportError: if matplotlib is missing, with what to type.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib; type: pip install timm-robust[train]') from error
    columns = 1 + 2 * len(attempts)
    figure = Figure(figsize=(1.7 * columns, 1.95 * len(x) + 0.5), layout='constrained')
    axes = figure.subplots(len(x), columns, squeeze=False)
    for row in range(len(x)):
        _show(axes[row][0], x[row], f'original: {classes[int(y[row])]}', 'black')
        for column, (name, (x_adv, predicted)) in enumerate(attempts.items()):
            fooled = bool(predicted[row] != y[row])
            title = f'{name}: {classes[int(predicted[row])]}'
            _show(axes[row][1 + 2 * column], x_adv[row], title, 'firebrick' if fooled else 'seagreen')
            delta = x_adv[row] - x[row]
            scale = threat_model.eps if threat_model.norm == 'Linf' else delta.abs().max().clamp_min(1e-12).item()
            _show(
                axes[row][2 + 2 * column],
                (0.5 + 0.5 * delta / scale).clamp(0, 1),
                f'perturbation x {0.5 / scale:.3g}',
                'black',
            )
    figure.suptitle(f'{threat_model}: red labels are wrong, green ones right', fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))


def _show(axis: object, image: torch.Tensor, title: str, color: str) -> None:
    """One image with its caption, no ticks."""
    axis.imshow(image.detach().cpu().permute(1, 2, 0).squeeze(-1).numpy(), cmap='gray', vmin=0, vmax=1)  # type: ignore[attr-defined]
    axis.set_title(title, fontsize=8, color=color)  # type: ignore[attr-defined]
    axis.set_axis_off()  # type: ignore[attr-defined]
