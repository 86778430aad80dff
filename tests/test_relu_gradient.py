import pytest
import timm
import torch
from tiny_runs import tiny
from torch import nn

from timm_robust.attacks.gradient import input_gradient
from timm_robust.attacks.surrogates import cross_entropy
from timm_robust.training.builder import build
from timm_robust.training.recipe import Recipe
from timm_robust.training.relu_gradient import relu_gradient, smooth_backward_relu


def test_forward_is_relu_and_backward_that_of_parametric_softplus():
    x = torch.linspace(-3, 3, 61, dtype=torch.float64).requires_grad_()
    y = smooth_backward_relu(x)
    assert torch.equal(y, torch.relu(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    softplus = torch.nn.functional.softplus(x, beta=10, threshold=1e9)
    assert torch.allclose(grad, torch.autograd.grad(softplus.sum(), x)[0])


@pytest.mark.parametrize('name', ['resnet18_relu', 'test_resnet'])
def test_the_switch_changes_gradients_alone_and_goes_back(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **({'width': 4} if name == 'resnet18_relu' else {})).eval()
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])

    def measured():
        return model(x).detach(), input_gradient(lambda x: cross_entropy(model(x), y), x)

    output, exact = measured()
    with relu_gradient(model, 'smooth'):
        within, smooth = measured()
    again, after = measured()
    assert torch.equal(output, within) and torch.equal(output, again) and torch.equal(exact, after)
    assert not torch.allclose(exact, smooth, rtol=1e-2)
    with relu_gradient(model, 'exact'):
        assert torch.equal(measured()[1], exact)


def test_what_cannot_be_meant_is_refused():
    with (
        pytest.raises(ValueError, match='has no ReLU; the smooth gradient is'),
        relu_gradient(nn.Linear(1, 1), 'smooth'),
    ):
        pass
    with pytest.raises(ValueError, match='which torchcompile would not see; leave it off'):
        Recipe(attack_grad='smooth', torchcompile=True)


@pytest.mark.parametrize('fold', [True, False])
def test_attack_and_update_switch_separately(tmp_path, fold):
    """The attack's images follow attack_grad alone; the update's gradients, at equal images, update_grad alone."""
    attacked, gradients = {}, {}
    for attack_grad in ('exact', 'smooth'):
        for update_grad in ('exact', 'smooth'):
            settings = {'attack_grad': attack_grad, 'update_grad': update_grad, 'fold_bn': fold}
            settings |= {'model': 'resnet18_relu', 'attack': 'fgsm', 'random_start': False, 'batch_size': 8}
            run = build(tiny(tmp_path, **settings))
            x, y = run.batches[0]
            run.model.train()
            attacked[attack_grad, update_grad] = run.train_step.perturb(x, y, 0.0)
            run.train_step.perturb = lambda x, y, progress: x  # equal images
            run.train_step(x, y, 0)
            gradients[attack_grad, update_grad] = run.model.conv1.weight.grad.clone()
    exact, smooth = 'exact', 'smooth'
    assert torch.equal(attacked[exact, exact], attacked[exact, smooth])
    assert torch.equal(attacked[smooth, exact], attacked[smooth, smooth])
    assert not torch.equal(attacked[exact, exact], attacked[smooth, exact])
    assert torch.equal(gradients[exact, exact], gradients[smooth, exact])
    assert torch.equal(gradients[exact, smooth], gradients[smooth, smooth])
    assert not torch.allclose(gradients[exact, exact], gradients[exact, smooth])
