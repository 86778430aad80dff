"""The activations as functions of x and their parameters: formula, paper, shape and range of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ALPHA_MIN = 1e-3
"""PSoftplus' abs(alpha) acts as max(abs(alpha), ALPHA_MIN): at 0 the formula divides by zero."""

RAW_SQUARE_MIN = 1e-6
"""SmoothReLU's a = raw^2 acts as max(raw^2, RAW_SQUARE_MIN), likewise."""


def psoftplus(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Parametric Softplus: log(1 + exp(a x)) / a, a = max(abs(alpha), 0.001). Dai et al. 2021, arXiv:2110.05626."""
    a = alpha.abs().clamp(min=0.001)  # ALPHA_MIN
    return (softplus(a * x) / a).to(x.dtype).view_as(x)  # a number stays one, whatever alpha's shape


def prelu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """x for x > 0, alpha x otherwise; alpha is free in sign. Dai et al. 2021, arXiv:2110.05626."""
    return F.prelu(x, alpha.to(x.dtype))


def pprelu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """PReLU+: alpha x for x > 0, 0 otherwise. Dai et al. 2021, arXiv:2110.05626."""
    return (F.relu(x) * alpha.to(x.dtype)).view_as(x)


def pelu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """x for x > 0, alpha (exp(x) - 1) otherwise: ELU with a learnable scale. Dai et al. 2021, arXiv:2110.05626."""
    return (F.relu(x) + alpha.to(x.dtype) * torch.expm1(x - F.relu(x))).view_as(x)


def reblu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Rectified bendable linear unit: x + alpha (sqrt(x^2 + 1) - 1) for x > 0, 0 otherwise. Dai et al. 2021."""
    y = _wide(F.relu(x))
    return (alpha * (torch.sqrt(y * y + 1) - 1) + y).to(x.dtype).view_as(x)


def smooth_relu(x: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """x - log(1 + a x) / a for x >= 0, 0 otherwise, a = raw^2. Xie et al. 2020, https://arxiv.org/abs/2006.14536.

    f' = a x / (1 + a x) for x >= 0, so f''(0+) = a = max abs(f''): C1, not C2. raw = 0 acts as 0.001.
    """
    y, raw = _wide(F.relu(x)), _wide(raw)
    a = (raw * raw).clamp(min=1e-6)  # RAW_SQUARE_MIN
    return (y - torch.log1p(a * y) / a).to(x.dtype).view_as(x)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)).

    Not by logsigmoid where a compiler reads it: torch exports that to ONNX as log(sigmoid), which is -inf far left.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.softplus(x, threshold=40)  # whose slope at 0 is 1/2, as that of no sum with relu
    return -F.logsigmoid(-x)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 at least: in half precision differences vanish, and squares overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
