"""In which precision and layout networks run, what fp32 means on a GPU, and which of its algorithms is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """How a network is called.

    Args:
        amp: under autocast to bfloat16, not in the type of its weights.
        channels_last: its images, feature maps and weights lie in channels-last order.
    """

    amp: bool = False
    channels_last: bool = True

    @property
    def dtype(self) -> torch.dtype | None:
        """Of convolutions and matrix products; None: that of the weights."""
        return torch.bfloat16 if self.amp else None

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What the network is called in."""
        return torch.autocast(device.type, torch.bfloat16) if self.amp else nullcontext()


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Convolutions and matrix products of fp32 in fp32, whatever the user set.

    By itself PyTorch lets cuDNN round the inputs of convolutions to TF32 (10 bits), an error of about 5e-4. PyTorch 2.9
    has a setting for each operator; the older flags are kept in step: they cannot be read where they differ.
    """
    cudnn: Any = torch.backends.cudnn
    backends = (cudnn, torch.backends.cuda, torch.backends.mkldnn)
    operators: list[Any] = [getattr(backend, name, None) for backend in backends for name in ('conv', 'rnn', 'matmul')]
    operators = [operator for operator in operators if hasattr(operator, 'fp32_precision')]
    before, flag, products = [op.fp32_precision for op in operators], None, None
    with suppress(RuntimeError):  # the operators differ
        flag = cudnn.allow_tf32
        cudnn.allow_tf32 = False
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('highest')
    for op in operators:
        op.fp32_precision = 'ieee'
    try:
        yield
    finally:
        if flag is not None:
            cudnn.allow_tf32 = flag
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for op, value in zip(operators, before, strict=True):
            op.fp32_precision = 'none'  # that is, what holds for all operators
            if op.fp32_precision != value:
                op.fp32_precision = value


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """On a GPU cuDNN tries its algorithms at the first call of each shape, and keeps the fastest.

    For training, whose shapes are few; AutoAttack's batches shrink, and each size would be tried anew.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = before or device.type == 'cuda'
    try:
        yield
    finally:
        cudnn.benchmark = before
