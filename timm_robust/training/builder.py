"""A recipe built: data, network, attack, optimizer, schedule and the run around them."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.models import adapt_input_conv
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.nn.parallel import DistributedDataParallel

from ..attacks import FoldedNet, batch_norms
from ..data import StreamData, fingerprint, is_stream
from ..distributed import World
from ..models import BEST, class_list, load_checkpoint, load_model, make_model, other_function, read_weights
from ..pixels import input_channels, pixel_input
from ..provenance import environment, git_commit
from .averaging import ModelEma
from .awp import WeightPerturbation
from .batches import TRAINING, VALIDATION, held_out_names, image_shape, make_batches, read_data
from .changes import check_changes, check_equal, check_processes, find_changes
from .checkpoints import latest_checkpoint
from .clock import Clock, parse_duration
from .losses import LOSSES
from .recipe import Recipe
from .run import TICKS, Run, architecture, output_folder, take_lock, unnamed
from .schedule import CosineOneCycle
from .state import restore
from .step import AttackForward, Clipping, Forward, TrainStep, compiled

logger = logging.getLogger('timm_robust')


def build(recipe: Recipe) -> Run:
    """Read the data, make the model and what trains it, and restore the checkpoint that the recipe resumes from.

    Raises:
        ValueError, FileNotFoundError: for data, model names, weights or checkpoints that are not there or do not fit.
        BlockingIOError: if another process trains in the folder of the checkpoint.
    """
    started = perf_counter()
    world = World.join(recipe.device)
    check_processes(world, recipe)
    folder = Path(world.broadcast_object(str(output_folder(recipe))))
    elsewhere = recipe.resume not in (None, 'auto') and recipe.experiment not in (None, folder.resolve().name)
    if elsewhere and not world.rank:
        logger.warning(
            'the run goes on in %s, where its checkpoint lies: --experiment %s is not used', folder, recipe.experiment
        )
    entered = world.broadcast_object(bool(recipe.resume) and not unnamed(recipe) and folder.is_dir())
    lock = take_lock(folder, world) if entered else None
    path, state = find_checkpoint(recipe, folder, world)
    split_seed = recipe.seed
    if path is not None:
        split_seed = find_split_seed(recipe, path, state)
        check_changes(path, find_changes(state, recipe, {}), recipe.allow_changes)
    torch.manual_seed(recipe.seed)
    with world.in_turn(recipe.dataset_download or not is_stream(recipe.dataset)):  # which may unpack an archive
        classes = class_list(state.get('classes'), state.get('num_classes'))
        train, held_out = read_data(recipe, split_seed, classes)
    if path is None and held_out is not None and recipe.initial_checkpoint:
        warn_of_leak(recipe)
    images, names = {TRAINING: fingerprint(train)}, held_out_names(recipe, held_out)
    if held_out is not None:
        images[VALIDATION] = fingerprint(held_out)
        if not getattr(held_out, 'iterable', False):  # timm's reader shares out what has no numbers
            held_out = held_out.subset(range(world.rank, len(held_out), world.size))
        held_out = held_out.to(world.device)
    train = train.to(world.device)
    model = create_model(recipe, train.num_classes, fresh=path is None).to(world.device)
    if channels := input_channels(model):
        train, held_out = train.with_channels(channels), held_out and held_out.with_channels(channels)
    example = check_fit(model, recipe, train)
    train_step = make_train_step(model, recipe, example, train.num_classes, world)
    batches = make_batches(recipe, train, recipe.seed, world)
    if recipe.extra_data:
        images['generated data'] = fingerprint(batches.extra)
    check_equal(world, images, 'images')
    if path is not None:
        check_changes(path, find_changes(state, recipe, images), recipe.allow_changes)
    total = recipe.epochs * batches.steps_per_epoch
    total = min(recipe.max_steps or total, total)
    budget = parse_duration(recipe.budget) if recipe.budget else None
    run = Run(
        recipe=recipe,
        folder=folder,
        world=world,
        model=train_step.model,
        ema=train_step.ema,
        forward=train_step.forward,
        attack_forward=train_step.attack_forward,
        train_step=train_step,
        scheduler=make_scheduler(train_step.optimizer, recipe, TICKS if budget else total),
        batches=batches,
        held_out=held_out,
        total_steps=total,
        clock=Clock(total, budget),
        split_seed=split_seed,
        images=images,
        held_out_names=names,
        lock=lock,
    )
    if path is not None:
        restore(run, path, state)
    run.clock.started = started  # a budget pays for the reading of the data too
    where = {'step': run.step, 'processes': world.size, 'commit': git_commit()}
    run.origins.append(where | environment(world.device))
    return run


def find_checkpoint(recipe: Recipe, folder: Path, world: World) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that the recipe resumes from, and what it holds; None and nothing for a new run.

    Raises:
        ValueError: if it holds weights, and no run.
    """
    path = Path(recipe.resume) if recipe.resume else None
    if recipe.resume == 'auto':
        path = world.broadcast_object(None if unnamed(recipe) else latest_checkpoint(folder))
        if path is None:
            logger.info('nothing to resume in %s: starting afresh', folder)
    if path is None:
        return None, {}
    state = load_checkpoint(path)
    if 'recipe' not in state or 'optimizer' not in state:
        raise ValueError(f'{path} holds weights, and no run to resume; start from it with --initial-checkpoint')
    return path, state


