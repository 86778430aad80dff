#!/usr/bin/env python3
"""Is everything right on this machine? One table: minutes on a GPU; with --toy tiny networks, on a CPU too.

    python benchmarks/gpu_smoke.py                    # every recipe takes steps; the main ones compiled and resumed
    python benchmarks/gpu_smoke.py --toy              # the same checks on tiny networks
    python benchmarks/gpu_smoke.py --only kernels     # checks whose name holds one of these words

Rows are printed as they come; status 1 if one failed. Images are random unless --data-dir names CIFAR-10, and image
rates are those of eager mode: for claims there is train_step.py.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from activation import formula
from train_step import sparse_images
from turns import wait

from timm_robust.activations.pssilu import compiled_kernels, pssilu, using
from timm_robust.attacks.gradient import attacked, input_gradient
from timm_robust.command_line import Parser, command, count
from timm_robust.data import load_dataset
from timm_robust.distributed import World
from timm_robust.evaluation.autoattack import autoattack, predict
from timm_robust.evaluation.search_network import search_model
from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.precision import ieee_fp32
from timm_robust.threat_model import ThreatModel
from timm_robust.training.builder import build, make_attack_forward
from timm_robust.training.loop import Stopped, fit
from timm_robust.training.recipe import Recipe
from timm_robust.training.step import AttackForward, Forward
from timm_robust.training.validation import validate

RECIPES = Path(__file__).parent.parent / 'train' / 'recipes'
MAIN = ('wrn28_10_pssilu.trades_cifar10_linf', 'resnet18_pssilu.fast_cifar10_linf', 'resnet18_pssilu.fgsm_cifar10_linf')
STEPS = 2  # timed, after one that warms up
Check = Callable[[], str]


class Mismatch(Exception):
    """A result that is wrong; the message says how."""


class Skipped(Exception):
    """A check that cannot run here; the message says why."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the table; 0 if none failed, else 1."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--toy', action='store_true', help='tiny networks and batches, to see on any machine that the checks run')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--data-dir', help='folder with CIFAR-10; random images if not given')
    add('--batch', type=count, help="images a step; the recipe's own, at most 128 (--toy: 8), if not given")
    add('--only', nargs='+', default=[''], metavar='WORD', help='checks whose name holds one of these')
    add('--seconds', type=float, default=480.0, help='begin no check after so many')
    args = parser.parse_args(argv)
    args.batch = args.batch or (8 if args.toy else 128)
    if not args.toy and args.device == 'cpu':
        parser.error('full size takes hours on a CPU; add --toy')
    World.join(args.device)  # or say that there is no such device
    if args.data_dir:
        load_dataset('cifar10', args.data_dir)
    where = torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'
    print(f'{where}, torch {torch.__version__}\n{"check":58s}{"result":9s}{"seconds":>8s}  detail', flush=True)
    started, failed, ran = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, check in checks(args, Path(folder)):
            if not any(word in name for word in args.only):
                continue
            ran += 1
            began = time.perf_counter()
            result, detail = ('skipped', '--seconds is over')
            if began - started < args.seconds:
                result, detail = outcome(check)
            failed += result == 'FAILED'
            print(f'{name:58s}{result:9s}{time.perf_counter() - began:8.1f}  {detail}', flush=True)
    if not ran:
        raise ValueError(f'no check has {" or ".join(args.only)} in its name')
    print(f'{failed} of {ran} checks failed, {time.perf_counter() - started:.0f} seconds', flush=True)
    return int(failed > 0)


