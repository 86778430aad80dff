"""Activation functions for adversarial robustness: functional forms, modules, and the shape of each curve.

Parametric family of Dai, Mahloujifar, Mittal 2021 (https://arxiv.org/abs/2110.05626), each at its initial value a
known one:

| name      | class          | formula                                                 | at init  | shapes           |
|-----------|----------------|---------------------------------------------------------|----------|------------------|
| pssilu    | PSSiLU         | x (s(a x) - b) / (1 - b), a = abs(alpha), b = abs(beta) | SiLU     | near 0, negative |
| psilu     | PSiLU          | x s(abs(alpha) x)                                       | SiLU     | near 0           |
| psoftplus | PSoftplus      | log(1 + exp(a x)) / a, a = abs(alpha)                   | Softplus | near 0           |
| prelu     | PReLU          | x for x > 0, alpha x otherwise                          | ReLU     | negative         |
| pelu      | PELU           | x for x > 0, alpha (exp(x) - 1) otherwise               | ELU      | negative         |
| pprelu    | PReLUPlus      | alpha x for x > 0, 0 otherwise ('PReLU+')               | ReLU     | positive         |
| reblu     | ReBLU          | x + alpha (sqrt(x^2 + 1) - 1) for x > 0, 0 otherwise    | ReLU     | positive         |

Smooth Adversarial Training, Xie et al. 2020 (https://arxiv.org/abs/2006.14536):

| name       | class               | formula                                                                |
|------------|---------------------|------------------------------------------------------------------------|
| smoothrelu | SmoothReLU          | x - log(1 + a x) / a for x >= 0, 0 otherwise, a = raw^2, raw starts at 20 |
| softplus10 | ParametricSoftplus  | log(1 + exp(10 x)) / 10                                                |

and `relu`, `silu`, `gelu`, `elu`, `softplus`. s is the logistic sigmoid. Every function takes any shape, and returns
its input's shape and dtype (a bf16 input gives a bf16 result whatever the dtype of the parameters).

The paper shares one (alpha, beta) over a whole network. A network of ours therefore owns one module of this file, and
hands its blocks the tensors (`act.params()`), which call the class's `call(x, params)`: no tensor stands twice in the
state dict.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, List

import torch
import torch.nn as nn
import torch.nn.functional as F

from .pssilu import BETA_MAX, psilu, pssilu

ALPHA_MIN = 1e-3
"""PSoftplus' abs(alpha) acts as max(abs(alpha), ALPHA_MIN): at 0 the formula divides by zero."""

RAW_SQUARE_MIN = 1e-6
"""SmoothReLU's a = raw^2 acts as max(raw^2, RAW_SQUARE_MIN), likewise."""


@dataclass(frozen=True)
class Shape:
    """What a curve f looks like.

    Args:
        value_at_zero: f(0).
        minimum: infimum of f over the real line; -inf where f is unbounded below.
        max_curvature: supremum of abs(f''); inf where f has a kink.
    """

    value_at_zero: float
    minimum: float
    max_curvature: float


