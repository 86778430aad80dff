import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from timm_robust.activations.modules import PSSiLU, SmoothReLU
from timm_robust.models.replaced import SharedAct

SITES = 49  # activations of a ResNet-50: one behind the stem, three in each of 16 blocks


@pytest.mark.parametrize('act', ['silu', 'gelu', 'elu', 'softplus', 'softplus10', 'smoothrelu', 'pssilu'])
def test_resnet50_differs_from_timms_by_the_activations_parameters(act):
    model = timm.create_model(f'resnet50_{act}', device='meta')
    plain = timm.create_model('resnet50', device='meta')
    extra = {'smoothrelu': SITES, 'pssilu': 2}.get(act, 0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + extra
    assert not any(type(module) is nn.ReLU for module in model.modules())
    own = {key for key in model.state_dict() if key.startswith('shared_act.') or key.endswith('.raw')}
    assert set(plain.state_dict()) == set(model.state_dict()) - own


@pytest.mark.parametrize(
    'name', ['resnet101', 'resnet152', 'resnext50_32x4d', *(f'efficientnet_b{i}' for i in range(8))]
)
def test_larger_networks_have_timms_weights(name):
    ours, timms = (timm.create_model(full, device='meta').state_dict() for full in (f'{name}_silu', name))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in timms.items()}


def test_resnext152_has_32_groups_of_8_channels():
    model = timm.create_model('resnext152_32x8d_silu', device='meta')
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [3, 8, 36, 3]
    assert model.layer1[0].conv2.groups == 32 and model.layer1[0].conv2.out_channels == 256


def test_efficientnet_l1_is_3_9_wide_and_3_7_deep():
    model = timm.create_model('efficientnet_l1_silu', device='meta')
    depths = [len(stage) for stage in model.blocks]
    assert depths == [-(-d * 37 // 10) for d in (1, 2, 2, 3, 3, 4, 1)]
    widths = [stage[-1].conv_pwl.out_channels if hasattr(stage[-1], 'conv_pwl') else stage[-1].conv_pw.out_channels
              for stage in model.blocks]  # fmt: skip
    assert widths == [round(c * 3.9 / 8) * 8 for c in (16, 24, 40, 80, 112, 192, 320)]
    assert model.drop_rate == 0.5 and timm.get_pretrained_cfg('efficientnet_l1_silu').input_size == (3, 600, 600)


def test_smoothrelu_has_one_alpha_a_place_that_does_not_decay():
    model = timm.create_model('resnet50_smoothrelu', device='meta')
    raws = [name for name, _ in model.named_parameters() if name.endswith('.raw')]
    assert len(raws) == SITES == sum(isinstance(module, SmoothReLU) for module in model.modules())
    for group in param_groups_weight_decay(model, 1e-4):
        if group['weight_decay']:
            assert all(p.ndim > 1 for p in group['params'])


def test_a_forward_pass_of_each_kind_and_features():
    x = torch.rand(1, 3, 64, 64)
    for act in ('silu', 'smoothrelu', 'pssilu'):
        model = timm.create_model(f'resnet50_{act}', num_classes=7).eval()
        with torch.no_grad():
            assert model(x).shape == (1, 7)
    assert isinstance(model.shared_act, PSSiLU) and sum(isinstance(m, SharedAct) for m in model.modules()) == SITES
    features = timm.create_model('resnet50_pssilu', features_only=True).eval()
    with torch.no_grad():
        assert [tuple(f.shape[1:]) for f in features(x)] == [
            (64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)
        ]  # fmt: skip
    assert any(name.endswith('shared_act.alpha') for name, _ in features.named_parameters())
    usual = features(x)
    for kind in ('list', 'dict'):
        other = timm.create_model('resnet50_pssilu', features_only=True, feature_cls=kind).eval()
        other.load_state_dict(features.state_dict())
        found = other(x)
        assert isinstance(found, dict) == (kind == 'dict')
        found = list(found.values()) if kind == 'dict' else found
        assert all(torch.equal(a, b) for a, b in zip(found, usual, strict=True))
    with pytest.raises(ValueError, match=r"feature_cls='fx' cannot see .*allowed: 'getter', 'list', 'dict', 'hook'"):
        timm.create_model('resnet50_pssilu', features_only=True, feature_cls='fx')
    b0 = timm.create_model('efficientnet_b0_silu', num_classes=7).eval()
    with torch.no_grad():
        assert b0(x).shape == (1, 7)


def test_names_of_timm_are_left_alone():
    from timm.models import resnet

    assert timm.models.model_entrypoint('resnet50') is resnet.resnet50
    assert timm.models.model_entrypoint('resnet50_silu').__module__ == 'timm_robust.models.imagenet'


@pytest.mark.parametrize('act', ['pssilu', 'smoothrelu'])
def test_a_learned_activation_comes_back_from_a_folder(act, tmp_path):
    model = timm.create_model(f'resnet50_{act}', num_classes=7, layers=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(('alpha', 'raw'))).fill_(1.5)
    timm.models.save_for_hf(model, tmp_path, model_args={'layers': (1, 1, 1, 1)})
    again, x = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(), torch.rand(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for resnet50_{act}'):
        timm.create_model(f'resnet50_{act}', pretrained=True)