def find_split_seed(recipe: Recipe, path: Path, state: dict[str, Any]) -> int:
    """The seed that drew the held-out images of the run that is resumed: it keeps that, whatever its own seed.

    Raises:
        ValueError: if the checkpoint's run held other images out: some of the recipe's would have been trained on.
    """
    for key in ('val_split',) if recipe.val_split not in (None, 'auto') else ('val_split', 'val_size', 'train_split'):
        theirs, ours = state['recipe'][key], getattr(recipe, key)
        if theirs != ours:
            flag = '--' + key.replace('_', '-')
            raise ValueError(
                f'{path} was trained with {flag} {theirs}; resume with that, not with {flag} {ours}: '
                'images that were trained on could be held out, and accuracies before and after would not compare'
            )
    return int(state.get('split_seed', state['recipe']['seed']))  # older checkpoints were drawn by the recipe's


def warn_of_leak(recipe: Recipe) -> None:
    """Tell of initial weights of a run that may have trained on what this one holds out of the same data."""
    path = Path(recipe.initial_checkpoint or '')
    path = path / BEST if path.is_dir() else path
    if not (path.is_file() and path.name.endswith('.pth.tar')):
        return
    state = load_checkpoint(path)
    theirs, data = state.get('recipe'), ('dataset', 'data_dir', 'train_split')
    if not isinstance(theirs, dict) or any(theirs.get(key) != getattr(recipe, key) for key in data):
        return
    split = (theirs.get('val_split'), theirs.get('val_size'), state.get('split_seed', theirs.get('seed')))
    if split != (recipe.val_split, recipe.val_size, recipe.seed):
        logger.warning(
            '%s was trained on images that this run holds out: accuracies on them will be too high; its own were drawn '
            'by --val-split %s --val-size %s --seed %s',
            *(path, *split),
        )


def create_model(recipe: Recipe, num_classes: int, fresh: bool = True) -> nn.Module:
    """The recipe's network from timm's registry, with its initial weights unless a checkpoint brings others.

    Raises:
        ValueError: for a name that is not registered, with the nearest ones, and for weights that do not fit.
    """
    if not timm.is_model(recipe.model):
        near = difflib.get_close_matches(recipe.model, timm.list_models(), n=3)
        raise ValueError(f'model {recipe.model!r} is not registered with timm; nearest: {", ".join(near) or "none"}')
    classes = recipe.num_classes or num_classes
    if classes < max(num_classes, 2):
        raise ValueError(
            f'{classes} classes are too few: the data has {num_classes}, and one class is never wrong; allowed: '
            f'num_classes {max(num_classes, 2)} and more (leave it out for as many as the data has)'
        )
    arch, kwargs = architecture(recipe)
    pretrained = (
        fresh and recipe.pretrained and not recipe.initial_checkpoint
    )  # which would replace what was downloaded
    model = make_model(arch, kwargs, pretrained=pretrained, num_classes=classes)
    if recipe.initial_checkpoint and fresh:
        load_initial(model, recipe.initial_checkpoint)
    if recipe.bn_momentum is not None:
        set_bn_momentum(model, recipe.bn_momentum)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]
    return model


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Give every batch norm of the model this momentum, the weight of the newest batch.

    Raises:
        ValueError: if it has none.
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError(f'bn_momentum {momentum}: the model has no batch norm; leave it out (--bn-momentum none)')
    for norm in norms:
        norm.momentum = momentum


