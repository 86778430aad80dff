"""A run: everything that a recipe stands for, built and ready to train; saved as a checkpoint and restored from one.

The clock is the step: data order, augmentation, noise, attack and learning rate all follow from (recipe, step), so a
checkpoint holds weights, optimizer, average, the step and the sums of an unfinished epoch, and a resumed run continues
as if it had never stopped.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, strftime
from typing import IO, Any

import timm
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.nn.parallel import DistributedDataParallel

from .averaging import ModelEma
from .awp import WeightPerturbation
from .checkpoint import (
    BEST,
    LAST,
    class_list,
    later_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_step,
    read_weights,
    save_checkpoint,
    set_aside,
    snapshot,
)
from .clock import Clock, parse_duration
from .data import (
    ExtraImages,
    MixedBatches,
    StreamBatches,
    StreamData,
    TrainBatches,
    fingerprint,
    is_stream,
    load_dataset,
    split_holdout,
)
from .distributed import World
from .files import Writer, link_file, lock_folder
from .folding import FoldedNet
from .losses import make_loss
from .model_config import make_model
from .pixels import pixel_input, resized
from .recipe import Recipe
from .results import environment, git_commit
from .resuming import Changes, check_changes, check_equal, check_processes, find_changes
from .schedule import CosineOneCycle
from .step import AttackForward, Clipping, Forward, TrainStep, compiled

logger = logging.getLogger('timm_robust')

TICKS = 100_000
"""Resolution of a schedule that follows the clock on the wall."""


@dataclass
class Sums:
    """What the present epoch has added up, on the device."""

    first_step: int
    loss: torch.Tensor
    correct: torch.Tensor


@dataclass
class Run:
    """Everything of a run.

    Args:
        recipe: the settings.
        folder: where logs and checkpoints go.
        world: this process among the others.
        model: the network.
        ema: its averaged copy, or None.
        forward: how the network is called.
        attack_forward: how attacks call it.
        train_step: one training step.
        scheduler: sets the learning rate, by step or by tick; None for a constant rate.
        batches: the training stream.
        held_out: validation images, or None.
        total_steps: steps of the whole schedule; with a budget those of the epochs, which the clock overrides.
        clock: how far the run is.
        split_seed: of the held-out images and of the attacks on them: the seed that the run began with.
        step: steps taken.
        sums: of the unfinished epoch, or None.
        best: highest validation metric so far.
        history: one row an epoch, as in summary.csv.
        rollbacks: how often the run went back to an earlier state.
        stop: set by a signal handler; the run saves and ends after the step.
        side: of the training images at the last step, in progressive resizing; None before it, and without.
        writer: writes checkpoints while training goes on.
        saved_rows: rows of history in the newest checkpoint.
        saved_at: when that was, by time.perf_counter.
        origins: for each start or resumption its step, processes, hardware, versions and commit.
        images: what for -> fingerprint of the images.
        changes: for each resumption under other settings or on other images its step, epoch and what changed.
        returns: steps that rollbacks of this session went back to.
        lock: what holds the folder, in the first process.
        point: the checkpoint that the run went on from and its step, until it saves; later ones are set aside then.
        best_before: the checkpoint of the best epoch until then, if model_best.pth.tar is of a later one.
    """

    recipe: Recipe
    folder: Path
    world: World
    model: nn.Module
    ema: ModelEma | None
    forward: Forward
    attack_forward: AttackForward
    train_step: TrainStep
    scheduler: Scheduler | None
    batches: Any
    held_out: Any
    total_steps: int
    clock: Clock
    split_seed: int
    step: int = 0
    sums: Sums | None = None
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: int = 0
    stop: bool = False
    side: int | None = None
    writer: Writer = field(default_factory=Writer)
    saved_rows: int = 0
    saved_at: float = field(default_factory=perf_counter)
    origins: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    returns: set[int] = field(default_factory=set)
    lock: IO[str] | None = None
    point: tuple[Path, int] | None = None
    best_before: Path | None = None


def build(recipe: Recipe) -> Run:
    """Read the data, make the model and what trains it, and restore the checkpoint that the recipe resumes from.

    Raises:
        ValueError, FileNotFoundError: for data, model names, weights or checkpoints that are not there or do not fit.
        BlockingIOError: if another process trains in the folder of the checkpoint.
    """
    started = perf_counter()
    world = World.join(recipe.device)
    check_processes(world, recipe)
    folder = Path(world.agree(str(output_folder(recipe))))
    entered = world.agree(bool(recipe.resume) and not unnamed(recipe) and folder.is_dir())
    lock = take_lock(folder, world) if entered else None
    path, state = find_checkpoint(recipe, folder, world)
    split_seed = choose_split_seed(recipe, path, state)
    if path is not None and state is not None and 'recipe' in state:
        check_changes(path, find_changes(state, recipe, {}), recipe.allow_changes)
    torch.manual_seed(recipe.seed)
    with world.in_turn(recipe.dataset_download):
        classes = class_list(state.get('classes'), state.get('num_classes')) if state else None
        train, held_out = read_data(recipe, world, split_seed, classes)
    images = {'training data': fingerprint(train)}
    if held_out is not None:
        images['validation data'] = fingerprint(held_out)
        if not getattr(held_out, 'iterable', False):  # timm's reader shares out what has no numbers
            held_out = held_out.subset(world.share(torch.arange(len(held_out))))
        held_out = held_out.to(world.device)
    train = train.to(world.device)
    model = create_model(recipe, train.num_classes).to(world.device)
    example = check_fit(model, recipe, train)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.sync_bn and world.size > 1:
        model = convert_sync_batchnorm(model)  # timm's own keeps the activations inside its batch norms
    ema = None
    if recipe.model_ema:
        ema = ModelEma(model, decay=recipe.model_ema_decay)
    optimizer = create_optimizer(model, recipe)
    forward = make_forward(model, recipe, world.device)
    attack_forward = make_attack_forward(model, forward, recipe, example)
    update_forward = None
    if world.size > 1:
        ids = [world.device.index] if world.device.type == 'cuda' else None
        wrapped = DistributedDataParallel(forward.net, device_ids=ids, broadcast_buffers=False)
        update_forward = Forward(wrapped, recipe.precision, world.device)
    mixup = make_mixup(recipe, train.num_classes)
    smoothing = 0.0 if mixup else recipe.smoothing  # which is in mixup's labels then
    batches = make_batches(recipe, train, recipe.seed, world)
    if recipe.extra_data:
        images['generated data'] = fingerprint(batches.extra)
    check_equal(world, images, 'images')
    if path is not None and state is not None and 'recipe' in state:
        check_changes(path, find_changes(state, recipe, images), recipe.allow_changes)
    total = recipe.epochs * batches.steps_per_epoch
    total = min(recipe.max_steps or total, total)
    budget = parse_duration(recipe.budget) if recipe.budget else None
    run = Run(
        recipe=recipe,
        folder=folder,
        world=world,
        model=model,
        ema=ema,
        forward=forward,
        attack_forward=attack_forward,
        train_step=TrainStep(
            model,
            forward,
            attack_forward,
            optimizer,
            make_loss(recipe.loss, beta=recipe.beta, smoothing=smoothing),
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
        ),
        scheduler=make_scheduler(optimizer, recipe, TICKS if budget else total),
        batches=batches,
        held_out=held_out,
        total_steps=total,
        clock=Clock(total, budget),
        split_seed=split_seed,
        images=images,
        lock=lock,
    )
    if path is not None:
        restore(run, path, state)
    run.clock.started = started  # a budget pays for the reading of the data too
    where = {'step': run.step, 'processes': world.size, 'commit': git_commit(Path(__file__).parent)}
    run.origins.append(where | environment(world.device))
    return run


def take_lock(folder: Path, world: World) -> IO[str] | None:
    """Hold the folder of a run for its first process.

    Raises:
        OSError: in every process, if another run holds it, or the disk refuses.
    """
    lock, fault = None, None
    if not world.rank:
        try:
            lock = lock_folder(folder)
        except OSError as error:
            fault = error
    fault = world.agree(fault)
    if fault is not None:
        raise fault
    return lock


def find_checkpoint(recipe: Recipe, folder: Path, world: World) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that the recipe resumes from, and what it holds; None for a new run."""
    if not recipe.resume:
        return None, None
    path: Path | None = Path(recipe.resume)
    if recipe.resume == 'auto':
        path = world.agree(None if unnamed(recipe) else latest_checkpoint(folder))
    if path is None:
        logger.info('nothing to resume in %s: starting afresh', folder)
        return None, None
    return path, load_checkpoint(path)


