import itertools

import pytest
import torch
from tiny_runs import end_behind_epoch, tap_batches, tap_steps, tiny, weights

from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.training import loop as engine
from timm_robust.training import rollback
from timm_robust.training.builder import build
from timm_robust.training.loop import Stopped, fit
from timm_robust.training.watchdog import Diverged, check_epoch


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = build(tiny(tmp_path, on_divergence='stop'))
    with torch.no_grad():
        run.model.fc.bias.fill_(float('nan'))
    with pytest.raises(Diverged, match=r'the loss is nan at step 2.*stops.*--lr.*--seed'):
        fit(run)
    assert not (tmp_path / 'run' / 'model_best.pth.tar').exists()


@pytest.mark.slow
def test_nan_rolls_back_with_another_seed_and_the_run_ends_well(tmp_path):
    run, poisoned = build(tiny(tmp_path)), []

    def poison(batches, number):
        x, y = batches[number]
        if number == 4 and not poisoned:
            poisoned.append(number)
            x = x * float('nan')
        return x, y

    tap_batches(run, poison)
    line = fit(run)
    assert line['rollbacks'] == 1 and line['steps'] == 7
    assert all(value.isfinite().all() for value in weights(tmp_path).values() if value.is_floating_point())
    assert [row['epoch'] for row in run.history] == [0, 1, 2]
    state = load_checkpoint(tmp_path / 'run' / 'last.pth.tar')
    assert state['rollbacks'] == 1 and len(state['origins']) == 1 and state['origins'][0]['versions']['torch']


@pytest.mark.parametrize('stopped', [False, True])
def test_spoiled_weights_are_never_saved_inside_an_epoch(tmp_path, stopped):
    settings = {'batch_size': 20, 'max_steps': 12, 'log_interval': 20, 'save_interval': 3}
    run = build(tiny(tmp_path, **settings))
    spoiled = []

    def spoil(take, x, y, number, progress):
        out = take(x, y, number, progress)
        if number == 5 and not spoiled:
            spoiled.append(number)
            run.stop = stopped
            with torch.no_grad():
                run.model.fc.weight.fill_(float('nan'))
        return out

    tap_steps(run, spoil)
    if stopped:
        with pytest.raises(Stopped):
            fit(run)
    else:
        assert fit(run)['steps'] == 12
    assert run.rollbacks == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values() if value.is_floating_point())


def learning(row, history):
    """The check of an epoch that got better at its own attack."""
    check_epoch({**row, 'train_acc': 1.0}, history)


@pytest.mark.slow
def test_a_collapse_found_when_there_is_no_time_left_ends_the_run(tmp_path, monkeypatch, caplog):
    run = build(tiny(tmp_path, max_steps=None, epochs=80, val_interval=4, budget='1h'))
    found = [0.8, 0.01]
    end_behind_epoch(run, 5, monkeypatch)
    monkeypatch.setattr(engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': found.pop(0)})
    monkeypatch.setattr(engine, 'check_epoch', learning)
    line = fit(run)
    assert line['epoch'] == 3 and line['rollbacks'] == 0 and not found
    assert 'collapsed' in caplog.text and 'the best checkpoint stands' in caplog.text


def test_what_diverged_is_not_gone_back_to(tmp_path, monkeypatch):
    run = build(tiny(tmp_path, max_steps=None, epochs=80, budget='1h', save_interval=2))
    over, found = [False], {3: 0.8}
    monkeypatch.setattr(
        engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': found.get(run.step, 0.01)}
    )

    def progress(step):
        over[0] = over[0] or step >= 5  # inside the second epoch, after a save inside it
        return 1.0 if over[0] else 0.5

    run.clock.progress = progress
    line = fit(run)
    assert line['epoch'] == 0 and line['steps'] == 3 and line['rollbacks'] <= 2


@pytest.mark.slow
def test_a_collapse_goes_back_behind_the_epoch_that_it_was_seen_in(tmp_path, monkeypatch):
    """Though there is a state inside that epoch: it may have collapsed already."""
    begun, found = [], iter([0.8, 0.8, 0.01, 0.8, 0.8])
    monkeypatch.setattr(engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': next(found)})
    real = rollback.restore
    monkeypatch.setattr(rollback, 'restore', lambda run, path: real(run, path) or begun.append(run.step))
    run = build(tiny(tmp_path, batch_size=50, epochs=4, max_steps=None, save_interval=4))
    monkeypatch.setattr(engine, 'check_epoch', learning)
    per_epoch = run.batches.steps_per_epoch
    assert per_epoch == 6  # saved inside the epoch from step 12 on, at 16
    assert fit(run)['rollbacks'] == 1 and begun == [2 * per_epoch] and run.step == 4 * per_epoch
    assert not list((tmp_path / 'run').glob('abandoned*'))


@pytest.mark.slow
def test_a_state_that_diverged_again_is_not_gone_back_to_for_ever(tmp_path):
    run = build(tiny(tmp_path, batch_size=50, epochs=2, max_steps=None, save_interval=2, log_interval=1))
    begun = []

    def spoil(take, x, y, number, progress):
        begun.append(number)
        out = take(x, y, number, progress)
        return out._replace(loss=out.loss * float('nan')) if number == 10 and run.rollbacks < 2 else out

    tap_steps(run, spoil)
    assert fit(run)['rollbacks'] == 2
    jumps = [now for before, now in itertools.pairwise(begun) if now != before + 1]
    assert jumps == [10, 6]  # the newest, then the one before the epoch


def test_a_fault_of_one_process_is_one_of_all(tmp_path):
    class Other:
        size, rank = 2, 0

        def max(self, value):
            return 1.0

    run = build(tiny(tmp_path))
    run.world = Other()
    with pytest.raises(Diverged, match='weights of another process are not finite'):
        engine.save_within(run, 0)


def test_too_many_rollbacks_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rollback, 'MAX_ROLLBACKS', 1)
    run = build(tiny(tmp_path, lr=1e30, warmup_epochs=0.0))
    with pytest.raises(Diverged, match='stops after 1 rollbacks'):
        fit(run)
