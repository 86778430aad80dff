"""A model as files that timm loads: weights as .safetensors, equal bytes for equal weights, and config.json."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.models import save_for_hf
from torch import nn

from ..files import atomic_folder
from ..weights import WEIGHTS, split_name


def write_model(
    model: nn.Module, folder: Path, name: str, model_args: dict[str, Any] | None = None, **provenance: str
) -> None:
    """Write a model as a folder that timm loads with 'local-dir:': weights and config.json, or nothing.

    Args:
        model: one of timm's registry.
        folder: to be made; one that is there is replaced.
        name: '<arch>.<tag>'.
        model_args: what timm.create_model was given beside the name, for config.json; timm before 1.0.31 does not know.
        provenance: further entries of the file's metadata.
    """
    content = weights_content(model.state_dict(), name, **provenance)
    with atomic_folder(folder) as new:
        write_files(new, model, content, split_name(name)[1], model_args)


def weights_content(weights: dict[str, torch.Tensor], name: str, **provenance: str) -> bytes:
    """The content of model.safetensors: the same for the same weights, name and provenance."""
    return canonical(save(weights, {'format': 'pt', 'model': name, **provenance}))


def write_files(
    folder: Path, model: nn.Module, content: bytes, tag: str, model_args: dict[str, Any] | None = None
) -> None:
    """Weights and configuration."""
    (folder / WEIGHTS).write_bytes(content)
    (folder / 'config.json').write_text(_config(model, tag, model_args))


def stored(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as a release stores them: matrices and convolutions in fp16, vectors and counters as they are.

    Raises:
        ValueError: if a weight is too large for fp16.
    """
    out = {}
    for name, value in weights.items():
        half = value.is_floating_point() and value.ndim > 1
        out[name] = (value.half() if half else value).contiguous()
        if half and not out[name].isfinite().all():
            raise ValueError(f'{name} has values up to {value.abs().max():.3g}, too large for fp16 (65504)')
    return out


def canonical(content: bytes) -> bytes:
    """A .safetensors file whose header lists its keys in order, so that equal weights give equal files."""
    size = int.from_bytes(content[:8], 'little')
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(',', ':')).encode()
    header += b' ' * (-len(header) % 8)
    return len(header).to_bytes(8, 'little') + header + content[8 + size :]


def _config(model: nn.Module, tag: str, model_args: dict[str, Any] | None) -> str:
    """The config.json of timm, with the tag of these weights, and the size and classes of the images of training."""
    config = {**dict(model.pretrained_cfg), 'tag': tag}  # type: ignore[arg-type]
    if side := config.pop('img_size', None):  # ours, which timm refuses
        config['input_size'] = (config['input_size'][0], side, side)
    for key in ('test_input_size', 'test_crop_pct'):  # of timm's weights of that name; these were not measured there
        config.pop(key, None)
    names = config.pop('label_names', None)
    labels = {'label_names': list(names)} if names else None
    own, model.pretrained_cfg = model.pretrained_cfg, config  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_for_hf(model, folder, safe_serialization=True, model_args=model_args or None, model_config=labels)
            return (Path(folder) / 'config.json').read_text()
    finally:
        model.pretrained_cfg = own