def choose_split_seed(recipe: Recipe, path: Path | None, state: dict[str, Any] | None) -> int:
    """The seed that draws the held-out images: a resumed run keeps that of its beginning, whatever its own seed.

    Raises:
        ValueError: if the checkpoint's run held other images out: some of the recipe's would have been trained on.
    """
    if state is None or 'recipe' not in state:
        return recipe.seed
    for key in ('val_split',) if recipe.val_split else ('val_split', 'val_size', 'train_split'):
        theirs, ours = state['recipe'][key], getattr(recipe, key)
        if theirs != ours:
            flag = '--' + key.replace('_', '-')
            raise ValueError(
                f'{path} was trained with {flag} {theirs}; resume with that, not with {flag} {ours}: '
                'images that were trained on could be held out, and accuracies before and after would not compare'
            )
    return int(state.get('split_seed', state['recipe']['seed']))  # older checkpoints were drawn by the recipe's


def read_data(recipe: Recipe, world: World, split_seed: int, classes: Sequence[str] | None = None) -> tuple[Any, Any]:
    """Training images, and those held out of them by this seed or of a validation split (None for none), on the CPU.

    The classes of the validation split are those of training by name, and those of training what they were in the run
    that is resumed.
    """
    if is_stream(recipe.dataset):
        size = recipe.img_size or default_size(recipe.model)
        settings: dict[str, Any] = {'img_size': size, 'workers': recipe.workers, 'download': recipe.dataset_download}
        settings['num_classes'] = recipe.num_classes
        train: Any = StreamData(recipe.dataset, recipe.data_dir, recipe.train_split, classes=classes, **settings)
        held_out: Any = None
        if recipe.val_split:
            split = recipe.val_split
            held_out = StreamData(recipe.dataset, recipe.data_dir, split, classes=train.classes, **settings)
        elif recipe.val_size:
            train, held_out = split_holdout(train, recipe.val_size, split_seed)
        return train, held_out
    data = load_dataset(recipe.dataset, recipe.data_dir, recipe.train_split, recipe.dataset_download)
    data = data.with_classes(classes) if classes else data
    rest, held = data, None
    if recipe.val_split:
        held = load_dataset(recipe.dataset, recipe.data_dir, recipe.val_split, recipe.dataset_download)
        held = held.with_classes(data.classes)
    elif recipe.val_size:
        rest, held = split_holdout(data, recipe.val_size, split_seed)
    return rest, held