def load_initial(model: nn.Module, where: str) -> None:
    """Load the weights that a run starts from; a classifier of another number of classes stays new.

    Where the weights say what network they are of, and it computes otherwise than the model, a warning says so. A first
    convolution in colour is adapted to other channels as timm does it for pretrained weights: summed for grey.

    Args:
        model: gets the weights.
        where: a file of weights, a folder (of a run, or staged), or a name of timm's registry with its tag, such as
            'resnet18_pssilu.fgsm_cifar10_linf'.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for weights that do not fit, and for a name without weights.
    """
    path = Path(where)
    named = not path.exists() and timm.is_model(where)
    if named and '.' not in where:
        raise ValueError(f'initial_checkpoint {where!r} names a network, not its weights; add the tag, or name a file')
    source = _network(where if named else path) if named or path.exists() else None
    weights = dict(read_weights(where) if source is None else source.state_dict())
    config, own = getattr(model, 'pretrained_cfg', None) or {}, model.state_dict()
    for stem in _names(config.get('first_conv')):
        key = f'{stem}.weight'
        if key in weights and key in own and weights[key].shape[1] == 3 and own[key].shape[1] != 3:
            weights[key] = adapt_input_conv(own[key].shape[1], weights[key])
            logger.info('%s takes other channels: %s is adapted to %d', where, key, own[key].shape[1])
    heads = tuple(f'{head}.' for head in _names(config.get('classifier')))
    new = [key for key in weights.keys() & own.keys() if key.startswith(heads) and weights[key].shape != own[key].shape]
    if new:
        logger.info('%s has another number of classes: %s begin anew', where, ', '.join(sorted(new)))
    try:
        model.load_state_dict(weights | {key: own[key] for key in new})
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'the weights in {where} do not fit {type(model).__name__}: {reason}') from None
    if source is not None and (found := other_function(source, model)):
        logger.warning(
            '%s is of a network that computes otherwise: %s; if that is not meant, make it the same by --model and '
            '--model-kwargs (same_padding=true, "pretrained_cfg_overlay={mean: [...], std: [...]}")',
            where,
            '; '.join(found[:4]) + '; ...' * (len(found) > 4),
        )


def _network(where: str | Path) -> nn.Module | None:
    """The network that a name, a folder or a file of weights tells of; None for a file that holds weights alone."""
    try:
        return load_model(where)
    except (ValueError, FileNotFoundError):
        if not Path(where).is_file():
            raise
        return None


def _names(value: str | Sequence[str] | None) -> Sequence[str]:
    """The layers that an entry of timm's pretrained_cfg names: one, several or none."""
    return [value] if isinstance(value, str) else value or ()


