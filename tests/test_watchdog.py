import pytest
import torch

from timm_robust.training.watchdog import Diverged, check_epoch, check_loss, check_weights


def row(epoch, pgd, train=0.5, loss=1.0):
    return {'epoch': epoch, 'train_loss': loss, 'train_acc': train, 'val_pgd_acc': pgd}


@pytest.mark.parametrize('loss', [float('nan'), float('inf'), 5.0])
def test_bad_losses(loss):
    with pytest.raises(Diverged, match=r'at step 7'):
        check_loss(loss, [row(0, 0.3, loss=1.2)], 7)


@pytest.mark.parametrize('loss', [0.1, 1.2, 2.1])
def test_ordinary_losses(loss):
    check_loss(loss, [row(0, 0.3, loss=1.2)], 7)
    check_loss(1e3, [], 7)  # nothing to compare the first epoch with
    check_loss(1.5 + loss, [row(0, 0.3, loss=0.05), row(1, 0.3, loss=1.3)], 7)  # grown with eps


def test_collapse_of_pgd_accuracy_while_training_accuracy_rises():
    with pytest.raises(Diverged, match=r'collapsed from 40.0% to 0.0% in epoch 2.*catastrophic overfitting.*n_fgsm'):
        check_epoch(row(2, 0.0, train=0.8), [row(0, 0.3), row(1, 0.4, train=0.6)])


def test_smaller_images_of_an_earlier_stage_are_not_compared():
    small = row(0, 0.6) | {'side': 16}
    check_epoch(row(1, 0.2, train=0.6) | {'side': 32}, [small])
    with pytest.raises(Diverged, match=r'collapsed from 60.0%'):
        check_epoch(row(1, 0.2, train=0.6) | {'side': 16}, [small])


@pytest.mark.parametrize(
    ('now', 'history'),
    [
        (row(1, 0.25, train=0.7), [row(0, 0.4)]),  # noise
        (row(1, 0.0, train=0.3), [row(0, 0.4, train=0.5)]),  # everything got worse: no overfitting
        (row(0, 0.0), []),
        ({'epoch': 1, 'train_acc': 0.9}, [row(0, 0.4)]),  # not validated
    ],
)
def test_no_collapse(now, history):
    check_epoch(now, history)


def test_weights():
    model = torch.nn.BatchNorm1d(3)
    check_weights(model)
    model.running_var[1] = float('inf')
    with pytest.raises(Diverged, match='running_var is not finite'):
        check_weights(model)
