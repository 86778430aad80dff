"""Training, validation and evaluation on fake tensors of a device: none of another device among them, no hidden wait.

Fake tensors know shape, type and device, and hold no values. Tensors of two devices that meet are an error, as on a
GPU; what asks for a value makes the host wait for all that the device was sent, and is noted with the line that asks.
The device is 'lazy': PyTorch differentiates fake tensors of it on any machine, those of 'cuda' on one with a GPU alone.
"""

import dataclasses
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import timm_robust.training.builder
import timm_robust.training.step
from timm_robust.attacks.gradient import pgd
from timm_robust.distributed import World
from timm_robust.evaluation import sanity_checks as honesty
from timm_robust.evaluation.measure import evaluate
from timm_robust.threat_model import ThreatModel
from timm_robust.training.averaging import averaged_weights
from timm_robust.training.batches import make_batches
from timm_robust.training.builder import build, create_optimizer, make_scheduler
from timm_robust.training.log import RunLog
from timm_robust.training.loop import train_epoch
from timm_robust.training.recipe import Recipe
from timm_robust.training.run import TICKS
from timm_robust.training.validation import reestimate_batch_norm, validate

OURS = Path(__file__).resolve().parent.parent
RECIPES = OURS / 'train' / 'recipes'
MAIN = ['wrn28_10_pssilu.trades_cifar10_linf', 'resnet18_pssilu.fast_cifar10_linf', 'resnet18_pssilu.fgsm_cifar10_linf']
DEVICE = torch.device('lazy', 0)
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Notes where the host waits for the device, and answers in the fakes' stead: numbers are 1, masks all true."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(tensor.device == DEVICE for tensor in tensors)
        if op in (aten._local_scalar_dense, aten.equal, aten.nonzero):
            if there:
                self.note(op)
            if op is aten.nonzero:
                return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
            return op is aten.equal or (1.0 if args[0].is_floating_point() else 1)
        if op is aten.index and there:
            args = (args[0], [self.whole(index) for index in args[1]])
        if op.__name__.startswith('_foreach') and len({tensor.device for tensor in tensors}) > 1:
            raise RuntimeError(f'{op} of tensors on several devices')  # fake tensors let it pass
        out = func(*args, **kwargs)
        generator = kwargs.get('generator')
        if generator is not None and (out.device == DEVICE) != (generator._cdata in Generator.made):
            raise RuntimeError(f'{op} on {out.device} with a generator of another device')
        if op in (aten._to_copy, aten.copy_) and True not in (kwargs.get('non_blocking'), *args[2:]):
            source = args[0] if op is aten._to_copy else args[1]
            if source.device != out.device:
                self.note(op)
        return out

    def whole(self, index):
        """All numbers in the place of a mask, whose true ones the host would have to count."""
        if index is None or index.dtype != torch.bool:
            return index
        self.note(aten.nonzero)
        return torch.empty(index.numel(), dtype=torch.int64, device=index.device)

    def note(self, op):
        """Remember the line of ours that led here."""
        frames = [
            frame
            for frame in traceback.extract_stack()
            if 'timm_robust' in frame.filename or '/tests/' in frame.filename
        ]
        frame = [frame for frame in frames if frame.name not in ('note', 'whole', '__torch_dispatch__')][-1]
        self.places.append(f'{Path(frame.filename).name}, {frame.name}: {frame.line} ({op.__name__})')


class Generator(torch.Generator):
    """A generator that says it is on the device; fake tensors draw nothing."""

    device = DEVICE
    made: dict[int, 'Generator'] = {}


def make_generator(device='cpu', real=torch.Generator):
    if torch.device(device).type == 'cpu':
        return real()
    generator = Generator()
    return Generator.made.setdefault(generator._cdata, generator)


@pytest.fixture
def waits(monkeypatch):
    """Under it and FakeTensorMode, .places fills with what waits for the device."""
    monkeypatch.setattr(torch, 'Generator', make_generator)
    monkeypatch.setattr(torch.Tensor, '__format__', lambda tensor, spec: format(tensor.item(), spec))
    return Waits()


def small(name, folder):
    """A recipe of ours on scikit-learn's digits with a tiny network, in fp32 and not compiled; the rest as it is."""
    recipe = Recipe.from_yaml(RECIPES / f'{name}.yaml')
    tiny = {'width': 4, 'depths': (1, 1)} if recipe.model.startswith('resnet') else {'depth': 10, 'widen_factor': 1}
    settings: dict[str, Any] = {'model_kwargs': tiny, 'dataset': 'digits', 'batch_size': 600, 'val_size': 20}
    settings |= {'eval_steps': 1, 'torchcompile': False, 'amp': False, 'device': 'cpu', 'output': str(folder)}
    return dataclasses.replace(recipe, **settings, experiment='run')


