import dataclasses

import pytest
import torch
from tiny_runs import TINY, tiny

from timm_robust.evaluation.measure import evaluate
from timm_robust.training import builder as module
from timm_robust.training import step, validation
from timm_robust.training.builder import build
from timm_robust.training.loop import fit
from timm_robust.training.validation import reestimate_batch_norm, validate


@pytest.mark.parametrize('compiled', [False, True])
def test_batches_have_the_trainings_size_and_fillings_do_not_count(tmp_path, monkeypatch, compiled):
    for place in (module, step):
        monkeypatch.setattr(place, 'compiled', lambda net, *args: net)
    settings = {'model': 'resnet18_relu', 'model_kwargs': {'width': 2}, 'batch_size': 20}
    run = build(tiny(tmp_path, torchcompile=compiled, **settings))
    monkeypatch.setattr(validation, 'pgd', lambda loss_fn, x, threat_model, **settings: 1 - x)
    with torch.no_grad():
        run.model.fc.weight.zero_()
        run.model.fc.bias.copy_(10.0 * (torch.arange(10) == 0))  # it says 0, which is the label of a filling
    share = (run.held_out.labels == 0).double().mean().item()
    assert 0 < share < 0.5
    net = run.attack_forward.folded.net
    sizes, forward = [], net.forward
    monkeypatch.setattr(net, 'forward', lambda x: sizes.append(len(x)) or forward(x))
    assert validate(run, run.held_out) == {'val_clean_acc': share, 'val_pgd_acc': share}
    assert sizes == [20, 20, 20, 20, *([20, 20] if compiled else [10, 10])]
    with torch.no_grad():
        run.model.fc.bias[0] = torch.nan  # what argmax takes for the largest
    assert validate(run, run.held_out) == {'val_clean_acc': 0, 'val_pgd_acc': 0}


def test_validation_agrees_with_evaluation(undisturbed):
    """The engine's quick numbers against the evaluator's: equal clean accuracy, PGD within the start's noise."""
    run = build(tiny(undisturbed[0], resume=str(undisturbed[0] / 'run' / 'last.pth.tar')))
    ours = validate(run, run.held_out)
    theirs, _ = evaluate(run.model, run.held_out, TINY.threat_model, attack='pgd', pgd_steps=2)
    assert ours['val_clean_acc'] == theirs.clean_acc
    assert ours['val_pgd_acc'] == pytest.approx(theirs.pgd_acc, abs=0.1)


def test_averaged_statistics_are_re_estimated(tmp_path):
    """With stale statistics the average sits at chance; re-estimated ones are those of its own activations."""
    run = build(tiny(tmp_path, model_ema_decay=0.99))
    fit(run)
    means = [run.ema.module.bn1.running_mean, run.model.bn1.running_mean]
    conv = torch.nn.functional.conv2d(run.batches[0][0], run.ema.module.conv1.weight, padding=1)
    theirs = conv.mean((0, 2, 3))
    run.forward.net = None  # compiled, it would be compiled anew for the momenta of this
    reestimate_batch_norm(run, run.recipe.ema_bn_batches)
    assert (means[0] - theirs).norm() < 0.2 * theirs.norm()


def test_validation_takes_its_own_steps_and_counts_no_image_that_was_wrong_before(tmp_path, monkeypatch):
    run, seen = build(tiny(tmp_path, eval_steps=7)), []
    monkeypatch.setattr(validation, 'pgd', lambda forward, x, ball, **settings: seen.append(settings) or x.flip(0))
    found = validate(run, run.held_out)
    assert {settings['steps'] for settings in seen} == {7}
    assert seen[0]['step_size'] == pytest.approx(2.5 * 0.1 / 7)
    assert found['val_pgd_acc'] <= found['val_clean_acc']


def test_statistics_are_of_adversarial_images(tmp_path):
    run, far = build(tiny(tmp_path)), []
    descend = run.train_step.loss.descend

    def watched(forward, x, x_adv, y):
        far.append((x_adv - x).abs().max().item())
        return descend(forward, x, x_adv, y)

    run.train_step.loss = dataclasses.replace(run.train_step.loss, descend=watched)
    reestimate_batch_norm(run, 2)
    assert far and min(far) > 0.05