def psoftplus(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Parametric Softplus: log(1 + exp(a x)) / a, a = max(abs(alpha), 0.001). Dai et al. 2021, arXiv:2110.05626."""
    a = alpha.abs().clamp(min=0.001)  # ALPHA_MIN
    return (_log1p_exp(a * x) / a).to(x.dtype).view_as(x)  # a number stays one, whatever alpha's shape


def prelu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """X for x > 0, alpha x otherwise; alpha is free in sign. Dai et al. 2021, arXiv:2110.05626."""
    return F.prelu(x, alpha.to(x.dtype))


def pprelu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """PReLU+: alpha x for x > 0, 0 otherwise. Dai et al. 2021, arXiv:2110.05626."""
    return (F.relu(x) * alpha.to(x.dtype)).view_as(x)


def pelu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """X for x > 0, alpha (exp(x) - 1) otherwise: ELU with a learnable scale. Dai et al. 2021, arXiv:2110.05626."""
    return (F.relu(x) + alpha.to(x.dtype) * torch.expm1(x - F.relu(x))).view_as(x)


def reblu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Rectified bendable linear unit: x + alpha (sqrt(x^2 + 1) - 1) for x > 0, 0 otherwise. Dai et al. 2021."""
    y = _wide(F.relu(x))
    return (alpha * (torch.sqrt(y * y + 1) - 1) + y).to(x.dtype).view_as(x)


def smooth_relu(x: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """X - log(1 + a x) / a for x >= 0, 0 otherwise, a = raw^2. Xie et al. 2020, https://arxiv.org/abs/2006.14536.

    f' = a x / (1 + a x) for x >= 0, so f''(0+) = a = max abs(f''): C1, not C2. raw = 0 gives 0, its limit.
    """
    y, raw = _wide(F.relu(x)), _wide(raw)
    a = (raw * raw).clamp(min=1e-6)  # RAW_SQUARE_MIN
    return (y - torch.log1p(a * y) / a).to(x.dtype).view_as(x)


def _log1p_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)).

    Not by logsigmoid where a compiler reads it: torch exports that to ONNX as log(sigmoid), which is -inf far left.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.relu(x) + torch.log1p(torch.exp(-x.abs()))
    return -F.logsigmoid(-x)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 at least: in half precision differences vanish, and squares overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def parametric_softplus(x: torch.Tensor, alpha: float = 10.0) -> torch.Tensor:
    """log(1 + exp(alpha x)) / alpha, alpha fixed. Xie et al. 2020, arXiv:2006.14536."""
    return _log1p_exp(alpha * x) / alpha


# --- modules ----------------------------------------------------------------------------------------------------------


