"""The activations as functions of x and their parameters: formula, paper, shape and range of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .pssilu import by_kernel

ALPHA_MIN = 1e-3
"""PSoftplus' abs(alpha) acts as max(abs(alpha), ALPHA_MIN): at 0 the formula divides by zero."""

RAW_SQUARE_MIN = 1e-6
"""SmoothReLU's a = raw^2 acts as max(raw^2, RAW_SQUARE_MIN), likewise."""


def psoftplus(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Parametric Softplus: log(1 + exp(a x)) / a, a = max(abs(alpha), 0.001). Dai et al. 2021, arXiv:2110.05626."""
    if torch.jit.is_scripting():
        return _psoftplus(x, alpha)
    else:
        return by_kernel(_psoftplus, x, alpha)


def _psoftplus(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
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
    if torch.jit.is_scripting():
        return _smooth_relu(x, raw)
    else:
        return by_kernel(_smooth_relu, x, raw)


def _smooth_relu(x: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    y, raw = _wide(F.relu(x)), _wide(raw)
    a = (raw * raw).clamp(min=1e-6)  # RAW_SQUARE_MIN
    return (y - _log1p(a * y) / a).to(x.dtype).view_as(x)


def softplus10(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(10 x)) / 10, parametric softplus. Xie et al. 2020, https://arxiv.org/abs/2006.14536."""
    if torch.jit.is_scripting():
        return _softplus10(x)
    else:
        return by_kernel(_softplus10, x)


def _softplus10(x: torch.Tensor) -> torch.Tensor:
    return softplus(10 * x) / 10


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x))."""
    if torch.jit.is_scripting():
        return F.softplus(x, threshold=40.0)
    elif _in_kernel(x):
        return torch.maximum(x, torch.zeros_like(x)) + _log1p(torch.exp(-x.abs()))
    else:
        return F.softplus(x, threshold=40.0)  # beyond it the sum is x in every dtype


def _log1p(x: torch.Tensor) -> torch.Tensor:
    """log(1 + x), in compiled code on a CPU by log and a correction: there log1p takes three times as long."""
    if torch.jit.is_scripting():
        return torch.log1p(x)
    elif _in_kernel(x):
        u = 1 + x
        return torch.log(u) - ((u - 1) - x) / u
    else:
        return torch.log1p(x)


def _in_kernel(x: torch.Tensor) -> bool:
    """Whether this is being compiled for a CPU, to run and not for export."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.device.type == 'cpu'


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 at least: in half precision differences vanish, and squares overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