def check_fit(model: nn.Module, recipe: Recipe, data: Any) -> torch.Tensor:
    """Refuse images that the model cannot take, before the first step; returns two images of the right size.

    Raises:
        ValueError: saying which size was given, and what to type.
    """
    channels, _, side = image_shape(data)
    side = recipe.img_size or side
    device = next(model.parameters()).device
    training = model.training
    stages = [stage for stage, _ in recipe.stages]
    if stages and stages[-1] != side:
        raise ValueError(
            f'the last stage of progressive_resizing has {stages[-1]} pixels a side, the images have {side}; '
            f'end with {side}'
        )
    if stages and recipe.img_size and not isinstance(data, StreamData):
        raise ValueError('img_size resizes inside the network, progressive_resizing before it; give one')
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size', (3, '?', '?'))[-1]
    advice = f'add --img-size {size}, or build it for these with --model-kwargs img_size={side}'
    if stages:
        advice = 'progressive_resizing needs a network that takes every side of its stages'
    for pixels in stages or [side]:
        example = torch.rand(2, channels, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            with torch.no_grad():
                pixel_input(model.eval())(example)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise ValueError(
                f'{recipe.model} does not take {channels} x {pixels} x {pixels} images ({reason}); {advice}'
            ) from None
        finally:
            model.train(training)
    return example


def make_train_step(
    model: nn.Module, recipe: Recipe, example: torch.Tensor, num_classes: int, world: World
) -> TrainStep:
    """The training step of a network on the device, and what goes with it: average, optimizer, ways to call it.

    Args:
        model: the network; batch norm may become another kind of layer.
        recipe: the settings.
        example: images [B, C, H, W].
        num_classes: classes of the data.
        world: this process among the others.
    """
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.sync_bn and world.size > 1:
        model = convert_sync_batchnorm(model)  # timm's own keeps the activations inside its batch norms
    ema = ModelEma(model, decay=recipe.model_ema_decay) if recipe.model_ema else None
    optimizer = create_optimizer(model, recipe)
    forward = make_forward(model, recipe, world.device)
    attack_forward = make_attack_forward(model, forward, recipe, example)
    update_forward = None
    if world.size > 1:
        ids = [world.device.index] if world.device.type == 'cuda' else None
        wrapped = DistributedDataParallel(forward.net, device_ids=ids, broadcast_buffers=False)
        update_forward = Forward(wrapped, recipe.precision, world.device)
    mixup = make_mixup(recipe, num_classes)
    smoothing = 0.0 if mixup else recipe.smoothing  # which is in mixup's labels then
    return TrainStep(
        model,
        forward,
        attack_forward,
        optimizer,
        LOSSES[recipe.loss].make(recipe.beta, smoothing),
        recipe.attack_schedule,
        seed=recipe.seed,
        rank=world.rank,
        ema=ema,
        update_forward=update_forward,
        mixup=mixup,
        weight_perturbation=WeightPerturbation(recipe.awp_gamma, recipe.awp_start),
        clipping=Clipping(recipe.clip_grad, recipe.clip_mode, recipe.pssilu_beta_clip),
        pssilu_reg=recipe.pssilu_reg,
        update_grad=recipe.update_grad,
        recomputes=recipe.grad_checkpointing,
        freeze_bn=recipe.freeze_bn,
    )


def make_forward(net: nn.Module, recipe: Recipe, device: torch.device) -> Forward:
    """How the recipe calls a network on pixels."""
    net = pixel_input(net, recipe.inner_size)
    net = compiled(net, device, len(recipe.stages)) if recipe.torchcompile else net
    return Forward(net, recipe.precision, device)


def make_attack_forward(model: nn.Module, forward: Forward, recipe: Recipe, example: torch.Tensor) -> AttackForward:
    """How the recipe's attacks call the network: with batch norm folded in, where there is any to fold."""
    if recipe.fold_bn and recipe.attack_bn == 'eval':
        folded = FoldedNet(model, example, recipe.precision.dtype, recipe.precision.memory_format)
        if folded.pairs:
            return AttackForward(model, forward, folded, make_forward(folded.net, recipe, example.device))
    return AttackForward(model, forward)


def make_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, with the label smoothing in their labels; None where the recipe has neither."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        num_classes=recipe.num_classes or num_classes,
        label_smoothing=recipe.smoothing,
    )


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """A timm optimizer over timm's parameter groups."""
    settings: dict[str, Any] = dict(recipe.opt_kwargs)
    if recipe.layer_decay is not None:
        settings['layer_decay'] = recipe.layer_decay
    own = {key: getattr(recipe, key) for key in ('opt', 'lr', 'weight_decay', 'momentum', 'filter_bias_and_bn')}
    try:
        return create_optimizer_v2(model, **{**settings, **own})
    except Exception as error:
        if not recipe.opt_kwargs:
            raise
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        takes = [key for key in inspect.signature(get_optimizer_class(recipe.opt)).parameters if key not in own]
        raise ValueError(
            f'cannot make optimizer {recipe.opt!r} with opt_kwargs {recipe.opt_kwargs} ({reason}); it takes '
            f'{", ".join(takes[1:])}'
        ) from error


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> Scheduler | None:
    """A timm scheduler over the whole run, set by step; 'onecycle' rises over the warm-up, then falls, both linearly.

    'onecycle_cosine' is torch's one cycle instead, with momentum that goes against the rate. 'constant' is timm's step
    schedule without a decay: timm before 1.0.31 has no constant one, so that neither warm-up nor layer decay held.
    A run that max_steps or a budget makes shorter than its epochs goes through the same course faster.
    """
    steps_per_epoch = total_steps / recipe.epochs
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total_steps - 1)
    if recipe.sched == 'onecycle_cosine':
        return CosineOneCycle(optimizer, total_steps, warmup, recipe.min_lr)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched={'onecycle': 'poly', 'constant': 'step'}.get(recipe.sched, recipe.sched),
        num_epochs=total_steps - warmup,
        warmup_epochs=warmup,
        warmup_prefix=True,
        warmup_lr=recipe.min_lr,
        min_lr=recipe.min_lr,
        # timm looks one step ahead
        decay_milestones=[round(m * steps_per_epoch) - warmup + 1 for m in recipe.decay_milestones],
        decay_rate=1.0 if recipe.sched in ('onecycle', 'constant') else recipe.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler
