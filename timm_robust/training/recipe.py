"""The recipe of a training run: every setting with its default, in timm's spelling, as YAML file.

A recipe file holds only what differs from the defaults below. Precedence: default < file < command line.

>>> recipe = Recipe(model='resnet18_pssilu', eps='4/255', steps=2)
>>> str(recipe.threat_model), recipe.loss
('Linf 4/255', 'pgd_at')
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any

import torch
import yaml

from ..attacks import TRAINING_ATTACKS, AttackSchedule
from ..data import DATASETS, is_stream
from ..files import read_yaml, write_text
from ..models import check_model_kwargs
from ..precision import Precision
from ..provenance import RECIPES
from ..threat_model import MAX_CLASSES, NORMS, ThreatModel, check_step_size, parse_eps, resolved_step_size
from .clock import parse_duration
from .losses import LOSSES
from .schedule import MOMENTUM_SWING

_RANGES: dict[str, Callable[[float], bool]] = {
    '>= 1': lambda v: v >= 1,
    '1 to 10000': lambda v: 1 <= v <= 10_000,
    '8 to 4096': lambda v: 8 <= v <= 4096,
    '2 to 100000': lambda v: 2 <= v <= MAX_CLASSES,
    'a number of images, or a share of them between 0 and 1': lambda v: v >= 0 and (v < 1 or v == int(v)),
    '0 to 256': lambda v: 0 <= v <= 256,
    '0 to 2^63 - 1': lambda v: 0 <= v < 2**63,
    '>= 0': lambda v: v >= 0,
    '> 0': lambda v: v > 0,
    '>= 0 and < 1': lambda v: 0 <= v < 1,
    '>= 0 and <= 1': lambda v: 0 <= v <= 1,
    '> 0 and <= 1': lambda v: 0 < v <= 1,
}
_GRADS = ('exact', 'smooth')
RETIRED: dict[str, tuple[Any, ...]] = {
    'val_batch_size': (),
    'compact_state': (),
    'max_rollbacks': (),
    'wandb_project': (),
    'model_ema_warmup': (True,),
    'amp_dtype': ('bfloat16',),
}
"""Settings of earlier versions, each with the values that it keeps for good; () where it means nothing any more."""

KINDS = {
    bool: 'true or false',
    int: 'a whole number',
    float: 'a number',
    str: 'text (in quotes)',
    dict: 'a mapping of names to values',
    list: 'a list of whole numbers',
    NoneType: 'null',
}


def _field(group: str, default: Any, text: str, allowed: str | tuple[str, ...] = '') -> Any:
    """A setting: its default (dict or list: an empty one), its help text, and choices or a key of _RANGES."""
    first = 'default_factory' if default in (dict, list) else 'default'
    return dataclasses.field(**{first: default}, metadata={'group': group, 'help': text, 'allowed': allowed})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of one training run; the text of each field says what it means (`--help` prints them all).

    Raises:
        ValueError: on construction, naming the key, the value and what is allowed.
    """

    model: str = _field('model', 'resnet18_pssilu', 'name in the timm registry')
    model_kwargs: dict[str, Any] = _field('model', dict, 'arguments for the model, as key=value')
    act: str | None = _field('model', None, "put this activation of ours in the model's places; none: the model's own")
    act_shared: bool = _field('model', True, 'one such activation for the whole network, not one a place')
    num_classes: int | None = _field('model', None, 'classes; none: as many as the data has', '2 to 100000')
    pretrained: bool = _field('model', False, 'start from the pretrained weights of the model name')
    initial_checkpoint: str | None = _field(
        'model', None, 'start from these weights: a file, a folder, or a name with its tag'
    )
    img_size: int | None = _field(
        'model', None, 'pixels a side that images are resized to; none: as they are', '8 to 4096'
    )
    progressive_resizing: dict[str, Any] = _field(
        'model', dict, 'train on smaller images first: SIDE=EPOCHS of each stage, such as 16=4 24=8 32=10'
    )
    bn_momentum: float | None = _field(
        'model', None, "weight of a batch in batch norm's running statistics; none: the model's own", '> 0 and <= 1'
    )
    freeze_bn: bool = _field(
        'model', False, "keep batch norm's running statistics as they are, and normalise by them in training too"
    )
    grad_checkpointing: bool = _field('model', False, 'recompute activations in backward: less memory, more time')

    dataset: str = _field(
        'data',
        'cifar10',
        f'{", ".join(DATASETS)}; folder, wds/..., hfds/... stream through timm',
    )
    data_dir: str | None = _field('data', 'data', 'folder that holds the data')
    dataset_download: bool = _field('data', False, 'let torchvision fetch the data into the folder')
    train_split: str = _field('data', 'train', 'split to train on')
    val_split: str | None = _field(
        'data',
        None,
        'split to validate on; none: val_size images of the training split; auto: validation, if the folder has it',
    )
    val_size: int | float = _field(
        'data',
        1000,
        'training images held out to validate and to choose the checkpoint; below 1: the share of them',
        'a number of images, or a share of them between 0 and 1',
    )
    crop_padding: int = _field('data', 4, 'zero pixels around an image before the random crop; 0: no crop', '>= 0')
    hflip: float = _field('data', 0.5, 'probability of a horizontal flip', '>= 0 and <= 1')
    mixup: float = _field('data', 0.0, 'mixup alpha; 0: none', '>= 0')
    cutmix: float = _field('data', 0.0, 'cutmix alpha; 0: none', '>= 0')
    extra_data: str | None = _field('data', None, 'generated images, .npz or .npy, to mix in')
    extra_fraction: float = _field('data', 0.5, 'their share of each batch', '>= 0 and <= 1')
    workers: int = _field('data', 2, 'loader processes of streamed data', '0 to 256')

    loss: str = _field('loss', 'pgd_at', 'what training descends', tuple(LOSSES))
    beta: float = _field('loss', 6.0, 'weight of the robust term of TRADES and MART', '>= 0')
    awp_gamma: float = _field('loss', 0.0, 'size of the adversarial weight perturbation; 0: none', '>= 0')
    awp_start: float = _field('loss', 0.0, 'share of the run after which the weights are perturbed', '>= 0 and <= 1')
    smoothing: float = _field('loss', 0.0, 'label smoothing', '>= 0 and < 1')

    norm: str = _field('attack', 'Linf', 'norm of the threat model', NORMS)
    eps: float | str = _field('attack', '8/255', 'radius of the threat model, pixels in [0, 1]')
    attack: str = _field('attack', 'pgd', 'attack of the training step', tuple(TRAINING_ATTACKS))
    steps: int = _field('attack', 10, 'PGD steps in training', '1 to 10000')
    step_size: float | str | None = _field(
        'attack', None, 'none: 2.5 * eps / steps for pgd, 1.25 * eps for fgsm, eps for n_fgsm'
    )
    late_steps: int | None = _field('attack', None, 'steps from late_start on; none: steps', '1 to 10000')
    late_start: float = _field('attack', 0.5, 'share of the run after which late_steps holds', '>= 0 and <= 1')
    eps_warmup: float = _field('attack', 0.0, 'share of the run in which eps grows from 0', '>= 0 and <= 1')
    random_start: bool = _field('attack', True, 'start the attack at a random point of the ball')
    start_noise: float | None = _field(
        'attack',
        None,
        "start at Gaussian noise of this standard deviation instead, TRADES' own start: 0.001; none: in the ball",
        '> 0',
    )
    attack_bn: str = _field('attack', 'eval', 'mode of batch norm during the attack', ('eval', 'train'))

    attack_grad: str = _field(
        'attack', 'exact', "derivative of ReLU in the attack: its own, or parametric softplus's", _GRADS
    )
    update_grad: str = _field('attack', 'exact', 'the same, in the update of the weights', _GRADS)
    eval_steps: int = _field('validation', 10, 'PGD steps in validation', '1 to 10000')
    eval_step_size: float | str | None = _field('validation', None, 'none: 2.5 * eps / eval_steps')
    val_interval: int = _field('validation', 1, 'epochs between validations', '>= 1')

    epochs: int = _field('optimizer', 100, 'passes over the training images', '>= 1')
    patience: int | None = _field(
        'optimizer', None, 'end the run early after so many validations without a better one; none: never', '>= 1'
    )
    max_steps: int | None = _field('optimizer', None, 'end the schedule after so many steps', '>= 1')
    budget: str | None = _field(
        'optimizer', None, "run the schedule on the clock instead: '25m', '1.5h', '1h30m', '90s'"
    )
    batch_size: int = _field('optimizer', 128, 'images a training step', '>= 1')
    opt_kwargs: dict[str, Any] = _field('optimizer', dict, 'further arguments of the optimizer, as key=value')
    layer_decay: float | None = _field('optimizer', None, 'factor of the rate from layer to layer', '> 0 and <= 1')
    opt: str = _field('optimizer', 'sgd', "name of a timm optimizer; 'sgd' has Nesterov momentum, 'momentum' has not")
    lr: float = _field('optimizer', 0.1, 'peak learning rate', '> 0')
    momentum: float = _field('optimizer', 0.9, 'momentum', '>= 0 and < 1')
    weight_decay: float = _field('optimizer', 5e-4, 'weight decay', '>= 0')
    filter_bias_and_bn: bool = _field('optimizer', True, 'no weight decay on norms, biases, alpha and beta')
    clip_grad: float | None = _field('optimizer', None, 'bound on the gradient; none: no clipping', '> 0')
    clip_mode: str = _field('optimizer', 'norm', 'what clip_grad bounds', ('norm', 'value', 'agc'))

    sched: str = _field(
        'schedule',
        'onecycle',
        "course of the rate; onecycle is linear; onecycle_cosine is torch's, with momentum that swings by 0.05",
        ('onecycle', 'onecycle_cosine', 'cosine', 'multistep', 'constant'),
    )
    warmup_epochs: float = _field('schedule', 0.0, 'epochs of linear warm-up', '>= 0')
    min_lr: float = _field('schedule', 0.0, 'learning rate at the end', '>= 0')
    decay_milestones: list[int] = _field('schedule', list, 'epochs at which multistep lowers the rate')
    decay_rate: float = _field('schedule', 0.1, 'factor at each milestone', '> 0 and <= 1')

    model_ema: bool = _field('averaging', False, 'keep an exponential moving average of the weights')
    model_ema_decay: float = _field('averaging', 0.999, 'decay of the average per step', '>= 0 and < 1')
    ema_bn_batches: int = _field(
        'averaging', 20, 'batches that re-estimate batch norm for the average; 0: none', '>= 0'
    )

    pssilu_reg: float = _field('PSSiLU', 10.0, 'lambda of the penalty lambda * |beta| of the activation', '>= 0')
    pssilu_beta_clip: float | None = _field('PSSiLU', 0.01, 'bound on the norm of the gradient of its beta', '> 0')

    amp: bool = _field('speed', False, 'automatic mixed precision')
    channels_last: bool = _field('speed', True, 'channels-last memory layout')
    fold_bn: bool = _field('speed', True, 'attack a copy with batch norm folded into the convolutions (eval mode)')
    torchcompile: bool = _field(
        'speed',
        False,
        'torch.compile the model; on a CPU, and for several sides, its activation alone, if that has kernels of ours',
    )
    sync_bn: bool = _field('speed', False, 'batch norm over all processes (GPU only)')
    device: str | None = _field('speed', None, "as torch names it; none: 'cuda' where there is one, else 'cpu'")

    seed: int = _field(
        'run',
        42,
        'seed of weights, data order, augmentation, attacks and held-out images (a resumed run keeps those it has)',
        '0 to 2^63 - 1',
    )
    output: str = _field('run', 'output/train', 'folder for the folders of the runs')
    experiment: str | None = _field('run', None, "name of this run's folder; none: <time>-<model>")
    resume: str | None = _field('run', None, "checkpoint to go on from, or 'auto' for the newest in the run's folder")
    allow_changes: bool = _field('run', False, 'resume though settings or images are others than before; it is noted')
    log_interval: int = _field('run', 20, 'steps between log lines', '>= 1')
    save_interval: int | None = _field('run', None, 'steps between checkpoints within an epoch; none: none', '>= 1')
    on_divergence: str = _field(
        'run', 'rollback', 'at NaN, loss spikes, or collapse of PGD accuracy', ('rollback', 'stop')
    )
    tensorboard: bool = _field('run', False, 'write TensorBoard events')
    log_wandb: bool = _field('run', False, 'log to wandb')
    checkpoint_hist: int = _field('run', 2, 'checkpoints to keep beside the best and the last', '>= 1')

    def __post_init__(self) -> None:
        """Bring every value to its type ('3e-4', as YAML reads it, to 0.0003) and refuse what cannot be meant."""
        for name in SETTINGS:
            object.__setattr__(self, name, _read_value(name, getattr(self, name)))
        self.threat_model.check_scale()
        self._check_model()
        self._check_attack()
        self._check_batches()
        self._check_schedule()
        self._check_stages()
        self._check_run()

    def _check_model(self) -> None:
        """Refuse arguments of the model and the optimizer that are settings, and modes that exclude each other."""
        check_model_kwargs(self.model_kwargs)
        if 'num_classes' in self.model_kwargs:
            raise ValueError('num_classes is a setting of its own, none of model_kwargs; type --num-classes N')
        if taken := {'opt', 'lr', 'weight_decay', 'momentum', 'filter_bias_and_bn', 'layer_decay'} & set(
            self.opt_kwargs
        ):
            name = min(taken)
            raise ValueError(
                f'{name} is a setting of its own, none of opt_kwargs; type --{name.replace("_", "-")} VALUE'
            )
        if self.freeze_bn and (self.attack_bn == 'train' or self.progressive_resizing):
            raise ValueError(
                'freeze_bn keeps the statistics of batch norm, attack_bn train and progressive_resizing take others; '
                'give one (--no-freeze-bn)'
            )
        if self.torchcompile and 'smooth' in (self.attack_grad, self.update_grad):
            raise ValueError(
                'smooth gradients change between attack and update, which torchcompile would not see; leave it off'
            )

    def _check_batches(self) -> None:
        """Refuse mixed images where labels cannot be mixed, or pairs cannot be made."""
        if (self.mixup or self.cutmix) and 'mixup' not in LOSSES[self.loss].takes:
            raise ValueError(f'loss {self.loss!r} needs one class an image; use it with mixup 0 and cutmix 0')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f'mixup and cutmix pair the images of a batch: batch_size {self.batch_size} must be even')

    def _check_schedule(self) -> None:
        """Refuse a course of the rate that no run can follow."""
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f'warmup_epochs {self.warmup_epochs:g} is longer than the run of {self.epochs} epochs; allowed: 0 to '
                f'epochs (--warmup-epochs {self.epochs / 10:g})'
            )
        if self.sched == 'onecycle_cosine' and not MOMENTUM_SWING <= self.momentum < 1 - MOMENTUM_SWING:
            raise ValueError(
                f'momentum {self.momentum} cannot swing by {MOMENTUM_SWING} as sched onecycle_cosine has it; allowed: '
                f'{MOMENTUM_SWING} to less than {1 - MOMENTUM_SWING}'
            )
        if self.min_lr > self.lr:
            raise ValueError(f'min_lr {self.min_lr} is larger than lr {self.lr}; allowed: 0 to lr')
        milestones = self.decay_milestones
        if milestones != sorted(set(milestones)) or any(epoch < 1 for epoch in milestones):
            raise ValueError(f'decay_milestones {milestones} must be increasing epochs, such as [75, 90]')
        if self.sched == 'multistep' and not milestones:
            raise ValueError("sched 'multistep' needs decay_milestones, such as [75, 90]")

    def _check_run(self) -> None:
        """Refuse a folder, an end and a device that cannot be."""
        if self.experiment in ('.', '..') or (self.experiment and Path(self.experiment).name != self.experiment):
            raise ValueError(
                f'experiment {self.experiment!r} is no name of a folder; allowed: one without / in it; the folder '
                f'around it is output (--output {self.output})'
            )
        if self.budget is not None:
            parse_duration(self.budget)
            if self.max_steps is not None:
                raise ValueError(
                    f'budget {self.budget!r} and max_steps {self.max_steps} both end the run; give one (--budget none)'
                )
        try:
            torch.device(self.device or 'cpu')
        except RuntimeError:
            raise ValueError(f"device {self.device!r} is unknown; allowed: 'cpu', 'cuda', 'cuda:1', ...") from None

    def _check_attack(self) -> None:
        """Refuse a ball without room in it, and steps and noise that leap over it."""
        eps = self.threat_model.eps
        if not eps:
            raise ValueError(
                f"eps {self.eps!r} leaves the attack no room; allowed: > 0; standard training is loss 'clean', "
                'with the eps of its validation'
            )
        for name in ('step_size', 'eval_step_size'):
            check_step_size(getattr(self, name), eps, name)
        if self.start_noise is not None and self.start_noise > eps:
            raise ValueError(f'start_noise {self.start_noise:g} is larger than eps {self.eps}; allowed: > 0 to eps')
        noisy = [name for name, kind in TRAINING_ATTACKS.items() if 'start_noise' in kind.takes]
        if self.start_noise is not None and not (self.attack in noisy and self.random_start):
            raise ValueError(
                f'start_noise {self.start_noise} is a random start of the attacks {" and ".join(noisy)}; leave it '
                f'out with attack {self.attack!r} and random_start {self.random_start} (--start-noise none)'
            )

    def find_problems(self) -> list[str]:
        """What may be meant, but rarely is; a line of text each."""
        found = self.threat_model.find_problems()
        if self.val_split is not None and self.val_split == self.train_split:
            found.append(
                f'val_split {self.val_split!r} is what it trains on, so validation tells nothing of other images, and '
                'chooses the checkpoint by it; --val-split none holds val_size images out'
            )
        elif 'test' in (self.val_split, self.train_split):
            what = 'trains on' if self.train_split == 'test' else 'chooses the checkpoint by'
            found.append(f'this run {what} the test split; what is measured on it afterwards is too good')
        takes = TRAINING_ATTACKS[self.attack].takes
        if self.loss == 'trades' and not self.random_start and 'random_start' in takes:
            found.append(
                "loss 'trades' is least at the image itself, where its gradient is rounding noise: type --random-start"
            )
        for name in ('steps', 'late_steps', 'step_size', 'random_start'):
            value = getattr(self, name)
            if name.removeprefix('late_') not in takes and value != SETTINGS[name].default and self.loss != 'clean':
                found.append(f'attack {self.attack!r} takes no {name}: {value!r} changes nothing')
        for name, (needed, is_met) in _NEEDS.items():
            value = getattr(self, name)
            if value not in (SETTINGS[name].default, []) and not is_met(self):
                found.append(f'{name} {value} changes nothing without {needed}')
        if self.lr > 10 or self.lr * self.weight_decay >= 1:
            found.append(f'a step of lr {self.lr:g} and weight_decay {self.weight_decay:g} throws the weights about')
        if self.sched == 'multistep' and self.decay_milestones[-1] >= self.epochs:
            found.append(f'decay_milestones {self.decay_milestones} are not all reached in {self.epochs} epochs')
        return found

    def _check_stages(self) -> None:
        """Refuse stages of progressive resizing that are no sides and epochs, or not the whole run."""
        given = self.progressive_resizing
        if not given:
            return
        shape = 'sides of 8 to 4096 that grow, with epochs, such as {16: 4, 24: 8, 32: 10} (flags: 16=4 24=8 32=10)'
        if not all(
            side.isdecimal() and len(side) < 5 and type(epochs) is int and epochs > 0 for side, epochs in given.items()
        ):
            raise ValueError(f'progressive_resizing {given} is not of the right form; allowed: {shape}')
        sides = [int(side) for side in given]
        if sides != sorted(set(sides)) or not 8 <= sides[0] <= sides[-1] <= 4096:
            raise ValueError(f'progressive_resizing has the sides {sides}; allowed: {shape}')
        if sum(given.values()) != self.epochs:
            raise ValueError(
                f'the stages of progressive_resizing have {sum(given.values())} epochs in all, '
                f'epochs is {self.epochs}; make them equal'
            )

    def held_out_of(self, images: int) -> int:
        """How many of the training images are held out."""
        return max(round(self.val_size * images), 1) if 0 < self.val_size < 1 else int(self.val_size)

    @property
    def stages(self) -> list[tuple[int, float]]:
        """Of progressive resizing: the side of each stage, and the share of the run at which it ends."""
        ends = itertools.accumulate(self.progressive_resizing.values())
        return [(int(side), end / self.epochs) for side, end in zip(self.progressive_resizing, ends, strict=True)]

    def side_at(self, progress: float) -> int | None:
        """Side of the training images at this share of the run; None without progressive resizing."""
        stages = self.stages
        if not stages:
            return None
        return next((side for side, end in stages if progress < end), stages[-1][0])

    @property
    def inner_size(self) -> int | None:
        """Side that images are resized to inside the network, where eps is in the data's pixels; None: as they are."""
        return None if self.progressive_resizing else self.img_size

    @property
    def threat_model(self) -> ThreatModel:
        """What the attacker may do, in training and in validation."""
        return ThreatModel(self.norm, self.eps)  # type: ignore[arg-type]  # it reads '8/255' too

    @property
    def turning_points(self) -> list[float]:
        """Shares of the run from which on the training step is another: 0; late steps, weight perturbation, stages."""
        points = {0.0, *(end for _, end in self.stages)}
        if self.late_steps is not None:
            points.add(self.late_start)
        if self.awp_gamma:
            points.add(self.awp_start)
        return sorted(point for point in points if point < 1)

    @property
    def attack_schedule(self) -> AttackSchedule:
        """The training attack over the run."""
        names = ('attack', 'steps', 'random_start', 'start_noise', 'eps_warmup', 'late_steps', 'late_start')
        return AttackSchedule(
            threat_model=self.threat_model,
            step_size=None if self.step_size is None else parse_eps(self.step_size),
            bn=self.attack_bn,
            grad=self.attack_grad,
            **{name: getattr(self, name) for name in names},
        )

    @property
    def precision(self) -> Precision:
        """How the network is called."""
        return Precision(self.amp, self.channels_last)

    @property
    def resolved_eval_step_size(self) -> float:
        """Step size of the PGD of validation, in pixels on [0, 1]."""
        return resolved_step_size(self.eval_step_size, self.threat_model.eps, self.eval_steps, 'eval_step_size')

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file: a YAML mapping of what differs from the defaults; '-' and '_' in keys are the same.

        Raises:
            FileNotFoundError: if there is no such file; it lists those in the folder.
            ValueError: naming the file, the line, and the unknown or doubled key or the wrong value.
        """
        values, lines = read_yaml(path)
        return cls.from_values({} if values is None else values, path, lines)

    @classmethod
    def from_values(cls, values: Any, where: str | Path, lines: Mapping[str, int] = MappingProxyType({})) -> Recipe:
        """The recipe of a mapping of what differs from the defaults; '-' and '_' in keys are the same.

        Args:
            values: name -> value, as a file holds them.
            where: they come from, for messages.
            lines: name -> its line there.

        Raises:
            ValueError: naming the place, and the unknown or doubled key or the wrong value.
        """
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise ValueError(f'{where}: a recipe is a mapping of `key: value` lines, this is a {kind}')
        read: dict[str, Any] = {}
        for key, value in values.items():
            name = str(key).replace('-', '_')
            place = f'{where}:{lines[str(key)]}' if str(key) in lines else str(where)
            if name in RETIRED:
                if RETIRED[name] and value not in RETIRED[name]:
                    raise ValueError(f'{place}: {name} is {RETIRED[name][0]} for good now; drop the line')
                continue
            if name not in SETTINGS:
                near = difflib.get_close_matches(name, SETTINGS, 1)
                hint = f'did you mean {near[0]!r}? ' if near else ''
                raise ValueError(f'{place}: unknown key {key!r}; {hint}timm_robust.training.Recipe lists the keys')
            if name in read:
                raise ValueError(f'{place}: key {key!r} is given twice')
            try:
                read[name] = _read_value(name, value)
            except ValueError as error:
                raise ValueError(f'{place}: {error}') from None
        try:
            return cls(**read)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None

    @classmethod
    def from_checkpoint(cls, state: dict[str, Any]) -> Recipe:
        """The recipe of the run that wrote a checkpoint."""
        return cls(**{name: value for name, value in state['recipe'].items() if name not in RETIRED})

    def public(self) -> dict[str, Any]:
        """The settings that tell of the training, not of the machine; of paths the last part."""
        values = {name: getattr(self, name) for name in SETTINGS if name not in MACHINE}
        return values | {
            name: values[name] and Path(values[name]).name for name in ('extra_data', 'initial_checkpoint')
        }

    def to_yaml(self, path: str | Path) -> None:
        """Write every setting, atomically: never half a file."""
        path, values = Path(path), {name: getattr(self, name) for name in SETTINGS}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


MACHINE = (
    *('data_dir', 'dataset_download', 'workers', 'device', 'output', 'experiment', 'resume', 'allow_changes'),
    *('log_interval', 'save_interval', 'tensorboard', 'log_wandb', 'checkpoint_hist'),
)
"""Settings that tell of the machine, not of the training: they are not published."""
_NEEDS: dict[str, tuple[str, Callable[[Recipe], Any]]] = {
    'act_shared': ('act', lambda recipe: recipe.act),
    'crop_padding': (
        'images in memory: streamed ones have crops of their own',
        lambda recipe: not is_stream(recipe.dataset),
    ),
    'extra_fraction': ('extra_data', lambda recipe: recipe.extra_data),
    'beta': ('loss trades or mart', lambda recipe: 'beta' in LOSSES[recipe.loss].takes),
    'awp_start': ('awp_gamma', lambda recipe: recipe.awp_gamma),
    'late_start': ('late_steps', lambda recipe: recipe.late_steps),
    'patience': ('held-out images (val_size, val_split)', lambda recipe: recipe.val_size or recipe.val_split),
    'clip_mode': ('clip_grad', lambda recipe: recipe.clip_grad),
    'decay_milestones': ('sched multistep', lambda recipe: recipe.sched == 'multistep'),
    'decay_rate': ('sched multistep', lambda recipe: recipe.sched == 'multistep'),
    'model_ema_decay': ('model_ema', lambda recipe: recipe.model_ema),
    'ema_bn_batches': ('model_ema', lambda recipe: recipe.model_ema),
}
"""Setting -> the other that it takes, and whether a recipe has that."""
SETTINGS = {field.name: field for field in dataclasses.fields(Recipe)}
_HINTS = typing.get_type_hints(Recipe)


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that the package brings.

    Raises:
        FileNotFoundError: for a name that is neither, with the nearest ones.
    """
    path = Path(name)
    if path.exists() or path.suffix in ('.yaml', '.yml'):
        return path
    names = [file.stem for file in sorted(RECIPES.glob('*.yaml'))]
    if name in names:
        return RECIPES / f'{name}.yaml'
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    raise FileNotFoundError(f'{name!r} is no file and no recipe of the package; near it are {", ".join(near)}')


def kinds_of(name: str) -> tuple[type, ...]:
    """The types that a setting allows: (float, NoneType) for `float | None`, (list,) for `list[int]`."""
    hint = _HINTS[name]
    origin = typing.get_origin(hint)
    return (origin,) if origin in (dict, list) else typing.get_args(hint) or (hint,)


def _read_value(name: str, value: Any) -> Any:
    """The value brought to the type of the setting, checked against its choices or range."""
    kinds, allowed = kinds_of(name), SETTINGS[name].metadata['allowed']
    try:
        read = _convert(value, kinds)
    except (ValueError, OverflowError):
        listed = ' or '.join(KINDS[kind] for kind in kinds)
        raise ValueError(f'{name} {value!r} is of the wrong kind; allowed: {listed}') from None
    if isinstance(allowed, tuple) and read not in allowed:
        raise ValueError(f'{name} {value!r} is unknown; allowed: {", ".join(allowed)}')
    if isinstance(allowed, str) and allowed and read is not None and not _RANGES[allowed](read):
        raise ValueError(f'{name} {value!r} is out of range; allowed: {allowed}')
    return read


def _convert(value: Any, kinds: tuple[type, ...]) -> Any:
    """The value as one of these types.

    Raises:
        ValueError, OverflowError: if it is none of them.
    """
    if list in kinds and isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
        return list(value)
    if dict in kinds and isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {str(key): item for key, item in value.items()}
    if str in kinds and isinstance(value, os.PathLike):
        return os.fspath(value)
    if float in kinds and type(value) in (int, str) and type(value) not in kinds:
        value = float(value)
    too_large = isinstance(value, float) and not abs(value) < 3e38  # of float32
    if too_large or type(value) not in kinds or isinstance(value, (list, dict)):
        raise ValueError(value)
    return value
