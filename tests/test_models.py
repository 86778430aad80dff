import copy
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import warm
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ModelEmaV3, dispatch_clip_grad

import timm_robust
from timm_robust.activations.modules import ACTIVATIONS
from timm_robust.models.cifar_resnet import checkpoint_filter_fn as resnet_filter
from timm_robust.training.builder import create_optimizer
from timm_robust.training.recipe import Recipe
from timm_robust.weights.releases import RELEASES

SMALL = {'resnet18': {'width': 8}, 'wrn28_10': {'depth': 10, 'widen_factor': 1}}
NETS = [f'{family}_{act}' for family in SMALL for act in ('relu', 'silu', 'pssilu')]


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL[name.rpartition('_')[0]], **kwargs})


@pytest.fixture
def x():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_activation_is_registered_in_every_size():
    for act in ACTIVATIONS:
        for size in ('resnet18', 'wrn28_10', 'wrn34_10', 'wrn70_16'):
            assert timm.is_model(f'{size}_{act}')


@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        ('resnet18_silu', 11.173962),
        ('wrn28_10_silu', 36.479194),
        ('wrn34_10_silu', 46.160474),
        ('wrn70_16_silu', 266.796506),
    ],
)
def test_sizes_and_pssilus_two_parameters(name, millions):
    def count(model):
        return sum(p.numel() for p in model.parameters()), len(model.state_dict())

    silu, pssilu = (timm.create_model(name.replace('_silu', act), device='meta') for act in ('_silu', '_pssilu'))
    assert count(silu)[0] == round(millions * 1e6)
    assert count(pssilu) == (count(silu)[0] + 2, count(silu)[1] + 2)


@pytest.mark.parametrize('name', [f'resnet18_{act}' for act in ACTIVATIONS])
def test_one_activation_a_network_and_no_aliases(name):
    model = small(name)
    storages = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(storages) == len(set(storages))
    scalars = [key for key in model.state_dict() if 'act' in key]
    assert scalars == [f'act.{p}' for p in ACTIVATIONS[name.removeprefix('resnet18_')].initial]
    assert [n for n, _ in model.named_parameters()][-2:] == ['fc.weight', 'fc.bias']  # AGC leaves the last two alone