def empty_there(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


def to_device(run):
    """The run with fake tensors on the device, under FakeTensorMode."""
    recipe, fakes = run.recipe, {}

    def fake(tensor):
        if id(tensor) not in fakes:
            new = empty_there(tensor)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fakes[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new, tensor
        return fakes[id(tensor)][0]

    nets = [run.model, run.forward.net, run.attack_forward._folded_forward.net] + ([run.ema.module] if run.ema else [])
    for module in (module for net in nets for module in net.modules()):
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    for data in (run.batches.data, run.held_out):
        for field in ('images', 'labels'):
            object.__setattr__(data, field, empty_there(getattr(data, field)))
    run.world = World(DEVICE)
    run.batches = make_batches(recipe, run.batches.data, recipe.seed, run.world)
    for forward in (run.forward, run.attack_forward._folded_forward):
        forward.device = DEVICE
    optimizer = create_optimizer(run.model, recipe)
    run.scheduler = make_scheduler(optimizer, recipe, TICKS)
    run.train_step = dataclasses.replace(run.train_step, optimizer=optimizer)
    return run


@pytest.fixture(params=MAIN)
def run(request, tmp_path):
    return build(small(request.param, tmp_path))


@pytest.fixture
def quick(tmp_path):
    return build(small(MAIN[-1], tmp_path))


def test_a_training_step_waits_for_nothing(run, waits):
    with FakeTensorMode(), waits:
        to_device(run)
        for number, progress in enumerate((0.0, 1.0)):  # the last with AWP and late steps, where there are any
            out = run.train_step(*run.batches[number], number, progress)
        assert out.loss.device == out.correct.device == DEVICE
    assert waits.places == []


def test_an_epoch_waits_for_its_log_alone(quick, waits, tmp_path):
    with FakeTensorMode(), waits, RunLog(tmp_path, config={}, total_steps=2) as log:
        train_epoch(to_device(quick), log)
    assert {place.partition(':')[0] for place in waits.places} == {'loop.py, epoch_row'}


def test_validation_waits_for_its_result_alone(run, waits):
    with FakeTensorMode(), waits:
        to_device(run)
        with averaged_weights(run.model, run.ema):
            reestimate_batch_norm(run, 2)
            assert waits.places == []
            validate(run, run.held_out)
    assert len(waits.places) == 3 and all('clean, pgd_right, n = ' in place for place in waits.places)


@pytest.mark.parametrize('name', [MAIN[0], MAIN[-1]])
def test_evaluation_keeps_to_its_devices(name, tmp_path, waits, monkeypatch):
    run = build(small(name, tmp_path))
    monkeypatch.setattr(type(run.held_out), 'sha256', lambda self: '')
    monkeypatch.setattr(honesty, 'pgd', lambda *args, **settings: pgd(*args, **(settings | {'steps': 1})))
    with FakeTensorMode(), waits:
        data = to_device(run).held_out
        result, tensors = evaluate(run.model, data, ThreatModel('Linf', '8/255'), attack='pgd', pgd_steps=1)
    assert result.clean_acc == 1 / 20 and tensors['x_adv'].device == DEVICE
    assert any('autoattack.py, share' in place for place in waits.places)


@pytest.mark.parametrize(
    'ask', [torch.Tensor.item, bool, torch.Tensor.cpu, torch.nonzero], ids=lambda ask: ask.__name__
)
def test_a_hidden_wait_is_noted(quick, waits, ask):
    descend = quick.train_step.loss.descend

    def asking(*args):
        out = descend(*args)
        ask(out.loss)
        return out

    with FakeTensorMode(), waits:
        to_device(quick).train_step.loss = dataclasses.replace(quick.train_step.loss, descend=asking)
        quick.train_step(*quick.batches[0], 0)
    assert len(waits.places) == 1 and waits.places[0].startswith('test_device.py, asking: ask(out.loss)')


@pytest.mark.parametrize(
    'sent', [lambda x: x + torch.ones(3, 1, 1), lambda x: torch._foreach_add([x], [torch.ones(1)])]
)
def test_a_tensor_of_another_device_is_an_error(quick, waits, sent):
    with FakeTensorMode(), waits:
        x, y = to_device(quick).batches[0]
        with pytest.raises(RuntimeError, match=r'several devices|two (different )?devices'):
            quick.train_step(sent(x), y, 0)


def test_a_generator_of_another_device_is_an_error(waits):
    with FakeTensorMode(), waits:
        x = torch.empty(3, device=DEVICE)
        x.uniform_(generator=torch.Generator(DEVICE))
        with pytest.raises(RuntimeError, match='generator of another device'):
            x.uniform_(generator=torch.Generator())


def test_a_compiled_run_compiles_each_of_its_four_networks_once(tmp_path, monkeypatch):
    graphs = CompileCounter()
    compiled = partial(torch.compile, dynamic=False, backend=graphs)
    monkeypatch.setattr(timm_robust.training.builder, 'compiled', lambda net, device, sides: compiled(net))
    recipe = dataclasses.replace(small(MAIN[1], tmp_path), batch_size=40, val_size=40, torchcompile=True)
    run = build(recipe)
    found = []
    for number, progress in enumerate((0.0, 0.3, 0.7, 1.0)):  # the last two with AWP
        run.train_step(*run.batches[number], number, progress)
        found.append(graphs.frame_count)
    with averaged_weights(run.model, run.ema):
        reestimate_batch_norm(run, 2)
        validate(run, run.held_out)
    run.train_step(*run.batches[4], 4, 1.0)
    # the attack's target and its gradient on the folded network, the update, and AWP's without statistics
    assert [*found, graphs.frame_count] == [3, 3, 4, 4, 4]
