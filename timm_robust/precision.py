"""What fp32 means on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ieee_convolutions() -> Iterator[None]:
    """Convolutions of fp32 in fp32: PyTorch lets cuDNN round their inputs to TF32 (10 bits), an error of about 5e-4."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
