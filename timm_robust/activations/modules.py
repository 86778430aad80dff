"""The activations as modules: their learnable scalars, and the shape of each curve in closed form.

>>> act = get_activation('pssilu')()
>>> {name: round(value, 3) for name, value in act.values().items()}
{'alpha': 1.0, 'beta': 0.0}
>>> round(act.shape().minimum, 4), round(act.max_curvature(), 4)
(-0.2785, 0.5)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, List

import torch
import torch.nn as nn
import torch.nn.functional as F

from .functions import (
    ALPHA_MIN,
    RAW_SQUARE_MIN,
    pelu,
    pprelu,
    prelu,
    psoftplus,
    reblu,
    smooth_relu,
    softplus,
    softplus10,
)
from .pssilu import BETA_MAX, psilu, pssilu

_DAI = ('Dai, Mahloujifar, Mittal 2021', '2110.05626')
_XIE = ('Xie et al. 2020', '2006.14536')


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


class Activation(nn.Module):
    """Base of the modules here: `forward(x)`, and `call(x, params())` for networks that share one set of parameters.

    Args:
        inplace: taken because timm builds `act_layer(inplace=True)`; these functions never overwrite their input.
        device: where the learnable scalars live.
        dtype: of the parameters.
        **init: initial values of the learnable scalars, by name.

    Raises:
        TypeError: for a scalar that this activation does not have.
    """

    initial: ClassVar[dict[str, float]] = {}
    """Learnable scalars, each a parameter of shape [1], with their initial values in the paper."""
    papers: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Where it comes from, or was studied under attack: who and when, and the number on arXiv."""
    kernels: ClassVar[tuple[str, ...]] = ()
    """Devices, 'cpu' or 'cuda', on which `compile_kernels` makes it faster in a network that stays eager."""

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
        """The learnable scalars' names."""
        return ', '.join(self.initial)


class _Alpha(Activation):
    """Base of the activations with one learnable scalar alpha."""

    initial = {'alpha': 1.0}
    papers = (_DAI,)

    def params(self) -> List[torch.Tensor]:
        """[alpha]."""
        return [self.alpha]  # type: ignore[list-item]


class PSSiLU(Activation):
    """x (s(a x) - b) / (1 - b), a = abs(alpha), b = abs(beta) kept below 1; see `pssilu`.

    beta starts at 1e-8 and never at 0, where d abs(beta) / d beta = 0 would keep it for ever.
    """

    initial = {'alpha': 1.0, 'beta': 1e-8}
    papers = (_DAI,)
    kernels = ('cpu', 'cuda')

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`pssilu(x, alpha, beta)`."""
        return pssilu(x, params[0], params[1])

    def params(self) -> List[torch.Tensor]:
        """[alpha, beta]."""
        return [self.alpha, self.beta]  # type: ignore[list-item]

    def shape(self) -> Shape:
        """Minimum where silu'(a x) = b; max abs(f'') = a / (2 (1 - b)), at 0."""
        return _pssilu_shape(abs(self.values()['alpha']), min(abs(self.values()['beta']), BETA_MAX))


class PSiLU(_Alpha):
    """x s(abs(alpha) x); see `psilu`."""

    kernels = ('cpu', 'cuda')

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """`psilu(x, alpha)`."""
        return psilu(x, params[0])

    def shape(self) -> Shape:
        """SiLU's, scaled: minimum -0.2785 / a, max abs(f'') = a / 2."""
        return _pssilu_shape(abs(self.values()['alpha']), 0.0)


class PSoftplus(_Alpha):
    """log(1 + exp(a x)) / a, a = abs(alpha); see `psoftplus`."""

    kernels = ('cpu',)

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
    papers = (_XIE,)
    kernels = ('cpu',)

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

    papers = (('Elfwing, Uchibe, Doya 2017', '1702.03118'), _XIE)

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """x s(x)."""
        return F.silu(x)

    def shape(self) -> Shape:
        """Minimum -0.2785, max abs(f'') = 1/2, at 0."""
        return _pssilu_shape(1.0, 0.0)


class GELU(Activation):
    """x Phi(x), Phi the normal distribution function (the exact form)."""

    papers = (('Hendrycks, Gimpel 2016', '1606.08415'), _XIE)

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """x Phi(x)."""
        return F.gelu(x)

    def shape(self) -> Shape:
        """Minimum -0.1700 where Phi(x) + x phi(x) = 0; max abs(f'') = sqrt(2 / pi), at 0."""
        normal = NormalDist()
        x = _bisect(lambda x: normal.cdf(x) + x * normal.pdf(x), -1.0, 0.0)
        return Shape(0.0, x * normal.cdf(x), math.sqrt(2 / math.pi))


class ELU(Activation):
    """x for x > 0, exp(x) - 1 otherwise."""

    papers = (('Clevert, Unterthiner, Hochreiter 2015', '1511.07289'), _XIE)

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """x for x > 0, exp(x) - 1 otherwise."""
        return F.elu(x)

    def shape(self) -> Shape:
        """Infimum -1, max abs(f'') = 1, just left of 0."""
        return Shape(0.0, -1.0, 1.0)


class Softplus(Activation):
    """log(1 + exp(x))."""

    papers = (_XIE,)

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """log(1 + exp(x))."""
        return softplus(x)

    def shape(self) -> Shape:
        """log(2) at 0, infimum 0, max abs(f'') = 1/4."""
        return Shape(math.log(2), 0.0, 0.25)


class ParametricSoftplus(Activation):
    """log(1 + exp(10 x)) / 10, Smooth Adversarial Training's smooth ReLU. Xie et al. 2020, arXiv:2006.14536."""

    kernels = ('cpu',)
    papers = (_XIE,)

    @staticmethod
    def call(x: torch.Tensor, params: List[torch.Tensor]) -> torch.Tensor:
        """log(1 + exp(10 x)) / 10."""
        return softplus10(x)

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


def _pssilu_shape(a: float, b: float) -> Shape:
    """Of x (s(a x) - b) / (1 - b), least where the derivative of z (s(z) - b), s(z) (1 + z (1 - s(z))) - b, is 0."""
    if a == 0:  # a line
        return Shape(0.0, 0.0 if b == 0.5 else -math.inf, 0.0)
    z = _bisect(lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))) - b, -2.0, 2.0)
    return Shape(0.0, z * (_sigmoid(z) - b) / (1 - b) / a, a / (2 * (1 - b)))


def _bisect(f: Callable[[float], float], lo: float, hi: float) -> float:
    """The zero of an f that rises through it once in [lo, hi]."""
    for _ in range(100):
        mid = (lo + hi) / 2
        lo, hi = (lo, mid) if f(mid) > 0 else (mid, hi)
    return lo


def has_kernels(model: nn.Module, device: str) -> bool:
    """Whether `compile_kernels(device)` makes an activation of the network faster."""
    return any(isinstance(module, Activation) and device in module.kernels for module in model.modules())


def activation_state(model: nn.Module) -> dict[str, float]:
    """alpha, beta and max abs(f'') of the network's shared activation, where it has learnable parameters."""
    act = getattr(model, 'shared_act', getattr(model, 'act', None))
    if not isinstance(act, Activation) or not act.initial:
        return {}
    return {**act.values(), 'max_curvature': act.max_curvature()}
