"""PSSiLU and PSiLU made cheap: `pssilu(x, alpha, beta)`, `psilu(x, alpha)`.

Written out, PSSiLU is five passes over the data forward, more backward, and keeps four intermediate tensors alive. In
eager mode the autograd function below makes one buffer and keeps x alone; where a compiler reads the code
(torch.compile, torch.export, torch.onnx.export, TorchScript) it finds the formula, which compilers fuse into one kernel
each way. Forward-mode derivatives and torch.func's transforms (jvp, jacfwd, hessian, vmap over x or over stacked
parameters) get the formula too, which can be differentiated in every mode and order; the autograd function is twice
differentiable, in reverse mode. Equal to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Optional

import torch
import torch.fx
from torch.autograd import forward_ad

BETA_MAX = 0.99
"""abs(beta) acts as min(abs(beta), BETA_MAX): at 1 the formula divides by zero. Representable below 1 in bf16 too."""

_PIECE = 1 << 18
"""Elements that eager mode works on at a time on the CPU: 1 MiB in fp32, so that later passes hit the cache."""


def pssilu(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Parametric shifted SiLU: x (s(a x) - b) / (1 - b), a = abs(alpha), b = min(abs(beta), 0.99).

    Dai et al. 2021, https://arxiv.org/abs/2110.05626. alpha and beta hold one element; x has any shape, the result x's
    shape and dtype. For b > 0 it grows on both sides: slope -b / (1 - b) far to the left, 1 far to the right. Its
    max abs(f'') is a / (2 (1 - b)), at 0.
    """
    return _pssilu(x, alpha, beta)


def psilu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Parametric SiLU: x s(abs(alpha) x). Dai et al. 2021, https://arxiv.org/abs/2110.05626."""
    return _pssilu(x, alpha, None)


@torch.fx.wrap
def _pssilu(x: torch.Tensor, alpha: torch.Tensor, beta: Optional[torch.Tensor]) -> torch.Tensor:
    """The formula where a compiler reads it, the fused passes in eager mode; a leaf to torch.fx. beta None: 0."""
    if torch.jit.is_scripting():
        return _pssilu_formula(x, alpha, beta)
    else:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return _pssilu_formula(x, alpha, beta)
        if _transformed(x):
            return _forward_kernel(x, *_scalars(alpha, beta))
        return (_SlopedPSSiLU if _sloped(x, alpha, beta) else _FusedPSSiLU).apply(x, alpha, beta)


