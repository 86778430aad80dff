import copy

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn

from timm_robust import replace_activations
from timm_robust.activations.modules import ACTIVATIONS, Activation, PSSiLU, SmoothReLU
from timm_robust.models.replaced import SharedAct

NETS = ['test_resnet', 'test_efficientnet', 'test_vit', 'test_convnext']


def net(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs)


@pytest.fixture
def x():
    return torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', NETS)
def test_every_place_applies_the_activation_and_the_other_weights_stay(name, x):
    model = net(name).eval()
    before = model.state_dict()
    replace_activations(model, 'pssilu')
    places = [module for module in model.modules() if isinstance(module, SharedAct)]
    assert places and not any(isinstance(m, (nn.ReLU, nn.GELU, nn.SiLU)) for m in model.modules())
    after = model.state_dict()
    assert set(after) - set(before) == {'shared_act.alpha', 'shared_act.beta'} and set(before) <= set(after)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    silu = replace_activations(net(name).eval(), 'silu')  # PSSiLU starts as SiLU
    assert torch.allclose(model(x), silu(x), atol=1e-5)
    with torch.no_grad():
        model.shared_act.alpha.fill_(3.0)
    assert not torch.equal(model(x), silu(x))


def test_an_activation_of_ones_own(monkeypatch, x):
    class Mish(Activation):
        @staticmethod
        def call(x, params):
            return nn.functional.mish(x)

    monkeypatch.setitem(ACTIVATIONS, 'mish', Mish)
    swapped = net('act_swapped', model='test_resnet', act='mish').eval()
    expected = net('test_resnet', act_layer=nn.Mish).eval()
    expected.load_state_dict(swapped.state_dict())
    assert torch.allclose(swapped(x), expected(x), atol=1e-5)


def test_a_network_without_parameters_takes_activations_too():
    model = replace_activations(nn.Sequential(nn.ReLU()), 'pssilu', shared=False)
    assert torch.allclose(model(torch.ones(1)), nn.functional.silu(torch.ones(1)))


def test_one_set_of_parameters_or_one_a_place(x):
    shared, own = (replace_activations(net('test_resnet'), 'pssilu', shared) for shared in (True, False))
    assert sum(name.endswith('alpha') for name, _ in shared.named_parameters()) == 1
    places = sum(isinstance(module, PSSiLU) for module in own.modules())
    assert places > 3 and sum(name.endswith('alpha') for name, _ in own.named_parameters()) == places
    own(x).sum().backward()
    assert all(p.grad is not None for name, p in own.named_parameters() if name.endswith('alpha'))
    shared(x).sum().backward()
    assert shared.shared_act.alpha.grad.abs() > 0


def test_copies_and_averages_have_an_activation_of_their_own(x):
    model = replace_activations(net('test_resnet'), 'pssilu').eval()
    twin, ema = copy.deepcopy(model), ModelEmaV3(model, decay=0.5)
    expected = twin(x)
    with torch.no_grad():
        model.shared_act.alpha.fill_(3.0)
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)
    ema.update(model)
    assert ema.module.shared_act.alpha.item() == pytest.approx(2.0)  # once, not once a place


def test_agc_and_state_dicts_treat_it_as_any_parameter(x, tmp_path):
    model = replace_activations(net('test_resnet'), 'pssilu')
    model(x).pow(2).sum().mul(1e6).backward()
    before = model.shared_act.alpha.grad.clone()
    dispatch_clip_grad(list(model.parameters())[:-2], 0.01, mode='agc')
    assert model.shared_act.alpha.grad.abs() < before.abs()  # the last two are the classifier's
    model.double().to('cpu')
    assert model.shared_act.alpha.dtype == torch.float64
    torch.save(model.state_dict(), tmp_path / 'w.pt')
    replace_activations(net('test_resnet'), 'pssilu').double().load_state_dict(torch.load(tmp_path / 'w.pt'))


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('shared', [True, False])
def test_saved_for_the_hub_and_loaded_again(name, shared, x, tmp_path):
    model = replace_activations(net(name), 'pssilu', shared).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PSSiLU):
                module.alpha.fill_(1.7)
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=model._model_args)
    assert len(load_file(tmp_path / 'model.safetensors')) == len(model.state_dict())
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    by_name = timm.create_model('act_swapped', model=name, act='pssilu', shared=shared, num_classes=5)
    by_name.load_state_dict(model.state_dict())
    save_for_hf(by_name.eval(), tmp_path / 'two', safe_serialization=True, model_args=by_name._model_args)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path / "two"}', pretrained=True).eval()(x), model(x))


def test_an_activation_that_stands_in_two_places_is_replaced_in_both():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            act = nn.ReLU()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3), act)

        def forward(self, x):
            return self.body(x)

    for shared in (True, False):
        assert not any(isinstance(m, nn.ReLU) for m in replace_activations(Net(), 'pssilu', shared).modules())


