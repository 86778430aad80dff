import copy
import math
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_robust.activations import pssilu as module
from timm_robust.activations.functions import reblu, smooth_relu
from timm_robust.activations.modules import ACTIVATIONS, PSSiLU, get_activation
from timm_robust.activations.pssilu import _PIECE, BETA_MAX, _pssilu_formula, psilu, pssilu

# parameters away from their initial values, where every term of every formula counts
POINTS = {
    'pssilu': [{'alpha': 1.0, 'beta': 0.01}, {'alpha': 1.3, 'beta': -0.2}, {'alpha': -0.7, 'beta': 0.42}],
    'psilu': [{'alpha': 1.0}, {'alpha': -2.5}],
    'psoftplus': [{'alpha': 1.0}, {'alpha': -4.0}],
    'prelu': [{'alpha': 0.0}, {'alpha': 0.3}, {'alpha': -0.2}],
    'pprelu': [{'alpha': 1.0}, {'alpha': 0.6}],
    'pelu': [{'alpha': 1.0}, {'alpha': 0.4}],
    'reblu': [{'alpha': 0.0}, {'alpha': 0.5}, {'alpha': -0.5}],
    'smoothrelu': [{'raw': 20.0}, {'raw': 2.0}],
}
CASES = [(name, point) for name in ACTIVATIONS for point in POINTS.get(name, [{}])]
case_ids = [f'{name}-{"-".join(map(str, point.values()))}' for name, point in CASES]
LEARNABLE = list(POINTS)


PLAIN_KERNELS = (module._forward_kernel, module._backward_kernel, module._sloped_kernel)


def counted(kernels):
    """The kernels forward, backward and sloped, and a list of how often each was called, with flat tensors."""
    calls = [0, 0, 0]

    def count(number, kernel):
        def call(*args):
            assert args[0].dim() == 1 + args[0].is_cuda  # rows on a GPU
            calls[number] += 1
            return kernel(*args)

        return call

    return tuple(count(number, kernel) for number, kernel in enumerate(kernels)), calls


def make(name, point, dtype=None):
    return ACTIVATIONS[name](inplace=True, dtype=dtype, **point)