class Activation(nn.Module):
    """Base of the modules here: `forward(x)`, and `call(x, params())` for networks that share one set of parameters.

    Args:
        inplace: taken because timm builds `act_layer(inplace=True)`; these functions never overwrite their input.
        device: where the learnable scalars live.
        dtype: and as what.
        **init: initial values of the learnable scalars, by name.

    Raises:
        TypeError: for a scalar that this activation does not have.
    """

    initial: ClassVar[dict[str, float]] = {}
    """Learnable scalars, each a parameter of shape [1], with their initial values in the paper."""

    def __init__(self, inplace: bool = False, device: Any = None, dtype: Any = None, **init: float) -> None:
        super().__init__()
        unknown = sorted(set(init) - set(self.initial))
        if unknown:
            has = ', '.join(self.initial) or 'no parameters'
            raise TypeError(f'{type(self).__name__} has no parameter {", ".join(unknown)}; it has: {has}')
        for name, value in {**self.initial, **init}.items():
            setattr(self, name, nn.Parameter(torch.full((1,), float(value), device=device, dtype=dtype)))

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """The function of x and the tensors of `params()`."""
        raise NotImplementedError  # abstract: every class below says its own

    def params(self) -> List[torch.Tensor]:
        """The learnable scalars, in the order in which `call` takes them."""
        return torch.jit.annotate(List[torch.Tensor], [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The activation of x, in x's shape and dtype."""
        return self.call(x, self.params())

    def values(self) -> dict[str, float]:
        """The learnable scalars as numbers."""
        return {name: getattr(self, name).item() for name in self.initial}

    def shape(self) -> Shape:
        """Value at 0, minimum and max abs(f'') of the curve with the present parameters, in closed form."""
        raise NotImplementedError  # abstract: every class below says its own

    def max_curvature(self) -> float:
        """Supremum of abs(f'')."""
        return self.shape().max_curvature

    def extra_repr(self) -> str:
        """The learnable scalars' names and initial values."""
        return ', '.join(self.initial)


class _Alpha(Activation):
    """Base of the activations with one learnable scalar alpha."""

    initial = {'alpha': 1.0}

    def params(self) -> List[torch.Tensor]:
        """[alpha]."""
        return [self.alpha]  # type: ignore[list-item]


class PSSiLU(Activation):
    """x (s(a x) - b) / (1 - b), a = abs(alpha), b = abs(beta) kept below 1; see `pssilu`.

    beta starts at 1e-8 and never at 0, where d abs(beta) / d beta = 0 would keep it for ever.
    """

    initial = {'alpha': 1.0, 'beta': 1e-8}

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`pssilu(x, alpha, beta)`."""
        return pssilu(x, params[0], params[1])

    def params(self) -> List[torch.Tensor]:
        """[alpha, beta]."""
        return [self.alpha, self.beta]  # type: ignore[list-item]

    def shape(self) -> Shape:
        """Minimum where silu'(a x) = b; max abs(f'') = a / (2 (1 - b)), at 0."""
        a, b = abs(self.values()['alpha']), min(abs(self.values()['beta']), BETA_MAX)
        if a == 0:
            return Shape(0.0, -math.inf if b != 0.5 else 0.0, 0.0)
        return Shape(0.0, _silu_minimum(b) / a, a / (2 * (1 - b)))


class PSiLU(_Alpha):
    """x s(abs(alpha) x); see `psilu`."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`psilu(x, alpha)`."""
        return psilu(x, params[0])

    def shape(self) -> Shape:
        """SiLU's, scaled: minimum -0.2785 / a, max abs(f'') = a / 2."""
        a = abs(self.values()['alpha'])
        return Shape(0.0, _silu_minimum(0.0) / a, a / 2) if a else Shape(0.0, -math.inf, 0.0)


class PSoftplus(_Alpha):
    """log(1 + exp(a x)) / a, a = abs(alpha); see `psoftplus`."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`psoftplus(x, alpha)`."""
        return psoftplus(x, params[0])

    def shape(self) -> Shape:
        """log(2) / a at 0, infimum 0, max abs(f'') = a / 4."""
        a = max(abs(self.values()['alpha']), ALPHA_MIN)
        return Shape(math.log(2) / a, 0.0, a / 4)


class PReLU(_Alpha):
    """x for x > 0, alpha x otherwise, from alpha = 0; see `prelu`."""

    initial = {'alpha': 0.0}

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`prelu(x, alpha)`."""
        return prelu(x, params[0])

    def shape(self) -> Shape:
        """A kink at 0 unless alpha = 1."""
        a = self.values()['alpha']
        return Shape(0.0, -math.inf if a > 0 else 0.0, 0.0 if a == 1 else math.inf)


class PReLUPlus(_Alpha):
    """alpha x for x > 0, 0 otherwise; see `pprelu`."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`pprelu(x, alpha)`."""
        return pprelu(x, params[0])

    def shape(self) -> Shape:
        """A kink at 0 unless alpha = 0."""
        a = self.values()['alpha']
        return Shape(0.0, -math.inf if a < 0 else 0.0, math.inf if a else 0.0)


class PELU(_Alpha):
    """x for x > 0, alpha (exp(x) - 1) otherwise; see `pelu`."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`pelu(x, alpha)`."""
        return pelu(x, params[0])

    def shape(self) -> Shape:
        """Infimum -alpha; a kink at 0 unless alpha = 1, where max abs(f'') = 1."""
        a = self.values()['alpha']
        return Shape(0.0, min(-a, 0.0), 1.0 if a == 1 else math.inf)


class ReBLU(_Alpha):
    """x + alpha (sqrt(x^2 + 1) - 1) for x > 0, 0 otherwise, from alpha = 0; see `reblu`."""

    initial = {'alpha': 0.0}

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`reblu(x, alpha)`."""
        return reblu(x, params[0])

    def shape(self) -> Shape:
        """A kink at 0: slope 1 to the right whatever alpha; unbounded below for alpha < -1."""
        return Shape(0.0, -math.inf if self.values()['alpha'] < -1 else 0.0, math.inf)


class SmoothReLU(Activation):
    """x - log(1 + a x) / a for x >= 0, 0 otherwise, a = raw^2 from raw = 20; see `smooth_relu`."""

    initial = {'raw': 20.0}

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`smooth_relu(x, raw)`."""
        return smooth_relu(x, params[0])

    def params(self) -> List[torch.Tensor]:
        """[raw]."""
        return [self.raw]  # type: ignore[list-item]

    def shape(self) -> Shape:
        """Max abs(f'') = a, just right of 0."""
        return Shape(0.0, 0.0, max(self.values()['raw'] ** 2, RAW_SQUARE_MIN))


class ReLU(Activation):
    """max(x, 0)."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """max(x, 0)."""
        return F.relu(x)

    def shape(self) -> Shape:
        """A kink at 0."""
        return Shape(0.0, 0.0, math.inf)


class SiLU(Activation):
    """x s(x), also called Swish."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """X s(x)."""
        return F.silu(x)

    def shape(self) -> Shape:
        """Minimum -0.2785, max abs(f'') = 1/2, at 0."""
        return Shape(0.0, _silu_minimum(0.0), 0.5)


class GELU(Activation):
    """x Phi(x), Phi the normal distribution function (the exact form)."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """X Phi(x)."""
        return F.gelu(x)

    def shape(self) -> Shape:
        """Minimum -0.1700 where Phi(x) + x phi(x) = 0; max abs(f'') = sqrt(2 / pi), at 0."""
        x = _bisect(lambda x: _normal_cdf(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi), -1.0, 0.0)
        return Shape(0.0, x * _normal_cdf(x), math.sqrt(2 / math.pi))


class ELU(Activation):
    """x for x > 0, exp(x) - 1 otherwise."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """X for x > 0, exp(x) - 1 otherwise."""
        return F.elu(x)

    def shape(self) -> Shape:
        """Infimum -1, max abs(f'') = 1, just left of 0."""
        return Shape(0.0, -1.0, 1.0)


class Softplus(Activation):
    """log(1 + exp(x))."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """log(1 + exp(x))."""
        return _log1p_exp(x)

    def shape(self) -> Shape:
        """log(2) at 0, infimum 0, max abs(f'') = 1/4."""
        return Shape(math.log(2), 0.0, 0.25)


class ParametricSoftplus(Activation):
    """log(1 + exp(10 x)) / 10, Smooth Adversarial Training's smooth ReLU; see `parametric_softplus`."""

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`parametric_softplus(x)`."""
        return parametric_softplus(x)

    def shape(self) -> Shape:
        """log(2) / 10 at 0, infimum 0, max abs(f'') = 10/4."""
        return Shape(math.log(2) / 10, 0.0, 2.5)


ACTIVATIONS: dict[str, type[Activation]] = {
    'relu': ReLU,
    'silu': SiLU,
    'gelu': GELU,
    'elu': ELU,
    'softplus': Softplus,
    'pssilu': PSSiLU,
    'psilu': PSiLU,
    'psoftplus': PSoftplus,
    'prelu': PReLU,
    'pprelu': PReLUPlus,
    'pelu': PELU,
    'reblu': ReBLU,
    'smoothrelu': SmoothReLU,
    'softplus10': ParametricSoftplus,
}
"""Every activation by the name that model names end in."""


def get_activation(name: str) -> type[Activation]:
    """The class of an activation's name, such as 'pssilu'.

    Raises:
        ValueError: for a name that is not there, with the nearest one and all of them.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    near = difflib.get_close_matches(name, ACTIVATIONS, n=1)
    hint = f' (did you mean {near[0]!r}?)' if near else ''
    raise ValueError(f'activation {name!r} is unknown{hint}; there are: {", ".join(ACTIVATIONS)}')


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _silu_minimum(b: float) -> float:
    """Minimum of z (s(z) - b) / (1 - b), where its derivative s(z) (1 + z (1 - s(z))) - b changes sign."""
    z = _bisect(lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))) - b, -2.0, 2.0)
    return z * (_sigmoid(z) - b) / (1 - b)


def _bisect(f: Callable[[float], float], lo: float, hi: float) -> float:
    """The zero of an f that rises through it once in [lo, hi]."""
    for _ in range(100):
        mid = (lo + hi) / 2
        lo, hi = (lo, mid) if f(mid) > 0 else (mid, hi)
    return lo