def default_size(model: str) -> int:
    """Pixels a side of the images that a registered model was made for."""
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return cfg.input_size[-1] if cfg else 224


def make_batches(recipe: Recipe, data: Any, seed: int, world: World) -> Any:
    """This process's part of the stream of training batches; batch_size is each one's, and a batch is all of theirs."""
    size = recipe.batch_size * world.size
    own = slice(world.rank * recipe.batch_size, (world.rank + 1) * recipe.batch_size)
    if isinstance(data, StreamData):
        if recipe.extra_data:
            raise ValueError(f'extra_data goes with data in memory, not with dataset {recipe.dataset!r}')
        if data.iterable:  # timm's reader has given this process images of its own
            return StreamBatches(data, recipe.batch_size, seed, hflip=recipe.hflip)
        return StreamBatches(data, size, seed, own=own, hflip=recipe.hflip)
    settings: dict[str, Any] = {'crop_padding': recipe.crop_padding, 'hflip': recipe.hflip, 'own': own}
    if recipe.extra_data:
        extra = ExtraImages(recipe.extra_data, data.num_classes)
        return MixedBatches(data, extra, recipe.extra_fraction, size, seed, **settings)
    return TrainBatches(data, size, seed, **settings)


def architecture(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """What builds the recipe's network: a name of timm's registry, and arguments."""
    if recipe.act is None:
        return recipe.model, dict(recipe.model_kwargs)
    return 'act_swapped', {'model': recipe.model, 'act': recipe.act, 'shared': recipe.act_shared, **recipe.model_kwargs}


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's network from timm's registry, with its initial weights.

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
    model = make_model(arch, kwargs, pretrained=recipe.pretrained, num_classes=classes)
    if recipe.initial_checkpoint:
        try:
            model.load_state_dict(read_weights(recipe.initial_checkpoint))
        except RuntimeError as error:
            reason = ' '.join(str(error).split())[:300]
            raise ValueError(
                f'the weights in {recipe.initial_checkpoint} do not fit {recipe.model}: {reason}'
            ) from None
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
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError(f'bn_momentum {momentum}: the model has no batch norm; leave it out (--bn-momentum none)')
    for norm in norms:
        norm.momentum = momentum


def image_shape(data: Any) -> tuple[int, int, int]:
    """Channels, height and width of a data set's images, as training batches hold them."""
    if isinstance(data, StreamData):
        size = data.img_size
        return (3, size, size) if isinstance(size, int) else (3, *size)
    channels, height, width = data.images.shape[1:]
    return channels, height, width


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


def make_forward(net: nn.Module, recipe: Recipe, device: torch.device) -> Forward:
    """How the recipe calls a network on pixels."""
    net = pixel_input(net, recipe.inner_size)
    return Forward(compiled(net, device) if recipe.torchcompile else net, recipe.precision, device)


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

    'onecycle_cosine' is torch's one cycle instead, with momentum that goes against the rate.
    A run that max_steps or a budget makes shorter than its epochs goes through the same course faster.
    """
    steps_per_epoch = total_steps / recipe.epochs
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total_steps - 1)
    if recipe.sched == 'onecycle_cosine':
        return CosineOneCycle(optimizer, total_steps, warmup, recipe.min_lr)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched={'onecycle': 'poly'}.get(recipe.sched, recipe.sched),
        num_epochs=total_steps - warmup,
        warmup_epochs=warmup,
        warmup_prefix=True,
        warmup_lr=recipe.min_lr,
        min_lr=recipe.min_lr,
        # timm looks one step ahead
        decay_milestones=[round(m * steps_per_epoch) - warmup + 1 for m in recipe.decay_milestones],
        decay_rate=1.0 if recipe.sched == 'onecycle' else recipe.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def unnamed(recipe: Recipe) -> bool:
    """Whether the run's folder gets its name from the time and is new."""
    return recipe.experiment is None and recipe.resume in (None, 'auto')


def output_folder(recipe: Recipe) -> Path:
    """output/<experiment>; a run that resumes a checkpoint file goes on in that file's folder."""
    if recipe.resume and recipe.resume != 'auto':
        return Path(recipe.resume).parent
    return Path(recipe.output) / (recipe.experiment or f'{strftime("%Y%m%d-%H%M%S")}-{recipe.model}')


def training_batch(run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch number `step`, (x [B, C, H, W] in [0, 1], y [B]), with images of the present stage's side."""
    x, y = run.batches[step]
    return resized(x, run.side), y


def save(run: Run, epoch: int, *, numbered: bool = True, is_best: bool = False) -> None:
    """Write last.pth.tar, and at an epoch's end checkpoint-<epoch>.pth.tar and model_best.pth.tar; drop old ones.

    A thread writes, once for all names; `run.writer.wait()` waits until everything is on the disk.

    Raises:
        OSError: if the save before this one failed.
    """
    sums = None
    if run.sums is not None:
        sums = [run.sums.first_step, run.world.sum(run.sums.loss), run.world.sum(run.sums.correct)]
    run.saved_rows, run.saved_at = len(run.history), perf_counter()
    if run.world.rank:
        return
    run.writer.wait()
    if run.point is not None and run.point[0].parent == run.folder:
        leave_course(run, *run.point)
    state = {
        'version': 1,
        'arch': architecture(run.recipe)[0],
        'model_kwargs': architecture(run.recipe)[1],
        'num_classes': run.model.num_classes,
        'classes': list(run.batches.data.classes),
        'unreadable': sorted(getattr(run.batches.data, 'unreadable', {}).values()),
        'recipe': asdict(run.recipe),
        'split_seed': run.split_seed,
        'epoch': epoch,
        'step': run.step,
        'sums': sums,
        'seconds': run.clock.elapsed(),
        'progress': run.clock.progress(run.step),
        'best': run.best,
        'history': run.history,
        'rollbacks': run.rollbacks,
        'side': run.side,
        'origins': run.origins,
        'images': run.images,
        'changes': run.changes,
        'state_dict': run.model.state_dict(),
        'optimizer': run.train_step.optimizer.state_dict(),
    }
    if run.ema is not None:
        state['state_dict_ema'] = run.ema.module.state_dict()
    names = [LAST, BEST] if is_best else [LAST]
    if numbered:
        names.insert(0, f'checkpoint-{epoch}.pth.tar')
    run.writer.start(partial(_write, run.folder, snapshot(state), names, run.recipe))


def leave_course(run: Run, point: Path, step: int) -> None:
    """Set aside what was saved after the checkpoint that the run went on from."""
    run.point = None
    aside = set_aside(run.folder, step, point if point.is_file() else None, run.best_before)
    if aside is not None:
        logger.warning('what was saved after step %d is of the course that was left; it is in %s now', step, aside)


def _write(folder: Path, state: dict[str, Any], names: list[str], recipe: Recipe) -> None:
    """Write a state under its names, in an order of which every part is sound.

    What is killed between two of them goes on from the newest, which `mend_names` gives the names that it lacks.
    """
    save_checkpoint(folder / names[0], state, names[1:])
    prune_checkpoints(folder, recipe.checkpoint_hist)


def metric_name(recipe: Recipe) -> str:
    """What the best checkpoint is best in: PGD accuracy, or clean accuracy for clean training."""
    return 'val_clean_acc' if recipe.loss == 'clean' else 'val_pgd_acc'


def best_row(recipe: Recipe, history: list[dict[str, Any]], best: float) -> dict[str, Any] | None:
    """The row of the epoch that was saved as the best, with this metric; None if it is of another run."""
    metric, side = metric_name(recipe), recipe.side_at(1.0)
    return next((row for row in history if row.get(metric) == best and row.get('side') == side), None)


def mend_names(path: Path, state: dict[str, Any], recipe: Recipe) -> None:
    """Give a checkpoint the names that a kill kept from it: last.pth.tar, and model_best.pth.tar if it is the best.

    Args:
        path: the checkpoint.
        state: what it holds.
        recipe: says what the best is best in.
    """
    best = best_row(recipe, state['history'], state['best'])
    for name in [LAST, BEST] if best is not None and best['step'] == state['step'] else [LAST]:
        target = path.with_name(name)
        try:
            step = read_step(target)
        except Exception:  # missing, or damaged
            step = -1
        if step < state['step']:
            link_file(path, target)
            logger.warning('%s was missing or older; it is %s now', target, path.name)


def restore(run: Run, path: Path, state: dict[str, Any] | None = None) -> None:
    """Take the run to where a checkpoint was written.

    Args:
        run: the run.
        path: of the file.
        state: what it holds, where it has been read already.

    Raises:
        ValueError: if the checkpoint is of another model, of batches of another size, or behind the schedule's end.
    """
    recipe = run.recipe
    run.writer.wait()
    if state is None:
        state = load_checkpoint(path)
    for key, ours in (('arch', architecture(recipe)[0]), ('num_classes', run.model.num_classes)):
        if state.get(key) != ours:
            raise ValueError(f'{path} holds {key} {state.get(key)!r}, the recipe says {ours!r}; name the right one')
    if 'optimizer' not in state:
        raise ValueError(f'{path} holds weights alone, so nothing to resume; start from it with --initial-checkpoint')
    theirs = state['recipe']['batch_size']
    processes = next((origin['processes'] for origin in reversed(state.get('origins', ()))), run.world.size)
    if theirs * processes != recipe.batch_size * run.world.size:
        raise ValueError(
            f'{path} was trained with --batch-size {theirs} in each of {processes} processes; resume with batches of '
            f'{theirs * processes} in all, not {recipe.batch_size} x {run.world.size}'
        )
    if run.clock.budget is None and state['step'] > run.total_steps:
        raise ValueError(
            f'{path} is at step {state["step"]}, behind the end of this schedule, step {run.total_steps}; '
            'type more --epochs or --max-steps, or begin a new run by another --experiment'
        )
    changes = find_changes(state, recipe, run.images)
    try:
        run.model.load_state_dict(state['state_dict'])
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'{path} holds the weights of another {recipe.model}: {reason}') from None
    restore_optimizer(run, path, state, changes)
    if run.ema is not None:
        run.ema.module.load_state_dict(state.get('state_dict_ema', state['state_dict']))
    run.step, run.best, run.history = state['step'], state['best'], list(state['history'])
    run.saved_rows, run.saved_at = len(run.history), perf_counter()
    if not run.world.rank:
        mend_names(path, state, recipe)
    run.point, run.best_before = (path, run.step), None
    if not (run.folder / BEST).is_file():  # the run was moved without it
        run.best = -1.0
    elif run.folder / BEST in later_checkpoints(run.folder, run.step):  # of a course that is left
        run.best_before = find_best(run)
        run.best = run.best if run.best_before else -1.0
    if 'images' not in state:
        logger.info('%s does not tell its images: they are taken for these', path)
    run.changes = list(state.get('changes', ()))
    if changes:
        run.changes.append({'step': run.step, 'epoch': state['epoch'], 'changes': changes})
    before = list(state.get('origins', ()))
    run.origins = before + [origin for origin in run.origins if origin not in before]
    run.side = state.get('side')
    run.sums = None
    if state['sums'] is not None:
        first, loss, correct = state['sums']  # over all processes, each of which adds the mean loss of its part
        loss = loss if run.world.size == processes else loss * run.world.size / processes
        sums = Sums(first, loss.to(run.world.device), correct.to(run.world.device))
        run.sums = (
            sums if run.world.rank == 0 else Sums(first, torch.zeros_like(sums.loss), torch.zeros_like(sums.correct))
        )
    run.clock.restart(state['seconds'], state.get('progress'))
    change_seed(run, state['rollbacks'])
    steps = run.world.gather({run.world.rank: run.step})
    if len(set(steps.values())) > 1:
        raise ValueError(
            f'{path} is not the same file for every process: they would go on from steps {list(steps.values())}'
        )
    logger.info('resumed %s at step %d of %d', path, run.step, run.total_steps)


def restore_optimizer(run: Run, path: Path, state: dict[str, Any], changes: Changes) -> None:
    """The moments of the checkpoint under the recipe's settings; an optimizer of another kind begins without."""
    optimizer, saved = run.train_step.optimizer, state['optimizer']
    sizes = [[len(group['params']) for group in groups] for groups in (optimizer.param_groups, saved['param_groups'])]
    if 'opt' in changes or sizes[0] != sizes[1]:
        logger.warning('the optimizer is another than in %s: it begins without moments', path)
        return
    ours = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    if changes.keys() & {'lr', 'momentum', 'weight_decay', 'opt_kwargs', 'layer_decay', 'sched'}:
        for group, settings in zip(optimizer.param_groups, ours, strict=True):
            group.update(settings)


def find_best(run: Run) -> Path | None:
    """The numbered checkpoint of the best epoch."""
    row = best_row(run.recipe, run.history, run.best)
    if row is None:
        return None
    later = later_checkpoints(run.folder, row['step'] - 1)
    return next((path for path in later if path.name not in (LAST, BEST) and read_step(path) == row['step']), None)


def change_seed(run: Run, rollbacks: int) -> None:
    """Give data order, augmentation and attacks another seed, one for each rollback; 0 is the recipe's own."""
    if rollbacks != run.rollbacks:
        run.rollbacks = rollbacks
        seed = run.recipe.seed + 1_000_000_007 * rollbacks
        run.train_step.seed = seed
        run.batches = make_batches(run.recipe, run.batches.data, seed, run.world)