@pytest.mark.parametrize(('name', 'point'), CASES, ids=case_ids)
def test_gradients_of_first_and_second_order(name, point):
    act = make(name, point, torch.float64)
    x = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)  # even count a side, 0 included
    x = (x + 0.05).detach().requires_grad_()  # but not at a kink

    def f(x, *params):
        return act.call(x, list(params))

    forward_mode = {'check_forward_ad': True, 'check_batched_forward_grad': True}
    assert torch.autograd.gradcheck(f, (x, *act.params()), check_batched_grad=True, **forward_mode)
    assert torch.autograd.gradgradcheck(f, (x, *act.params()), check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize(('name', 'point'), CASES, ids=case_ids)
def test_torch_func_differentiates_in_every_mode_and_order(name, point):
    act = make(name, point, torch.float64)
    values = torch.cat([torch.tensor([-2.3, -0.4, 0.7, 3.1], dtype=torch.float64), *(p.detach() for p in act.params())])

    def f(values):  # of x and the parameters together
        return act.call(values[:4], list(values[4:].split(1)))

    def total(values):
        return f(values).pow(2).sum()

    def gradient(values):  # by the fused passes
        leaf = values.clone().requires_grad_()
        return torch.autograd.grad(total(leaf), leaf)[0]

    h = 1e-6
    steps = h * torch.eye(len(values), dtype=torch.float64)
    jacobian = torch.stack([(f(values + step) - f(values - step)) / (2 * h) for step in steps], 1)
    hessian = torch.stack([(gradient(values + step) - gradient(values - step)) / (2 * h) for step in steps])
    close = {'atol': 1e-7 * max(1.0, hessian.abs().max().item()), 'rtol': 1e-6}
    value, tangent = torch.func.jvp(f, (values,), (torch.ones_like(values),))
    assert torch.equal(value, f(values))
    torch.testing.assert_close(tangent, jacobian.sum(1), **close)
    for derivative in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(derivative(f)(values), jacobian, **close)
        for outer in (torch.func.jacfwd, torch.func.jacrev):
            torch.testing.assert_close(outer(derivative(total))(values), hessian, **close)
    torch.testing.assert_close(torch.func.hessian(total)(values), hessian, **close)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_vmap_over_inputs_parameters_and_both(name):
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    acts = [make(name, point) for point in (POINTS.get(name, [{}]) * 3)[:3]]
    stacked = [torch.stack(tensors).detach() for tensors in zip(*(act.params() for act in acts), strict=True)]
    call = type(acts[0]).call
    results = {
        'x': (torch.func.vmap(call, (0, None))(x, acts[0].params()), [acts[0](row) for row in x]),
        'x, second dimension': (torch.func.vmap(call, (1, None), 1)(x, acts[0].params()), [acts[0](row) for row in x]),
        'both': (torch.func.vmap(call)(x, stacked), [act(row) for act, row in zip(acts, x, strict=True)]),
    }
    if stacked:
        results['parameters'] = torch.func.vmap(call, (None, 0))(x[0], stacked), [act(x[0]) for act in acts]
    for mapped, rows in results.values():
        torch.testing.assert_close(mapped, torch.stack(rows))
    slopes = torch.func.vmap(torch.func.grad(lambda number: call(number, acts[0].params())))(x.flatten())
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(slopes, torch.autograd.grad(acts[0](leaf).sum(), leaf)[0].flatten())


@pytest.mark.parametrize('frozen', [True, False])
def test_derivatives_of_what_compiled_kernels_computed(frozen):
    x = torch.randn(1 << 16).requires_grad_()
    params = [torch.tensor([value], requires_grad=not frozen) for value in (1.3, 0.2)]
    with module.using(PLAIN_KERNELS):
        y = pssilu(x, *params)
        assert type(y.grad_fn).__name__ == ('_SlopedPSSiLUBackward' if frozen else '_FusedPSSiLUBackward')
        tangents = torch.randn(2, 1 << 16)
        rows = [torch.autograd.grad(y, x, tangent, retain_graph=True)[0] for tangent in tangents]
        (batch,) = torch.autograd.grad(y, x, tangents, is_grads_batched=True)
        torch.testing.assert_close(batch, torch.stack(rows))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
            tangent = torch.autograd.forward_ad.unpack_dual(pssilu(dual, *params)).tangent
        torch.testing.assert_close(tangent, rows[0])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('shape', [(3, 5, 7), ()])
@pytest.mark.parametrize('name', ACTIVATIONS)
def test_dtype_shape_and_input_are_kept(name, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    before = x.clone()
    for act in (make(name, {}), make(name, {}, dtype)):  # fp32 parameters under autocast, and a converted network
        y = act(x.requires_grad_())
        assert y.dtype == dtype and y.shape == x.shape
        (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert grad.dtype == dtype and grad.shape == x.shape
        if act.params():
            grads = torch.autograd.grad(y.sum(), act.params())
            assert all(grad.dtype == param.dtype for grad, param in zip(grads, act.params(), strict=True))
    assert torch.equal(x, before), 'inplace=True must not overwrite the input'


@pytest.mark.parametrize(
    ('name', 'reference'),
    [
        ('pssilu', F.silu),
        ('psilu', F.silu),
        ('psoftplus', F.softplus),
        ('prelu', F.relu),
        ('pprelu', F.relu),
        ('pelu', F.elu),
        ('reblu', F.relu),
        ('silu', F.silu),
        ('gelu', F.gelu),
        ('elu', F.elu),
        ('softplus', F.softplus),
        ('relu', F.relu),
        ('softplus10', lambda x: F.softplus(x, beta=10)),
    ],
)
def test_at_its_initial_value_each_is_a_known_function(name, reference):
    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(make(name, {})(x), reference(x), atol=2e-6, rtol=1e-5)


def test_pssilu_is_silu_at_alpha_1_beta_0_and_the_papers_formula_elsewhere():
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(pssilu(x, one, zero), F.silu(x), atol=1e-15, rtol=1e-14)
    torch.testing.assert_close(psilu(x, 3 * one), x * torch.sigmoid(3 * x), atol=1e-15, rtol=1e-14)
    a, b = -1.7, -0.3
    expected = x * (torch.sigmoid(abs(a) * x) - abs(b)) / (1 - abs(b))
    torch.testing.assert_close(pssilu(x, a * one, b * one), expected, atol=1e-13, rtol=1e-13)


def test_beta_stays_below_one_and_alpha_may_be_zero():
    x = torch.linspace(-3, 3, 101)
    for alpha, beta in ((1.0, 1.0), (1.0, 50.0), (0.0, 0.2)):
        act = PSSiLU(alpha=alpha, beta=beta)
        y = act(x)
        y.sum().backward()
        assert y.isfinite().all() and act.alpha.grad.isfinite().all() and act.beta.grad.isfinite().all()
    torch.testing.assert_close(PSSiLU(beta=50.0)(x), PSSiLU(beta=BETA_MAX)(x))


def test_beta_learns_from_its_initial_value():
    act = PSSiLU()
    assert act.beta.item() != 0
    act(torch.randn(100)).sum().backward()
    assert act.beta.grad.item() != 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous', 'sliced'])
@pytest.mark.parametrize('beta', [1e-8, -0.3])
def test_fused_passes_equal_the_formula_beyond_one_piece(layout, dtype, beta):
    check_against_formula(torch.randn(8, 3 * _PIECE // 8 // 64, 8, 8, dtype=dtype), layout, beta)


def check_against_formula(x, layout, beta):
    if layout == 'channels_last':
        x = x.to(memory_format=torch.channels_last)
    elif layout == 'sliced':
        x = x[:, 1:-1]
    grad = torch.randn_like(x)
    results = []
    for f in (pssilu, _pssilu_formula):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        alpha, b = torch.tensor([1.3], requires_grad=True), torch.tensor([beta], requires_grad=True)
        y = f(leaf, alpha, b)
        y.backward(grad)
        results.append((y.detach(), leaf.grad, alpha.grad / x.numel() ** 0.5, b.grad / x.numel() ** 0.5))
    tolerance = {'atol': 1e-5, 'rtol': 1e-5} if x.dtype == torch.float32 else {'atol': 5e-2, 'rtol': 2e-2}
    for ours, formula in zip(*results, strict=True):
        torch.testing.assert_close(ours, formula, **tolerance)


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_compiled_cpu_kernels_equal_the_formula(monkeypatch):
    module.compile_kernels()
    kernels, calls = counted(module._kernels)
    monkeypatch.setattr(module, '_kernels', kernels)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ('channels_last', 'contiguous'):
            check_against_formula(torch.randn(4, 256, 8, 8, dtype=dtype), layout, -0.3)
    assert calls == [4, 4, 0]
    x = torch.randn(1 << 16, dtype=torch.float64, requires_grad=True)
    alpha, beta = torch.tensor([1.3, 0.2], dtype=torch.float64).split(1)
    torch.testing.assert_close(pssilu(x, alpha, beta), _pssilu_formula(x, alpha, beta), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(psilu(x, alpha), x * torch.sigmoid(alpha * x), rtol=1e-14, atol=1e-14)


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
@pytest.mark.parametrize('beta', [None, 0.3])
def test_where_parameters_are_fixed_the_slope_is_made_in_the_forward_pass(monkeypatch, beta):
    kernels, calls = counted(module.compiled_kernels())
    monkeypatch.setattr(module, '_kernels', kernels)
    alpha, beta = torch.tensor([-1.7]), None if beta is None else torch.tensor([beta])

    def f(x):
        return psilu(x, alpha) if beta is None else pssilu(x, alpha, beta)

    def formula(x):
        return _pssilu_formula(x, alpha, torch.zeros(1) if beta is None else beta)

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = torch.randn(4, 256, 8, 8).to(dtype, memory_format=torch.channels_last).requires_grad_()
        exact = x.detach().double().requires_grad_()
        direction = torch.randn(4, 256, 8, 8).to(dtype)
        (ours,) = torch.autograd.grad(f(x), x, direction, create_graph=True)
        (theirs,) = torch.autograd.grad(formula(exact), exact, direction.double(), create_graph=True)
        close = {'rtol': tolerance, 'atol': tolerance, 'check_dtype': False}
        torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(
            *(torch.autograd.grad(*pair, direction)[0].double() for pair in ((ours, x), (theirs, exact))), **close
        )
        (slope,) = torch.autograd.grad(f(x), x, direction)
        assert slope.dtype == dtype and slope.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(slope, theirs, **close)
    assert calls == [0, 0, 4]
    with torch.no_grad():
        f(x)
    assert calls == [1, 0, 4]
    flat = torch.randn(1 << 16)
    torch.testing.assert_close(
        torch.func.grad(lambda v: f(v).sum())(flat), torch.func.grad(lambda v: formula(v).sum())(flat)
    )


COMPILED_FORMULAS = [(name, point) for name, point in CASES if ACTIVATIONS[name].kernels == ('cpu',)]


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
@pytest.mark.parametrize(('name', 'point'), COMPILED_FORMULAS, ids=str)
def test_formulas_compiled_for_a_cpu_equal_the_eager_ones(name, point, monkeypatch):
    calls, compiled = [], module._formula_kernel
    monkeypatch.setattr(module, '_formula_kernel', lambda formula: calls.append(formula) or compiled(formula))
    act = make(name, point)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2)):
        x = torch.randn(4, 256, 8, 8)
        x[0, :7, 0, 0] = torch.tensor([-100.0, -30.0, -1e-6, 0.0, 1e-6, 30.0, 100.0])
        for layout in (torch.channels_last, torch.contiguous_format):
            x = x.detach().to(dtype, memory_format=layout).requires_grad_()
            direction, found = torch.randn_like(x), []
            for kernels in (PLAIN_KERNELS, None):
                with module.using(kernels):
                    y = act(x)
                    with torch.no_grad():
                        torch.testing.assert_close(act(x), y, rtol=tolerance, atol=tolerance)
                assert y.dtype == dtype and y.stride() == x.stride()
                gradients = torch.autograd.grad(y, [x, *act.parameters()], direction)
                found.append((y, gradients[0], *(g / x.numel() ** 0.5 for g in gradients[1:])))
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert len(calls) == 8
    with module.using(PLAIN_KERNELS):  # not for what is small, exact, transformed, read by a compiler, or a graph of fx
        act(x[:, :8]), act(x.double()), torch.func.jvp(act, (x,), (direction,)), torch.fx.symbolic_trace(act)(x)
        torch.compile(act, backend='eager', fullgraph=True)(x)
    assert len(calls) == 8


def test_a_missing_compiler_is_said(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError('no compiler')

    module.compiled_kernels.cache_clear()
    monkeypatch.setattr(torch, 'compile', lambda f, dynamic: refuse)
    with pytest.raises(RuntimeError, match=r'no compiler.*apt-get install g'):
        module.compile_kernels()
    assert module._kernels is None


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about a machine without a GPU')
def test_a_missing_gpu_is_said():
    with pytest.raises(RuntimeError, match="cannot compile for 'cuda'"):
        module.compiled_kernels('cuda')


def test_kernels_in_use_serve_a_gpu_too():
    kernels, calls = counted(PLAIN_KERNELS)
    with FakeTensorMode(), module.using(kernels):
        x = torch.empty(4, 256, 8, 8, device='cuda').to(memory_format=torch.channels_last).requires_grad_()
        alpha, beta = torch.empty(2, device='cuda').split(1)
        for batch in (4, 2):  # too small, it is not worth a kernel
            y = pssilu(x[:batch], alpha, beta)
            assert y.device.type == 'cuda' and y.shape == (batch, 256, 8, 8) and y.stride() == x.stride()
        with torch.no_grad():
            psilu(x, alpha)
        (odd,) = module._flat(torch.empty(1 << 16 | 1, device='cuda'))
        assert odd.dim() == 1  # no rows of 64
    assert calls == [1, 0, 1]


def test_only_the_input_is_kept_for_backward():
    x = torch.randn(1000, requires_grad=True)
    act = PSSiLU()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        act(x)
    assert sorted(t.numel() for t in kept) == [1, 1, 1000]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


@pytest.mark.parametrize('name', ['pssilu', 'psilu'])
def test_frozen_parameters_get_no_gradient(name):
    act = make(name, {}).requires_grad_(False)
    x = torch.randn(50, requires_grad=True)
    act(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in act.parameters())


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_compile_full_graph_and_export(name):
    act = make(name, POINTS.get(name, [{}])[-1])
    x = torch.randn(64, 9)
    torch._dynamo.reset()
    compiled = torch.compile(act, fullgraph=True, backend='aot_eager')
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    eager_grads, compiled_grads = (
        torch.autograd.grad(f(leaf).sum(), [leaf, *act.parameters()])
        for f, leaf in zip((act, compiled), leaves, strict=True)
    )
    for ours, theirs in zip(eager_grads, compiled_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.export.export(act, (x,)).module()(x), act(x))
    assert torch.compile(act, fullgraph=True, backend='aot_eager')(torch.tensor(0.5)).shape == ()


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_traces_and_scripts_are_saved_without_python(name, tmp_path):
    act, x = make(name, POINTS.get(name, [{}])[-1]), torch.linspace(-3, 3, 12).view(3, 4)
    for saved in (torch.jit.trace(act, x), torch.jit.script(act)):
        torch.jit.save(saved, tmp_path / 'act.pt')
        torch.testing.assert_close(torch.jit.load(tmp_path / 'act.pt')(2 * x), act(2 * x))


@pytest.mark.parametrize('dynamo', [False, True])
@pytest.mark.parametrize('name', ACTIVATIONS)
def test_export_to_onnx(name, dynamo, tmp_path):
    pytest.importorskip('onnxscript' if dynamo else 'onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    act, x = make(name, POINTS.get(name, [{}])[-1]), torch.linspace(-60, 60, 12).view(3, 4)
    if name == 'pelu' and not dynamo:
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match='expm1'):  # of torch's older exporter
            torch.onnx.export(act, (x,), tmp_path / 'act.onnx', dynamo=False)
        return
    torch.onnx.export(act, (x,), tmp_path / 'act.onnx', dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'act.onnx')
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), act(x).detach())


@pytest.mark.slow
def test_inductor_fuses_pssilu():
    torch._dynamo.reset()
    act, x = PSSiLU(beta=0.2), torch.randn(1000, requires_grad=True)
    y = torch.compile(act, fullgraph=True)(x)
    y.sum().backward()
    torch.testing.assert_close(y, act(x))


@pytest.mark.parametrize(('name', 'point'), CASES, ids=case_ids)
def test_shape_agrees_with_the_curve(name, point):
    act = make(name, point, torch.float64)
    shape = act.shape()
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)  # step 2e-4
    with torch.no_grad():
        y = act(x)
    assert shape.value_at_zero == pytest.approx(act(torch.zeros(1, dtype=torch.float64)).item(), abs=1e-12)
    if math.isinf(shape.minimum):
        assert y[0] < y[1000] or y[-1] < y[-1000]  # still falling at the border
        assert y.min() < -1
    else:
        assert y.min().item() == pytest.approx(shape.minimum, abs=1e-6)
    h = (x[1] - x[0]).item()
    curvature = ((y[2:] - 2 * y[1:-1] + y[:-2]) / h**2).abs().max().item()
    if math.isinf(shape.max_curvature):
        assert curvature > 100  # a kink: the second difference grows as 1 / h
    else:
        # SmoothReLU's f'' jumps at 0 and falls fast behind it: a second difference sees part of it
        assert curvature == pytest.approx(shape.max_curvature, rel=0.25 if name == 'smoothrelu' else 2e-3)


@pytest.mark.parametrize('name', LEARNABLE)
def test_pickle_and_deepcopy_keep_the_parameters(name):
    act = make(name, POINTS[name][-1])
    for copied in (copy.deepcopy(act), pickle.loads(pickle.dumps(act))):
        assert copied.values() == act.values()


def test_errors():
    with pytest.raises(ValueError, match=r"did you mean 'pssilu'\?.*there are: relu, silu"):
        get_activation('pssilu2')
    with pytest.raises(TypeError, match='PSSiLU has no parameter gamma; it has: alpha, beta'):
        PSSiLU(gamma=1.0)


@pytest.mark.parametrize(('f', 'values'), [(reblu, (0.0, 0.5)), (smooth_relu, (2.0, 20.0))])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_small_values_and_large_ones(f, values, dtype):
    generator = torch.Generator().manual_seed(0)
    small, large = 0.1 * torch.randn(10_000, generator=generator), torch.tensor([300.0, 3e4])
    for value in values:
        for x in (small.to(dtype), large.to(dtype)):
            parameter = torch.tensor([value], requires_grad=True)
            exact = torch.tensor([value], dtype=torch.float64, requires_grad=True)
            ours, theirs = f(x, parameter), f(x.double(), exact)
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-4)
            slopes = [
                torch.autograd.grad(y.double().sum(), p)[0].double() for y, p in ((ours, parameter), (theirs, exact))
            ]
            torch.testing.assert_close(*slopes, rtol=1e-2, atol=1e-2)
            assert f(x, parameter.detach().to(dtype)).isfinite().all()


FORMULAS = {
    'pprelu': lambda x, a: a * x.clamp(min=0),
    'prelu': lambda x, a: torch.where(x > 0, x, a * x),
    'pelu': lambda x, a: torch.where(x > 0, x, a * (x.exp() - 1)),
    'reblu': lambda x, a: torch.where(x > 0, a * ((x**2 + 1).sqrt() - 1) + x, 0),
    'psoftplus': lambda x, a: (1 + (a * x).exp()).log() / a,
    'smoothrelu': lambda x, a: torch.where(x > 0, x - (1 + a**2 * x).log() / a**2, 0),
}


@pytest.mark.parametrize('name', FORMULAS)
def test_a_learned_activation_is_the_papers_formula_away_from_its_start(name):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    [parameter] = ACTIVATIONS[name].initial
    act = ACTIVATIONS[name](dtype=torch.float64, **{parameter: 0.6})
    torch.testing.assert_close(act(x), FORMULAS[name](x, 0.6))


@pytest.mark.parametrize('size', [0.5, 1.5])  # beyond BETA_MAX beta moves nothing
def test_the_gradient_of_beta_is_that_of_the_formula(size):
    x = torch.linspace(-3, 3, 61)
    found = []
    for function in (pssilu, _pssilu_formula):
        alpha, beta = torch.tensor([0.7], requires_grad=True), torch.tensor([size], requires_grad=True)
        found.append(torch.autograd.grad(function(x, alpha, beta).square().sum(), (alpha, beta)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (found[0][1] != 0).item() == (size < BETA_MAX)