def _transformed(x: torch.Tensor) -> bool:
    """Whether torch.func, forward mode or is_grads_batched is at work: none of them takes passes in place."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._functorch.is_legacy_batchedtensor(x)
    )


def _pssilu_formula(x: torch.Tensor, alpha: torch.Tensor, beta: Optional[torch.Tensor]) -> torch.Tensor:
    """PSSiLU as the paper writes it: what compilers fuse, and what the fused path is held against."""
    s = torch.sigmoid(alpha.abs() * x)
    if beta is None:
        y = x * s
    else:
        b = beta.abs().clamp(max=0.99)  # BETA_MAX: TorchScript reads no module globals
        y = x * (s - b) / (1 - b)
    y = y.to(x.dtype)
    return y.reshape(()) if x.dim() == 0 else y  # alpha's shape [1] makes a vector of a number


_ROW = 64
"""Elements in a row of what compiled kernels of a GPU are called with."""

_COMPILED_FROM = 1 << 16
"""Elements from which compiled kernels run: the compiler makes one thread of what it first sees small."""

Kernels = tuple[Any, Any, Any]
"""Compiled forward, backward, and forward with the slope, over flat tensors."""

_kernels: Kernels | None = None
"""Those in use."""


def compile_kernels(device: str = 'cpu') -> None:
    """From now on PSSiLU and PSiLU on 'cpu' or 'cuda', outside of torch.compile, run in one compiled pass each way.

    On a CPU so do the activations that call `by_kernel`.

    For training where the network around stays eager: on a CPU, whose convolutions gain nothing from compilation, and
    where images change their size, for each of which the network would be compiled anew.

    Raises:
        RuntimeError: if there is no working compiler, with what to type.
    """
    global _kernels
    _kernels = compiled_kernels(device)


@contextmanager
def using(kernels: Kernels | None) -> Iterator[None]:
    """Run PSSiLU and PSiLU by these kernels in the body, and its gradients whenever they are asked for."""
    global _kernels
    kept, _kernels = _kernels, kernels
    try:
        yield
    finally:
        _kernels = kept


@cache
def compiled_kernels(device: str = 'cpu') -> Kernels:
    """PSSiLU and PSiLU compiled for 'cpu' or 'cuda', each once for tensors of any size.

    Raises:
        RuntimeError: if there is no working compiler, with what to type.
    """
    dynamic = True if device == 'cpu' else None  # None: in all but the length of a row, after the second size
    forward, backward, sloped = (
        torch.compile(kernel, dynamic=dynamic) for kernel in (_forward_kernel, _backward_kernel, _sloped_kernel)
    )
    try:
        flat, one = _flat(torch.ones(_COMPILED_FROM, device=device)), torch.ones(1, device=device)
        assert flat is not None
        with torch.no_grad():
            forward(*flat, one, None)
    except Exception as error:
        reason = str(error).strip().partition('\n')[0][:200]
        mend = 'install a C++ compiler (apt-get install g++), or train without --torchcompile'
        raise RuntimeError(f'cannot compile for {device!r} ({reason}); {mend}') from error
    return forward, backward, sloped


def by_kernel(formula: Callable[..., torch.Tensor], x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
    """The formula of x and its parameters; on a CPU with kernels in use as one compiled pass each way.

    For the other activations that torch has no fast pass for; x has any shape. What the kernel made can be
    differentiated once, as all that torch.compile makes.
    """
    reads = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)
    if reads or _kernels is None or x.device.type != 'cpu' or x.numel() < _COMPILED_FROM or _transformed(x):
        return formula(x, *params)
    if x.dtype == torch.float64 or (flat := _flat(x)) is None:
        return formula(x, *params)
    y = _formula_kernel(formula)(*flat, *params)
    return y.view(x.shape) if x.is_contiguous() else y.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


@cache
def _formula_kernel(formula: Callable[..., torch.Tensor]) -> Any:
    """A formula compiled for vectors of any size on a CPU."""
    return torch.compile(formula, dynamic=True)


def _forward_kernel(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    """The formula, of flat tensors, in fp32 at least."""
    v, a = x.to(torch.promote_types(x.dtype, torch.float32)), alpha.abs()
    return _value(v, torch.sigmoid(a * v), beta).to(x.dtype)


def _backward_kernel(
    x: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor | None, sums: bool
) -> tuple[torch.Tensor, ...]:
    """Gradient of x, and if asked for the sums of grad x (1 - s) and grad x^2 s (1 - s), of flat tensors."""
    wide = torch.promote_types(x.dtype, torch.float32)
    v, g, a = x.to(wide), grad.to(wide), alpha.abs()
    s = torch.sigmoid(a * v)
    grad_x = (g * _slope(v, s, a, beta)).to(x.dtype)
    if not sums:
        return (grad_x,)
    h = g * v * (1 - s)
    return grad_x, h.sum(), (h * v * s).sum()


def _sloped_kernel(
    x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula and its derivative, of flat tensors, in x's dtype."""
    v, a = x.to(torch.promote_types(x.dtype, torch.float32)), alpha.abs()
    s = torch.sigmoid(a * v)
    return _value(v, s, beta).to(x.dtype), _slope(v, s, a, beta).to(x.dtype)


