"""What the attacker may do: a ball around each image, and the box of valid pixels.

Formulas follow Madry et al. 2018, https://arxiv.org/abs/1706.06083. All tensors are images in [0, 1], shaped [B, C, H,
W]; eps and step sizes are in pixels on that scale, so the usual Linf budget is 8/255.

>>> eight = ThreatModel('Linf', '8/255')
>>> str(eight), round(eight.eps, 4)
('Linf 8/255', 0.0314)
>>> x = torch.full((1, 1, 2, 2), 0.99)
>>> float(eight.project(x + 0.5, x).max())  # inside the ball, and a valid pixel
1.0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NORMS = ('Linf', 'L2')
MAX_CLASSES = 100_000
"""More than any set of images has: a larger label is a damaged file, and room for its classes would fill the memory."""
_TINY = 1e-12
LEADERBOARD_EPS = {'Linf': '8/255', 'L2': '0.5'}
"""The radii of RobustBench's CIFAR-10 leaderboards."""


def parse_eps(eps: float | str) -> float:
    """Read a radius: a number, or text such as '8/255' or '0.5'.

    Returns:
        The radius as a float, on the scale where pixels lie in [0, 1].

    Raises:
        ValueError: if it is no number, or not finite, or negative.
    """
    try:
        if isinstance(eps, str) and '/' in eps:
            numerator, denominator = eps.split('/', 1)
            value = float(numerator) / float(denominator)
        else:
            value = float(eps)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError):
        raise ValueError(
            f"eps {eps!r} is not a number; write a fraction such as '8/255' or a decimal such as 0.5"
        ) from None
    if not 0 <= value < float('inf'):
        raise ValueError(f"eps {eps!r} must be finite and not negative; write for example '8/255'")
    return value


def check_step_size(step_size: float | str | None, eps: float, name: str) -> None:
    """Refuse a step that is no positive number, or wider than the ball of radius eps; None stands for a default.

    Raises:
        ValueError: saying what is allowed.
    """
    if step_size is None:
        return
    try:
        value = parse_eps(step_size)
    except ValueError:
        value = 0.0
    if not value:
        raise ValueError(f"{name} {step_size!r} is not a positive number; write for example '2/255' or 0.0078")
    if value > 2 * eps * (1 + 1e-6):
        raise ValueError(
            f'{name} {step_size!r} is wider than the ball, {2 * eps:.4g} across; allowed: up to that, in pixels '
            "on [0, 1], such as '2/255'"
        )


def resolved_step_size(step_size: float | str | None, eps: float, steps: int, name: str) -> float:
    """The step of PGD in pixels: step_size if it is given, else 2.5 eps / steps, but no more than the ball is wide.

    Raises:
        ValueError: for a step_size that is refused, by its name.
    """
    check_step_size(step_size, eps, name)
    return min(2.5 * eps / steps, 2 * eps) if step_size is None else parse_eps(step_size)