def outcome(check: Check) -> tuple[str, str]:
    """'ok', 'skipped' or 'FAILED', and a line; whatever a check raises is its own failure."""
    try:
        return 'ok', check()
    except Skipped as reason:
        return 'skipped', str(reason)
    except Exception as error:
        if not isinstance(error, Mismatch):
            traceback.print_exc()
        return 'FAILED', ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    finally:
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def checks(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Check]]:
    """Name -> what runs it; the shortest first, so that a run that is cut off has told most."""
    compiled = torch.compile(pssilu, dynamic=False, backend=backend(args.device))
    for variant, function in {'eager': pssilu, 'compiled': compiled, 'alone': alone}.items():
        for dtype in (torch.float32, torch.bfloat16):
            name = f'kernels: pssilu {variant} {str(dtype).removeprefix("torch.")}'
            yield name, partial(check_kernels, function, dtype, args, twice=variant != 'compiled')

    def of(check: Callable[[Recipe], str], name: str, shallow: bool = False) -> Check:
        return lambda: check(small(name, args, folder, shallow))

    names = sorted((path.stem for path in RECIPES.glob('*.*.yaml')), key=lambda name: (name not in MAIN, name))
    for name in names:
        yield f'step: {name}', of(check_step, name)
    for name in MAIN:
        yield f'resume: {name}', of(check_resume, name, shallow=True)
        yield f'validate: {name}', of(check_validation, name)
    yield f'autoattack: {MAIN[1]}', of(check_autoattack, MAIN[1], shallow=True)
    for name in MAIN[:2]:
        yield f'compile: {name}', of(check_compiled, name, shallow=True)


