"""What fp32 means on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FLAG: tuple[Any, str, Any] = (torch.backends.cudnn, 'allow_tf32', False)
if hasattr(torch.backends.cudnn, 'conv'):  # PyTorch 2.9, where the older flag may not be read beside the new one
    _FLAG = (torch.backends.cudnn.conv, 'fp32_precision', 'ieee')


@contextmanager
def ieee_convolutions() -> Iterator[None]:
    """Convolutions of fp32 in fp32: PyTorch lets cuDNN round their inputs to TF32 (10 bits), an error of about 5e-4."""
    flags, name, exact = _FLAG
    before = getattr(flags, name)
    setattr(flags, name, exact)
    try:
        yield
    finally:
        setattr(flags, name, before)