@dataclass(frozen=True)
class ThreatModel:
    """The set of allowed perturbations {d : ||d||_norm <= eps, lo <= x + d <= hi}.

    Args:
        norm: 'Linf' or 'L2'.
        eps: radius in pixels on the [0, 1] scale; text such as '8/255' is read too.
        bounds: smallest and largest valid pixel.
    """

    norm: str = 'Linf'
    eps: float = 8 / 255
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Read eps, and refuse what cannot be meant."""
        if self.norm not in NORMS:
            raise ValueError(f'norm {self.norm!r} is unknown; allowed: {", ".join(NORMS)}')
        given = self.eps
        object.__setattr__(self, 'eps', parse_eps(given))
        lo, hi = self.bounds
        if not lo < hi:
            raise ValueError(f'bounds {self.bounds!r} are empty; write (0.0, 1.0)')
        if self.norm == 'Linf' and self.eps > hi - lo:
            raise ValueError(
                f'eps {given!r} for Linf is wider than the pixel range: pixels lie in [{lo:g}, {hi:g}] here. '
                f"For {given} steps of 8-bit images write '{given}/255'"
            )

    def check_scale(self) -> None:
        """Refuse an L2 radius that holds every small image: one on the scale of 8-bit pixels, most likely.

        Raises:
            ValueError: saying what is allowed.
        """
        lo, hi = self.bounds
        if self.norm == 'L2' and self.eps > 32 * (hi - lo):
            raise ValueError(
                f'eps {self.eps:g} for L2 holds every image: pixels lie in [{lo:g}, {hi:g}] here, and 32 x 32 images '
                f'have a distance of 55 at most; allowed: up to {32 * (hi - lo):g}. For {self.eps:g} on the scale of '
                f"8-bit images write '{self.eps:g}/255'"
            )

    def find_problems(self) -> list[str]:
        """What may be meant, but rarely is; a line of text each."""
        lo, hi = self.bounds
        if self.eps < 1e-4 * (hi - lo):
            return [f'{self} is far less than one step of 8-bit pixels, 1/255; hardly anything can change']
        if self.norm == 'Linf' and self.eps >= (hi - lo) / 2:
            return [f'in the ball of {self} every image can be made grey all over, so no network can resist']
        if self.norm == 'L2' and self.eps == 8 / 255:
            return [f'{self} is 8/255, a usual radius of Linf; that of L2 is 0.5 (--eps 0.5, or --norm Linf)']
        if self.norm == 'L2' and self.eps > 10 * (hi - lo):
            return [f'{self} is far beyond the usual 0.5 to 5, and on small images holds pictures of every class']
        return []

    def random_start(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """A random point of the ball around each image, inside the bounds.

        Linf: uniform in the cube. L2: uniform in the ball (Gaussian direction, radius eps * U^(1/d)).

        Args:
            x: images [B, C, H, W].
            generator: source of randomness on x's device; the global one if None.
        """
        if self.norm == 'Linf':
            noise = torch.empty_like(x).uniform_(-self.eps, self.eps, generator=generator)
        else:
            noise = torch.empty_like(x).normal_(generator=generator)
            dim = x[0].numel()
            radius = torch.empty(len(x), device=x.device, dtype=x.dtype).uniform_(generator=generator).pow_(1 / dim)
            noise = noise * _per_image(self.eps * radius / _l2(noise), x)
        return (x + noise).clamp(*self.bounds)

    def step(self, x_adv: torch.Tensor, grad: torch.Tensor, step_size: float | torch.Tensor) -> torch.Tensor:
        """The steepest ascent step of length step_size (a number, or one an image) in this norm; not yet projected.

        Linf: x_adv + step_size * sign(grad). L2: x_adv + step_size * grad / ||grad||_2 (a zero gradient stays put).
        """
        if self.norm == 'Linf':
            return x_adv + step_size * grad.sign()
        return x_adv + step_size * grad * _per_image(1 / _l2(grad), x_adv)

    def project(self, x_adv: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """An allowed point near x_adv: the nearest of the ball around x, clipped to the bounds.

        Clipping to a box that holds x only brings points nearer to x, so the result stays in the ball. In Linf it is
        the nearest allowed point. In L2 it is so only where no pixel is clipped; else what clipping takes from a
        perturbation is not given back to the other pixels, and the nearest allowed point is longer: by 0.004 for
        32 x 32 images of uniform pixels at eps 0.5, by 0.16 where every pixel is black or white. AutoAttack projects
        likewise.
        """
        if self.norm == 'Linf':
            x_adv = x_adv.clamp(x - self.eps, x + self.eps)
        else:
            delta = x_adv - x
            x_adv = x + delta * _per_image((self.eps / _l2(delta)).clamp(max=1.0), x)
        return x_adv.clamp(*self.bounds)

    def distance(self, x_adv: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """||x_adv - x|| of each image, [B]."""
        delta = x_adv - x
        return delta.flatten(1).abs().amax(1) if self.norm == 'Linf' else _sum_of_squares(delta).sqrt()

    def contains(self, x_adv: torch.Tensor, x: torch.Tensor, tolerance: float = 1e-6) -> torch.Tensor:
        """Whether each x_adv is allowed, [B] of bool; tolerance absorbs rounding (AutoAttack reaches 8.0000071/255)."""
        lo, hi = self.bounds
        inside = ((x_adv >= lo - tolerance) & (x_adv <= hi + tolerance)).flatten(1).all(1)
        return inside & (self.distance(x_adv, x) <= self.eps + tolerance)

    def __str__(self) -> str:
        """Norm and radius as people write them: 'Linf 8/255', 'L2 0.5'."""
        return f'{self.norm} {self.eps_text}'

    @property
    def eps_text(self) -> str:
        """Eps as the field writes it: for Linf n/255 if that is exact, else a decimal; it is read back as this eps."""
        fraction, decimal = f'{round(self.eps * 510) / 2:g}/255', f'{self.eps:.4g}'
        texts = [fraction, decimal] if self.norm == 'Linf' else [decimal, fraction]
        exact = [text for text in texts if parse_eps(text) == self.eps]
        return exact[0] if exact else repr(self.eps)


def check_images(x: torch.Tensor, y: torch.Tensor, num_classes: int | None = None) -> None:
    """Refuse tensors that are not a batch of images in [0, 1] with matching labels.

    Raises:
        ValueError: naming the shape, type, range or label count that is wrong, and how to mend it.
    """
    if x.ndim != 4:
        raise ValueError(f'images must be [B, C, H, W], got shape {list(x.shape)}; add the batch axis with x[None]')
    if not x.is_floating_point():
        raise ValueError(f'images must be floating point in [0, 1], got {x.dtype}; write x.float() / 255')
    if not len(x):
        return
    lo, hi = x.aminmax()
    if not (lo >= 0 and hi <= 1):
        raise ValueError(
            f'pixels must lie in [0, 1], got [{lo.item():.4g}, {hi.item():.4g}]; divide 8-bit images by 255, and leave '
            'normalisation to the model (eps is in pixels)'
        )
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(f'labels must be whole numbers [B] = [{len(x)}], got shape {list(y.shape)} of {y.dtype}')
    if num_classes is not None and not (y.min() >= 0 and y.max() < num_classes):
        raise ValueError(f'labels must lie in 0..{num_classes - 1}, got {y.min().item()}..{y.max().item()}')


def _l2(delta: torch.Tensor) -> torch.Tensor:
    """L2 norm of each image, [B], never quite zero."""
    return _sum_of_squares(delta).sqrt().clamp_min(_TINY)


def _sum_of_squares(delta: torch.Tensor) -> torch.Tensor:
    """Of each image, [B]: sum adds pairwise; norm adds one by one on CPUs, 1e-4 off at 224 x 224 pixels."""
    return delta.flatten(1).square().sum(1)


def _per_image(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1], to scale the images of x."""
    return value.view(-1, *[1] * (x.ndim - 1))