def alone(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """PSSiLU by the kernels that run where the network around is not compiled."""
    with using(compiled_kernels(x.device.type)):
        return pssilu(x, alpha, beta)


def backend(device: str) -> str:
    """Of torch.compile; on a CPU it stops short of machine code, which would take longer than all the rest."""
    return 'aot_eager' if device == 'cpu' else 'inductor'


def small(name: str, args: argparse.Namespace, folder: Path, shallow: bool = False) -> Recipe:
    """A recipe of train/recipes on images of ours, eager, in batches that fit.

    Args:
        name: of the recipe.
        args: toy: a tiny network; batch, device, data_dir.
        folder: for data and output.
        shallow: one block a stage, at full width: every kind of kernel in a fraction of the time.
    """
    recipe = Recipe.from_yaml(RECIPES / f'{name}.yaml')
    side = (recipe.img_size or 32) if not args.toy else 32
    changes: dict[str, Any] = {'batch_size': min(recipe.batch_size, args.batch), 'img_size': None}
    if args.toy or shallow:
        tiny = args.toy
        changes['model_kwargs'] = {
            'resnet18': {'depths': (1, 1, 1, 1)} | ({'width': 4} if tiny else {}),
            'wrn28': {'depth': 10} | ({'widen_factor': 1} if tiny else {}),
            'resnet50': {'layers': (1, 1, 1, 1)},
        }.get(recipe.model.partition('_')[0], {})
        changes['model'] = recipe.model.replace('efficientnet_l1', 'efficientnet_b0')
    images = random_images(folder, side, 4 * changes['batch_size'] + 16)
    changes |= {'dataset': 'npz', 'data_dir': str(images), 'val_size': 16}
    if args.data_dir and side == 32:
        changes |= {'dataset': 'cifar10', 'data_dir': args.data_dir}
    if recipe.extra_data:
        changes['extra_data'] = str(folder / 'x_image.npy')
        if not (folder / 'x_image.npy').is_file():
            sparse_images(folder, 1000)
    changes |= {'device': args.device, 'torchcompile': False, 'budget': None, 'workers': 0, 'eval_steps': 2}
    return dataclasses.replace(recipe, **changes, output=str(folder), experiment=name)


def random_images(folder: Path, side: int, n: int) -> Path:
    """A folder with n random images of ten classes, as `train.npz`."""
    place = folder / f'{n}-images-{side}'
    if not place.is_dir():
        place.mkdir()
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
        np.savez(place / 'train.npz', image=images, label=np.arange(n) % 10)
    return place


def check_kernels(
    function: Callable[..., torch.Tensor], dtype: torch.dtype, args: argparse.Namespace, twice: bool
) -> str:
    """PSSiLU and its gradients against the formula in float64 on the same inputs.

    Args:
        function: PSSiLU of x, alpha and beta.
        dtype: of x.
        args: toy, device.
        twice: the gradient of the gradient too; torch.compile has none.
    """
    n = 1 << (16 if args.toy else 22)
    generator = torch.Generator().manual_seed(0)
    x, grad, other = (torch.randn(n // 64, 4, 4, 4, generator=generator).to(dtype) for _ in range(3))
    layout = {'device': args.device, 'memory_format': torch.channels_last}
    sides: list[list[torch.Tensor]] = []
    for f, to in ((function, dtype), (formula, torch.float64)):
        leaf = x.to(dtype=to, **layout).requires_grad_()
        kind = torch.promote_types(to, torch.float32)
        params = [torch.full((1,), v, device=args.device, dtype=kind, requires_grad=True) for v in (1.3, 0.2)]
        y = f(leaf, *params)
        first = torch.autograd.grad(y, [leaf, *params], grad.to(dtype=to, **layout), create_graph=twice)
        second = torch.autograd.grad(first[0], leaf, other.to(dtype=to, **layout)) if twice else ()
        sides.append([y, *first, *second])
    names = ('value', 'gradient of x', 'gradient of alpha', 'gradient of beta', 'second gradient')
    errors = dict(zip(names, map(distance, *sides), strict=False))
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    wrong = [f'{name} is {error:.1e} from float64' for name, error in errors.items() if not error <= allowed]
    if wrong:
        raise Mismatch(f'{", ".join(wrong)}; allowed: {allowed:.0e}')
    return f'{len(errors)} results, at most {max(errors.values()):.1e} from float64'


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm())


def check_step(recipe: Recipe) -> str:
    """Steps at the end of the schedule, where the attack is at its longest and AWP at work."""
    run = build(recipe)
    if run.world.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    for number in range(1 + STEPS):
        if number == 1:
            wait()
            started = time.perf_counter()
        loss = run.train_step(*run.batches[number], number, 1.0).loss
    wait()
    seconds = (time.perf_counter() - started) / STEPS
    after = run.model.state_dict()
    if not (loss.isfinite() and all(value.isfinite().all() for value in after.values())):
        raise Mismatch(f'loss {loss.item()}, or weights, are not finite')
    if all(torch.equal(before[key], after[key]) for key in before):
        raise Mismatch('no weight has changed')
    x, y = run.batches[STEPS + 1]
    x_adv = run.train_step.perturb(x, y, 1.0)
    if recipe.attack != 'n_fgsm' and not recipe.threat_model.contains(x_adv, x).all():  # it leaves the ball by design
        raise Mismatch(f'an adversarial image is outside of {recipe.threat_model}')
    memory = f', {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB' if run.world.device.type == 'cuda' else ''
    return f'{recipe.batch_size / seconds:,.0f} images/s, loss {loss.item():.3f}{memory}'


def check_compiled(recipe: Recipe) -> str:
    """Compiled and eager mode against float64: compiled may be twice as far from it, and 1e-4, for chance."""
    eager, other = (build(recipe) for _ in range(2))
    device = eager.world.device
    for forward in (other.forward, other.attack_forward._folded_forward):
        forward.net = torch.compile(forward.net, dynamic=False, backend=backend(device.type))
    x, y = eager.batches[0]
    exact, model = dataclasses.replace(recipe, amp=False), copy.deepcopy(eager.model).double()
    forward = Forward(model, exact.precision, device)
    exact_forward = make_attack_forward(model, forward, exact, x[:2].double())
    with ieee_fp32():
        expected = gradients(forward, exact_forward, x.double(), y)
        found = [gradients(run.forward, run.attack_forward, x, y) for run in (eager, other)]
    details = []
    for what, *values in zip(expected, expected.values(), *(part.values() for part in found), strict=True):
        errors = [distance(value, values[0]) for value in values[1:]]
        details.append(f'{what} {errors[1]:.0e} (eager {errors[0]:.0e})')
        if not errors[1] <= 2 * errors[0] + 1e-4:
            raise Mismatch(f'{what} compiled is {errors[1]:.1e} from float64, eager {errors[0]:.1e}')
    return 'from float64: ' + ', '.join(details)


def gradients(
    forward: Forward, attack_forward: AttackForward, x: torch.Tensor, y: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits and weight gradients of the update, and the attack's gradient of the images."""
    model = attack_forward.model.train()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.to(x.dtype), y, reduction='none')

    logits = forward(x)
    grads = torch.autograd.grad(loss(logits).mean(), list(model.parameters()))
    with attack_forward.ready('eval') as attacked:
        images = input_gradient(lambda z: loss(attacked(z)), x)
    return {'logits': logits, 'weights': torch.cat([grad.flatten() for grad in grads]), 'images': images}


def check_resume(recipe: Recipe) -> str:
    """A run that is stopped after its first step and resumed, against an undisturbed one; a CPU gives the same bits."""
    states = []
    for stopped in (False, True):
        settings = {'max_steps': 3, 'experiment': f'{recipe.experiment}-{"stopped" if stopped else "whole"}'}
        run = build(dataclasses.replace(recipe, **settings))
        if stopped:
            run.stop = True
            try:
                fit(run)
            except Stopped:
                run = build(dataclasses.replace(recipe, **settings, resume='auto'))
            if run.step != 1:
                raise Mismatch(f'the resumed run begins at step {run.step}, not 1')
        fit(run)
        states.append(load_checkpoint(run.folder / 'last.pth.tar'))
    worst = 0.0
    for part in ('state_dict', 'state_dict_ema'):
        for key, value in states[0].get(part, {}).items():
            other = states[1][part][key]
            if not torch.equal(value, other):
                worst = max(distance(other, value), worst)  # NaN stays
    if not worst <= (0.0 if recipe.device == 'cpu' else 1e-2):
        raise Mismatch(f'weights differ by {worst:.1e} of their length')
    return 'the same bits' if worst == 0 else f'weights differ by at most {worst:.1e} of their length'


def check_validation(recipe: Recipe) -> str:
    """Clean and PGD accuracy on held-out images."""
    run = build(recipe)
    run.train_step(*run.batches[0], 0)
    started = time.perf_counter()
    found = validate(run, run.held_out)
    seconds = time.perf_counter() - started
    clean, robust = found['val_clean_acc'], found['val_pgd_acc']
    if not 0 <= robust <= clean <= 1:
        raise Mismatch(f'clean accuracy {clean}, PGD accuracy {robust}')
    return f'{len(run.held_out) / seconds:,.0f} images/s, {clean:.0%} clean, {robust:.0%} PGD-{recipe.eval_steps}'


def check_autoattack(recipe: Recipe) -> str:
    """AutoAttack on images whose labels are the network's own, so that each has to be broken."""
    if importlib.util.find_spec('pyautoattack') is None:
        raise Skipped("pyautoattack is not installed; type: pip install 'pyautoattack>=0.2.0'")
    model, n = build(recipe).model.eval(), 16
    data = load_dataset(recipe.dataset, recipe.data_dir, 'train').first(n).to(recipe.device)
    x, threat_model = (
        data.pixels(),
        ThreatModel('Linf', '64/255'),
    )  # in less its labels hardly change
    with attacked(model):
        y = predict(model, x, n)
        result = autoattack(model, x, y, threat_model, search=search_model(model, x, n))
        broken = predict(model, result.x_adv, n) != y
    if not result.clean_correct.all() or not torch.equal(broken, ~result.robust):
        raise Mismatch(f'{int(broken.sum())} images are broken, AutoAttack says {int((~result.robust).sum())}')
    if not threat_model.contains(result.x_adv, x).all():
        raise Mismatch(f'an adversarial image is outside of {threat_model}')
    return f'{int(broken.sum())} of {n} broken, searched on the {"copy" if result.searched else "model"}'


if __name__ == '__main__':
    sys.exit(main())