def _value(v: torch.Tensor, s: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    """The formula at v, where s = sigmoid(a v)."""
    if beta is None:
        return v * s
    b = _bounded(beta)
    return v * (s - b) / (1 - b)


def _slope(v: torch.Tensor, s: torch.Tensor, a: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    """Derivative at v, where s = sigmoid(a v)."""
    slope = s * (1 + a * v * (1 - s))
    if beta is None:
        return slope
    b = _bounded(beta)
    return (slope - b) / (1 - b)


class _FusedPSSiLU(torch.autograd.Function):
    """PSSiLU for eager mode: in-place passes, on the CPU over pieces that stay in cache, and x alone kept for backward.

    With c = 1 / (1 - b): f = c x s(ax) - b c x = lerp(x s(ax), x, -b c), and likewise f' = lerp(silu'(ax), 1, -b c).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, alpha, beta)
        ctx.kernels = _kernels
        if x.dtype == torch.float64:  # asked for to be exact, so as the formula is written, bit for bit
            return _forward_kernel(x, *_scalars(alpha, beta))
        if _kernels is not None and x.numel() >= _COMPILED_FROM and (flat := _flat(x)) is not None:
            out = _kernels[0](*_detached(*flat, alpha, beta))
            return out.as_strided(x.shape, x.stride())
        a, weight = alpha.abs().reshape(()), _lerp_weight(beta, x)
        out = torch.empty_like(x)
        for o, v in _pieces(out, x):
            torch.mul(v, a, out=o).sigmoid_().mul_(v)
            if weight is not None:
                o.lerp_(v, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, alpha, beta = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or _transformed(grad):
            return _differentiable_backward(x, grad, alpha, beta, needs)
        sums = needs[1] or needs[2]
        if ctx.kernels is not None and x.numel() >= _COMPILED_FROM and (flat := _flat(x, grad)) is not None:
            found = ctx.kernels[1](*_detached(*flat, alpha, beta), sums)
            grad_x = found[0].as_strided(x.shape, x.stride())
            return grad_x, *_parameter_gradients(found[1:], alpha, beta, needs)
        a, weight = alpha.abs().reshape(()), _lerp_weight(beta, x)
        grad_x = torch.empty_like(x) if needs[0] else None
        grad_a = grad_b = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for v, g, o in _pieces(x, grad, grad_x if grad_x is not None else x):
            z = (v * a).to(v.dtype)  # a number times a number, both without dimensions, would be as wide as a
            if sums:
                s = torch.sigmoid(z)
                h = g * v
                h.addcmul_(h, s, value=-1)  # g x (1 - s)
                grad_b = grad_b + h.sum(dtype=grad_b.dtype)
                grad_a = grad_a + h.mul_(s).mul_(v).sum(dtype=grad_a.dtype)
            if needs[0]:
                if weight is None:
                    torch.ops.aten.silu_backward(g, z, grad_input=o)
                else:
                    torch.lerp(torch.ops.aten.silu_backward(g, z), g, weight, out=o)
        return grad_x, *_parameter_gradients((grad_b, grad_a), alpha, beta, needs)


class _SlopedPSSiLU(torch.autograd.Function):
    """PSSiLU where the gradient of x alone is asked for, as in attacks: the slope is made beside the value.

    Backward is one product then, without another exponential. x is kept too, for gradients of gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        flat = _flat(x)
        assert flat is not None and _kernels is not None  # `_sloped` has seen to it
        out, slope = _kernels[2](*_detached(*flat, alpha, beta))
        ctx.save_for_backward(x, alpha, beta, slope.as_strided(x.shape, x.stride()))
        return out.as_strided(x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, alpha, beta, slope = ctx.saved_tensors
        if torch.is_grad_enabled() or _transformed(grad):
            return _differentiable_backward(x, grad, alpha, beta, ctx.needs_input_grad)
        return slope * grad, None, None  # in this order, for x's layout


def _differentiable_backward(
    x: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor | None, needs: tuple
) -> tuple:
    """Gradients in operations that can be differentiated and batched: for create_graph=True and is_grads_batched."""
    grad_x, *sums = _backward_kernel(x, grad, *_scalars(alpha, beta), sums=needs[1] or needs[2])
    return grad_x, *_parameter_gradients(tuple(sums), alpha, beta, needs)


def _sloped(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor | None) -> bool:
    """Whether `_SlopedPSSiLU` can be used, and pays."""
    return (
        _kernels is not None
        and x.requires_grad
        and torch.is_grad_enabled()
        and not alpha.requires_grad
        and (beta is None or not beta.requires_grad)
        and x.numel() >= _COMPILED_FROM
        and x.dtype != torch.float64
        and _flat(x) is not None
    )


def _parameter_gradients(
    sums: tuple[torch.Tensor, ...], alpha: torch.Tensor, beta: torch.Tensor | None, needs: tuple
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of alpha and beta from the sums of grad x (1 - s) and grad x^2 s (1 - s).

    df/da = x^2 s (1 - s) / (1 - b), df/db = -x (1 - s) / (1 - b)^2.
    """
    c = 1.0 if beta is None else 1 / (1 - _bounded(beta))
    grad_alpha = grad_beta = None
    if needs[1]:
        grad_alpha = (sums[1] * c * alpha.sign()).to(alpha.dtype).view_as(alpha)
    if needs[2] and beta is not None:
        grad_beta = (-sums[0] * c * c * beta.sign() * (beta.abs() <= BETA_MAX)).to(beta.dtype).view_as(beta)
    return grad_alpha, grad_beta


def _bounded(beta: torch.Tensor) -> torch.Tensor:
    """abs(beta), kept below 1."""
    return beta.abs().clamp(max=BETA_MAX)


def _scalars(alpha: torch.Tensor, beta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The parameters without dimensions, which leave x its shape."""
    return alpha.reshape(()), None if beta is None else beta.reshape(())


def _detached(*tensors: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """The tensors without requires_grad, on which compiled code would be specialised."""
    return (None if tensor is None else tensor.detach() for tensor in tensors)


def _lerp_weight(beta: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """-b / (1 - b) in x's dtype; zero-dimensional, because shape [1] would promote x's dtype."""
    if beta is None:
        return None
    b = _bounded(beta).reshape(())
    return (b / (b - 1)).to(x.dtype)


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors, cut into flat pieces of _PIECE elements where they are large, dense, alike in layout, on the CPU."""
    large = tensors[0].numel() > 2 * _PIECE and tensors[0].device.type == 'cpu'
    flat = _flat(*tensors) if large else None
    if flat is None:
        yield tensors
    else:
        yield from zip(*(t.split(_PIECE) for t in flat), strict=True)


def _flat(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """The tensors in the order of memory, if they are dense, alike in layout, and on a CPU or a GPU.

    As vectors; on a GPU in rows of _ROW, if that divides them: kernels of any size then still know that their data can
    be read 16 bytes at a time.
    """
    first = tensors[0]
    if first.device.type not in ('cpu', 'cuda') or any(t.stride() != first.stride() for t in tensors):
        return None
    if not first.is_contiguous() and first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last):
        tensors = tuple(t.permute(0, 2, 3, 1) for t in tensors)
    if not tensors[0].is_contiguous():
        return None
    rows = first.device.type == 'cuda' and first.numel() % _ROW == 0
    return tuple(t.view(-1, _ROW) if rows else t.view(-1) for t in tensors)