def test_weights_of_the_users_own_win_and_features_take_them(x, tmp_path):
    model = replace_activations(net('test_resnet'), 'pssilu').eval()
    with torch.no_grad():
        model.shared_act.alpha.fill_(2.5)
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=model._model_args)
    own = {'file': str(tmp_path / 'model.safetensors'), 'num_classes': 5}
    settings = {'model': 'test_resnet', 'act': 'pssilu', 'pretrained': True, 'pretrained_cfg_overlay': own}
    assert torch.equal(timm.create_model('act_swapped', **settings).eval()(x), model(x))
    for shared in (True, False):
        model = replace_activations(model, 'pssilu', shared)
        save_for_hf(model, tmp_path / str(shared), safe_serialization=True, model_args=model._model_args)
        found = timm.create_model(f'local-dir:{tmp_path / str(shared)}', pretrained=True, features_only=True).eval()(x)
        expected = model.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected[-len(found) :], strict=True))


@pytest.mark.parametrize('kind', ['list', 'dict'])
@pytest.mark.parametrize('shared', [True, False])
def test_features_as_a_list_and_as_a_dict(kind, shared, x):
    settings = {'model': 'test_resnet', 'act': 'pssilu', 'shared': shared, 'features_only': True}
    found, usual = (timm.create_model('act_swapped', **settings, feature_cls=k).eval() for k in (kind, 'getter'))
    usual.load_state_dict({k if shared else f'model.{k}': v for k, v in found.state_dict().items()}, strict=shared)
    features, expected = found(x), usual(x)
    assert isinstance(features, dict if kind == 'dict' else list)
    features = list(features.values()) if kind == 'dict' else features
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_torch_jit_script_is_refused_and_what_the_refusal_names_works(x, tmp_path):
    model = replace_activations(net('test_resnet').eval(), 'pssilu')
    with pytest.raises(RuntimeError, match=r'cannot read a network whose places share one PSSiLU; what works: torch'):
        torch.jit.script(model)
    expected = model(x)
    torch.jit.save(torch.jit.trace(model, x), tmp_path / 'model.pt')
    assert torch.allclose(torch.jit.load(tmp_path / 'model.pt')(x), expected, atol=1e-5)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-5)
    assert torch.allclose(torch.compile(model, backend='eager')(x), expected, atol=1e-5)
    own = replace_activations(model, 'pssilu', shared=False)
    assert torch.allclose(torch.jit.script(own)(x), expected, atol=1e-5)


def test_forward_mode_and_stacked_weights_reach_the_one_activation(x):
    models = [replace_activations(net('test_resnet').eval(), 'pssilu') for _ in range(2)]
    with torch.no_grad():
        models[1].shared_act.alpha.fill_(3.0)
    stacked = torch.func.stack_module_state(models)
    rows = torch.func.vmap(lambda *state: torch.func.functional_call(models[0], state, (x,)))(*stacked)
    torch.testing.assert_close(rows, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-5)
    model, x, direction = models[1].double(), x.double(), torch.randn_like(x).double()
    by_reverse_mode = torch.autograd.functional.jvp(model, x, direction)[1]
    torch.testing.assert_close(torch.func.jvp(model, (x,), (direction,))[1], by_reverse_mode)


def test_replacing_twice_leaves_the_second(x):
    model = replace_activations(replace_activations(net('test_resnet'), 'pssilu'), 'smoothrelu', shared=False)
    assert not hasattr(model, 'shared_act') and not any(isinstance(module, SharedAct) for module in model.modules())
    assert any(isinstance(module, SmoothReLU) for module in model.modules())
    assert model._model_args['model'] == 'test_resnet' and model._model_args['act'] == 'smoothrelu'


def test_gates_stay():
    model = timm.create_model('test_efficientnet')
    gates = [module for module in model.modules() if type(module).__name__ == 'Sigmoid']
    replace_activations(model, 'pssilu')
    assert gates and all(gate in list(model.modules()) for gate in gates)


def test_the_kernel_of_linear_attention_stays():
    model = timm.create_model('efficientvit_b0')
    replace_activations(model, 'pssilu')
    kinds = {name.rpartition('.')[2]: type(child) for name, child in model.named_modules()}
    assert (kinds['kernel_func'], kinds['act']) == (nn.ReLU, SharedAct)


def test_networks_without_a_place_are_refused():
    for name, what in (('caformer_s18', 'StarReLU in 25 places'), ('dm_nfnet_f0', 'GammaAct in 52 places')):
        with torch.device('meta'), pytest.raises(ValueError, match=what):
            replace_activations(timm.create_model(name), 'pssilu')
    with pytest.raises(ValueError, match='has no activation module to replace: it calls functions instead'):
        replace_activations(nn.Sequential(nn.Linear(1, 1)), 'pssilu')
    with pytest.raises(ValueError, match='takes its activation by name; create resnet18_silu'):
        replace_activations(timm.create_model('resnet18_relu', width=4), 'silu')
    with pytest.raises(ValueError, match='pssilu'):
        replace_activations(net('test_resnet'), 'pssil')


def test_a_root_that_calls_its_modules_in_turn_owns_no_activation():
    with pytest.raises(ValueError, match=r'Sequential calls all its modules in turn.*shared=False'):
        replace_activations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 'pssilu')