def test_alpha_and_beta_act_at_every_site(x):
    """Doubling alpha changes the features of the stem and of each stage: none keeps a copy of its own."""
    model = small('resnet18_pssilu').eval()
    before = model.forward_intermediates(x, intermediates_only=True)
    with torch.no_grad():
        model.act.alpha.mul_(2)
        model.act.beta.add_(0.1)
    assert not any(
        torch.equal(a, b) for a, b in zip(before, model.forward_intermediates(x, intermediates_only=True), strict=True)
    )


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_pssilu'])
def test_pssilu_at_its_start_is_the_silu_network(name, x):
    pssilu, silu = small(name).eval(), small(name.replace('pssilu', 'silu')).eval()
    silu.load_state_dict({k: v for k, v in pssilu.state_dict().items() if not k.startswith('act.')})
    torch.testing.assert_close(pssilu(x), silu(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', NETS)
def test_pixels_in_and_no_normalisation(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.mean, cfg.std, cfg.input_size, cfg.num_classes) == ((0.0,) * 3, (1.0,) * 3, (3, 32, 32), 10)


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_pssilu', 'resnet18_psoftplus'])
def test_ema_moves_each_tensor_once(name):
    model = small(name)
    ema = ModelEmaV3(model, decay=0.9)
    with torch.no_grad():
        model.act.alpha.fill_(2.0)
    ema.update(model)
    assert ema.module.act.alpha.item() == pytest.approx(1.1)  # 0.9 * 1 + 0.1 * 2; aliases would give 1.83


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_pssilu'])
def test_save_for_hf_and_local_dir_reload_bit_for_bit(name, x, tmp_path):
    model = small(name).eval()
    with torch.no_grad():
        model.act.beta.fill_(0.125)
    args = SMALL[name.rpartition('_')[0]]  # which timm knows by itself since 1.0.31
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=args)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(model(x), again(x))
    assert set(safetensors.torch.load_file(tmp_path / 'model.safetensors')) == set(model.state_dict())


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_pssilu'])
def test_weights_from_a_file_adapt_classes_and_channels(name, x, tmp_path):
    model = small(name)
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    overlay = {'file': str(path)}
    adapted = small(name, pretrained=True, num_classes=7, in_chans=1, pretrained_cfg_overlay=overlay)
    assert adapted(x[:, :1]).shape == (4, 7)
    torch.testing.assert_close(adapted.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
    last = 'stages.2.0.conv2.weight'
    assert torch.equal(adapted.state_dict()[last], model.state_dict()[last])


@pytest.mark.parametrize('name', NETS)
def test_pickle_and_deepcopy(name, x):
    model = small(name).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('amp', [True, False])
@pytest.mark.parametrize('name', NETS)
def test_input_gradients_leave_the_parameters_alone(name, training, amp, x):
    model = small(name).train(training)
    leaf = x.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        output = model(leaf)
    assert output.dtype == (torch.bfloat16 if amp else torch.float32)
    (grad,) = torch.autograd.grad(output.float().logsumexp(1).sum(), leaf)
    assert grad.dtype == torch.float32 and grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_pssilu'])
def test_checkpointed_blocks_give_the_same_input_gradient(name, x):
    model, grads = small(name).eval(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_optimizer_groups_and_agc(x):
    model = small('resnet18_pssilu')
    decayed, others = (group['params'] for group in reversed(param_groups_weight_decay(model, 5e-4)))
    assert all(p.ndim > 1 for p in decayed)
    assert {id(model.act.alpha), id(model.act.beta)} <= {id(p) for p in others}
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, weight_decay=5e-4, layer_decay=0.9)
    model(x).sum().backward()
    dispatch_clip_grad(model.parameters(), 0.01, mode='agc')
    optimizer.step()
    assert model.act.beta.item() != pytest.approx(1e-8, rel=1e-3)


@pytest.mark.parametrize('filtered', [True, False])
@pytest.mark.parametrize('layer_decay', [None, 0.9])
def test_the_recipe_decides_whether_alpha_and_beta_are_decayed(filtered, layer_decay):
    model = small('resnet18_pssilu')
    recipe = Recipe(weight_decay=5e-4, filter_bias_and_bn=filtered, layer_decay=layer_decay)
    groups = create_optimizer(model, recipe).param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    ours = {decay[id(model.act.alpha)], decay[id(model.act.beta)], decay[id(model.bn1.weight)]}
    assert ours == ({0.0} if filtered else {5e-4}) and decay[id(model.conv1.weight)] == 5e-4
    assert len(decay) == len(list(model.parameters()))


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_pssilu', 'resnet18_smoothrelu'])
def test_export_and_full_graph_compile(name, x):
    model = small(name).eval()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_psilu'])
def test_curvature_of_a_networks_loss(name, x):
    model = small(name, num_classes=3).double().eval()
    x, direction = x[:2].double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y = torch.tensor([0, 2])

    def loss(x):
        return F.cross_entropy(model(x), y)

    def gradient(x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    h = 1e-5
    along = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    curved = (gradient(x + h * direction) - gradient(x - h * direction)) / (2 * h)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (direction,))[1], along, rtol=1e-6, atol=1e-9)
    product = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))[1]
    torch.testing.assert_close(product, curved, rtol=1e-5, atol=1e-8)
    row = x[:1, :, :1, :4]

    def corner(values):
        return loss(torch.cat([torch.cat([values, x[:1, :, :1, 4:]], 3), x[:1, :, 1:]], 2).expand_as(x))

    other = torch.func.jacrev(torch.func.jacrev(corner))(row)
    torch.testing.assert_close(torch.func.hessian(corner)(row), other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_psilu'])
def test_networks_with_stacked_weights_run_in_one_vmap(name, x):
    models = [small(name).eval() for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            for p in model.parameters():
                p.mul_(1 + 0.2 * i)
    stacked = torch.func.stack_module_state(models)

    def call(params, buffers, x):
        return torch.func.functional_call(models[0], (params, buffers), (x,))

    rows = torch.stack([model(x) for model in models])
    torch.testing.assert_close(torch.func.vmap(call, (0, 0, None))(*stacked, x), rows, rtol=1e-4, atol=1e-5)

    def loss(params, buffers):
        return call(params, buffers, x).logsumexp(1).sum()

    grads = torch.func.vmap(torch.func.grad(loss))(*stacked)
    for i, model in enumerate(models):
        model(x).logsumexp(1).sum().backward()
        for key, p in model.named_parameters():
            torch.testing.assert_close(grads[key][i], p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item())


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_psilu'])
def test_a_trace_is_saved_and_the_older_onnx_export_works(name, x, tmp_path):
    model = small(name).eval()
    torch.jit.save(torch.jit.trace(model, x), tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(x[:2]), model(x[:2]))
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['resnet18_pssilu', 'wrn28_10_pssilu', 'resnet18_relu'])
@pytest.mark.parametrize('indices', [None, (1, 2), (-2,)])
def test_features_as_a_list_and_as_a_dict(name, indices, x):
    settings = {'features_only': True, **({} if indices is None else {'out_indices': indices})}
    usual = small(name, **settings).eval()
    as_list, as_dict = (small(name, feature_cls=kind, **settings).eval() for kind in ('list', 'dict'))
    expected, found = usual(x), as_dict(x)
    assert isinstance(found, dict) and list(found) == [str(index) for index in usual.feature_info.out_indices]
    for ours in (as_list(x), list(found.values())):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert as_dict.feature_info.channels() == [feature.shape[1] for feature in expected]
    assert as_dict.state_dict().keys() == usual.state_dict().keys()


def test_common_cifar_resnet_keys():
    model = small('resnet18_relu')
    names = {f'stages.{i}': f'layer{i + 1}' for i in range(4)} | {'downsample': 'shortcut', 'fc.': 'linear.'}
    theirs = {}
    for key, value in model.state_dict().items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        theirs[key] = value
    assert set(theirs) != set(model.state_dict())
    assert set(resnet_filter(theirs, model)) == set(model.state_dict())


def test_bad_arguments():
    with pytest.raises(ValueError, match=r'depth 29 .* 6 n \+ 4'):
        timm.create_model('wrn28_10_relu', depth=29)
    with pytest.raises(ValueError, match="did you mean 'pssilu'"):
        timm.create_model('resnet18_pssilu', act_layer='pssilu2')
    with pytest.raises(TypeError, match='unexpected keyword'):
        timm.create_model('resnet18_pssilu', depth_factor=3)


def test_import_adds_our_names_only():
    code = (
        'import timm, timm.models._registry as r\n'
        'before = (set(timm.list_models()), dict(r._model_pretrained_cfgs), set(r._module_to_models))\n'
        'import timm_robust\n'
        'new = set(timm.list_models()) - before[0]\n'
        'assert before[0] <= set(timm.list_models())\n'
        'assert all(r._model_pretrained_cfgs[k] is v for k, v in before[1].items())\n'
        'print(*sorted(set(r._module_to_models) - before[2]))\n'
        'print(*sorted(new))'
    )
    run = warm.run(['-c', code])
    assert run.returncode == 0, run.stderr
    modules, names = (line.split() for line in run.stdout.splitlines())
    assert modules == ['cifar_resnet', 'imagenet', 'replaced', 'wide_resnet']
    aliases = {f'{r.arch}_{"_".join(r.tag.split("_")[-2:])}' for r in RELEASES.values()}  # RobustBench's names
    cifar = {f'{size}_{act}' for size in ('resnet18', 'wrn28_10', 'wrn34_10', 'wrn70_16') for act in ACTIVATIONS}
    sat = {f'resnet50_{act}' for act in ('silu', 'gelu', 'elu', 'softplus', 'softplus10', 'smoothrelu', 'pssilu')}
    sat |= {f'{size}_silu' for size in ('resnet101', 'resnet152', 'resnext50_32x4d', 'resnext152_32x8d')}
    sat |= {f'efficientnet_{size}_silu' for size in ('b0', 'b1', 'b2', 'b3', 'b4', 'b5', 'b6', 'b7', 'l1')}
    assert set(names) == cifar | sat | aliases | {'act_swapped'}


def test_public_api():
    assert all(hasattr(timm_robust, name) for name in timm_robust.__all__)
