import dataclasses
import logging
import threading

import pytest
import torch
from tiny_runs import TINY, Killed, assert_same, killed_at, tiny, weights

from timm_robust.models.checkpoint import load_checkpoint
from timm_robust.training import batches as batches_module
from timm_robust.training import loop as engine
from timm_robust.training import validation
from timm_robust.training.builder import build
from timm_robust.training.checkpoints import save_checkpoint
from timm_robust.training.loop import epoch_row, fit
from timm_robust.training.recipe import Recipe
from timm_robust.training.run import Sums, best_row, losses_since, validations_since
from timm_robust.training.state import restore, save
from timm_robust.training.validation import validate


@pytest.mark.slow
def test_a_file_resumed_ends_with_the_undisturbed_runs_bits(undisturbed, tmp_path):  # auto: test_kill
    with pytest.raises(Killed):
        fit(killed_at(5, build(tiny(tmp_path))))
    again = build(tiny(tmp_path, resume=str(tmp_path / 'run/checkpoint-0.pth.tar')))
    assert again.step == 3 and again.folder == tmp_path / 'run'
    fit(again)
    assert_same(weights(tmp_path), weights(undisturbed[0]))
    assert len(again.history) == 3


@pytest.mark.slow
def test_resume_with_a_cosine_cycle_and_gaussian_starts(tmp_path):
    settings = {'sched': 'onecycle_cosine', 'bn_momentum': 0.01, 'start_noise': 0.001, 'attack_bn': 'train'}
    fit(build(tiny(tmp_path / 'a', **settings)))
    with pytest.raises(Killed):
        fit(killed_at(5, build(tiny(tmp_path / 'b', **settings))))
    fit(build(tiny(tmp_path / 'b', resume='auto', **settings)))
    assert_same(weights(tmp_path / 'a'), weights(tmp_path / 'b'))


def test_resume_auto_without_a_checkpoint_starts_afresh(tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'timm_robust'):
        assert build(tiny(tmp_path, resume='auto')).step == 0
    assert 'nothing to resume' in caplog.text


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        ({'model': 'resnet18_relu'}, r'trained with model resnet18_pssilu, now resnet18_relu: go on with --model res'),
        ({'model': 'resnet18_relu', 'allow_changes': True}, r"holds arch 'resnet18_pssilu', the recipe says 'resnet18"),
        ({'model_kwargs': {'width': 8}, 'allow_changes': True}, r'weights of another resnet18_pssilu: .*size mismatch'),
        ({'eps': 0.2, 'weight_decay': 0.1}, r'eps 0.1, now 0.2; weight_decay 0.0005, now 0.1: go on with --eps 0.1'),
        ({'max_steps': 6, 'allow_changes': True}, r'is at step 7, behind the end of this schedule, step 6; type more'),
        ({'batch_size': 50}, r'100 in each of 1 processes; resume with batches of 100 in all, not 50 x 1'),
        ({'val_size': 60}, r'trained with --val-size 50; resume with that, not with --val-size 60: images that were'),
        ({'val_size': 0}, r'trained with --val-size 50; resume with that, not with --val-size 0'),
        ({'val_split': 'test'}, r'trained with --val-split None; resume with that, not with --val-split test'),
    ],
)
def test_resume_refuses_another_run(undisturbed, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        build(tiny(tmp_path, resume=str(undisturbed[0] / 'run/last.pth.tar'), **changes))


@pytest.mark.parametrize('lacking', ['recipe', 'optimizer'])
def test_resume_refuses_what_is_no_run(undisturbed, tmp_path, lacking):
    state = load_checkpoint(undisturbed[0] / 'run/last.pth.tar')
    del state[lacking]
    save_checkpoint(tmp_path / 'run/last.pth.tar', state)
    with pytest.raises(ValueError, match='holds weights, and no run to resume; start from it with --initial-checkpoi'):
        build(tiny(tmp_path, resume='auto'))


def test_other_images_under_the_same_name_are_refused(undisturbed, tmp_path, monkeypatch):
    path = str(undisturbed[0] / 'run' / 'last.pth.tar')
    real = batches_module.load_dataset
    monkeypatch.setattr(batches_module, 'load_dataset', lambda *args: real(*args).first(350))
    with pytest.raises(ValueError, match=r'training data 310 images #\w+, now 300 images #\w+; vali.*: name the right'):
        build(tiny(tmp_path, resume=path))
    again = build(tiny(tmp_path, resume=path, allow_changes=True))
    assert again.step == 7 and again.changes[0]['changes']['training data'][1].startswith('300 images')


@pytest.mark.slow
def test_a_course_is_changed_on_purpose_and_noted(undisturbed, tmp_path):
    with pytest.raises(Killed):
        fit(killed_at(5, build(tiny(tmp_path))))
    changes = {'eps': 0.2, 'weight_decay': 0.1, 'seed': 7, 'lr': 0.01}
    again = build(tiny(tmp_path, resume='auto', allow_changes=True, **changes))
    assert {group['weight_decay'] for group in again.train_step.optimizer.param_groups} == {0.0, 0.1}
    assert again.train_step.optimizer.state_dict()['state']  # the moments go on
    fit(again)
    assert Recipe.from_yaml(tmp_path / 'run/args.yaml') == tiny(tmp_path, **changes)
    state = load_checkpoint(tmp_path / 'run/last.pth.tar')
    noted = {'weight_decay': [0.0005, 0.1], 'eps': [0.1, 0.2], 'seed': [42, 7], 'lr': [0.05, 0.01]}
    assert state['changes'] == [{'step': 3, 'epoch': 0, 'rows': 1, 'changes': noted}] and state['recipe']['eps'] == 0.2
    assert state['best'] == max(row['val_pgd_acc'] for row in state['history'][1:])  # the first met a smaller eps
    third = build(tiny(tmp_path, resume='auto', opt='adamw', allow_changes=True, **changes))
    assert not third.train_step.optimizer.state_dict()['state'] and len(third.changes) == 2


def test_what_was_validated_otherwise_is_no_measure_of_what_comes(undisturbed, tmp_path):
    path = str(undisturbed[0] / 'run' / 'last.pth.tar')
    run = build(tiny(tmp_path, resume=path, lr=0.01, allow_changes=True))
    assert run.best >= 0 and best_row(run.recipe, run.history, run.changes, run.best)['val_pgd_acc'] == run.best
    assert not losses_since(run.history, run.changes)  # another rate makes the loss another
    assert losses_since(run.history, [{**run.changes[0], 'changes': {'seed': [1, 2]}}]) == run.history
    best, run = run.best, build(tiny(tmp_path, resume=path, eval_steps=20, allow_changes=True))
    assert run.best == -1.0 and best_row(run.recipe, run.history, run.changes, best) is None
    run.history += [{**run.history[-1], 'val_pgd_acc': best}]  # validated behind the last step, and as good by chance
    assert best_row(run.recipe, run.history, run.changes, best) is run.history[-1]
    for loss, rows in (('trades', 4), ('clean', 1)):  # clean accuracy is another measure
        change = [{**run.changes[0], 'changes': {'loss': ['pgd_at', loss]}}]
        assert len(validations_since(run.history, change)) == rows


def test_a_changed_course_of_an_older_checkpoint_has_no_best_from_before(undisturbed, tmp_path):
    state = load_checkpoint(undisturbed[0] / 'run' / 'last.pth.tar')
    (tmp_path / 'run').mkdir()
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        save_checkpoint(
            tmp_path / 'run' / name, state | {'changes': [{'step': 7, 'epoch': 2, 'changes': {'eps': [1, 2]}}]}
        )
    assert build(tiny(tmp_path, resume='auto')).best == -1.0


def test_a_checkpoint_that_does_not_tell_its_images_resumes(undisturbed, tmp_path, caplog):
    state = load_checkpoint(undisturbed[0] / 'run/checkpoint-1.pth.tar')
    for key in ('images', 'changes'):
        del state[key]
    del state['recipe']['allow_changes']
    save_checkpoint(tmp_path / 'run/last.pth.tar', state)
    with caplog.at_level(logging.INFO, 'timm_robust'):
        assert build(tiny(tmp_path, resume='auto')).step == 6
    assert 'last.pth.tar does not tell its images: they are taken for these' in caplog.text


@pytest.mark.slow
def test_what_a_run_goes_back_from_is_never_taken_up_again(tmp_path, monkeypatch, caplog):
    found = {3: 0.3, 6: 0.5, 7: 0.6}
    validation = lambda run, data: {'val_clean_acc': 0.9, 'val_pgd_acc': found[run.step]}  # noqa: E731
    monkeypatch.setattr(engine, 'validate', validation)
    folder, settings = tmp_path / 'run', {'checkpoint_hist': 3, 'ema_bn_batches': 0}
    fit(build(tiny(tmp_path, **settings)))
    settings['seed'] = 7
    back = build(tiny(tmp_path, resume=str(folder / 'checkpoint-0.pth.tar'), **settings))
    assert sorted(folder.glob('*.pth.tar'))[-1].name == 'model_best.pth.tar' and not list(folder.glob('abandoned*'))
    with pytest.raises(Killed):
        fit(killed_at(4, back))
    assert build(tiny(tmp_path, resume='auto', **settings)).step == 7  # nothing was saved: the first course stands
    found[6] = 0.2
    with pytest.raises(Killed):
        fit(killed_at(6, build(tiny(tmp_path, resume=str(folder / 'checkpoint-0.pth.tar'), **settings))))
    assert 'what was saved after step 3 is of the course that was left; it is in ' in caplog.text
    aside = {path.name: load_checkpoint(path)['step'] for path in (folder / 'abandoned-after-step-3').iterdir()}
    assert aside == {'checkpoint-1.pth.tar': 6, 'checkpoint-2.pth.tar': 7, 'last.pth.tar': 7, 'model_best.pth.tar': 7}
    again = build(tiny(tmp_path, resume='auto', **settings))
    assert again.step == 6 and again.best == 0.3
    assert load_checkpoint(folder / 'model_best.pth.tar')['step'] == 3


def held_out(run):
    return {image.numpy().tobytes() for image in run.held_out.images}


def test_a_resumed_run_keeps_its_held_out_images_whatever_its_seed(undisturbed, tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(validation, 'pgd', lambda *args, generator, **kw: starts.append(generator) or args[1])
    recipe = tiny(tmp_path, resume=str(undisturbed[0] / 'run/checkpoint-1.pth.tar'))
    first = build(tiny(tmp_path))
    path = tmp_path / 'run/last.pth.tar'
    for seed in (7, 8):  # the second goes on from what the first one wrote
        run = build(dataclasses.replace(recipe, seed=seed))
        assert held_out(run) == held_out(first)
        assert not held_out(run) & {image.numpy().tobytes() for image in run.batches.data.images}
        assert not torch.equal(run.batches[0][0], first.batches[0][0])  # the order is another
        validate(run, run.held_out)
        assert starts.pop().initial_seed() == TINY.seed
        run.folder = path.parent
        save(run, 1, numbered=False)
        run.writer.wait()
        recipe = dataclasses.replace(recipe, resume=str(path))


def test_a_checkpoint_of_an_older_version_keeps_its_held_out_images_too(undisturbed, tmp_path):
    state = load_checkpoint(undisturbed[0] / 'run/checkpoint-1.pth.tar')
    state.pop('split_seed', None)
    save_checkpoint(tmp_path / 'run/last.pth.tar', state)
    again = build(tiny(tmp_path, resume='auto', seed=7))
    assert again.step == 6 and held_out(again) == held_out(build(tiny(tmp_path)))


def test_what_is_saved_are_the_weights_of_that_moment(tmp_path, monkeypatch):
    """The file is written while training changes weights, momenta, averages and history."""
    go, torch_save = threading.Event(), torch.save
    run = build(tiny(tmp_path, save_interval=2))
    run.folder.mkdir()
    run.history = [{'epoch': 0, 'train_loss': 1.0}]
    run.scheduler.step_update(3)  # no warm-up
    run.train_step(*run.batches[0], 0)
    monkeypatch.setattr(torch, 'save', lambda *args: go.wait(60) and torch_save(*args))
    expected = {key: value.clone() for key, value in run.model.state_dict().items()}
    momentum = run.train_step.optimizer.state_dict()['state'][0]['momentum_buffer'].clone()
    save(run, 0)
    run.train_step(*run.batches[1], 1)
    run.history[0]['epoch'] = 9
    go.set()
    run.writer.wait()
    state = load_checkpoint(run.folder / 'last.pth.tar')
    assert_same(state['state_dict'], expected)
    assert not torch.equal(run.model.conv1.weight, expected['conv1.weight'])
    assert torch.equal(state['optimizer']['state'][0]['momentum_buffer'], momentum)
    assert state['history'] == [{'epoch': 0, 'train_loss': 1.0}]


@pytest.mark.slow
def test_the_best_that_a_kill_left_without_its_name_gets_it_on_resumption(tmp_path, monkeypatch):
    found = iter([0.3, 0.5, 0.4])
    monkeypatch.setattr(engine, 'validate', lambda *args: {'val_clean_acc': 0.9, 'val_pgd_acc': next(found)})
    fit(build(tiny(tmp_path)))
    run = tmp_path / 'run'
    last, best, middle, end = (
        run / f'{name}.pth.tar' for name in ('last', 'model_best', 'checkpoint-1', 'checkpoint-2')
    )
    assert last.samefile(end) and best.samefile(middle) and not best.samefile(last)  # a state is written once
    best.unlink()
    assert build(tiny(tmp_path, resume=str(end))).best == -1.0  # not the best, and alone
    assert not best.exists()
    assert build(tiny(tmp_path, resume=str(middle))).best == 0.5 and load_checkpoint(best)['epoch'] == 1
    older = load_checkpoint(best)
    save_checkpoint(best, {**older, 'step': 3, 'epoch': 0})  # the one before
    build(tiny(tmp_path, resume=str(middle)))
    assert load_checkpoint(best)['epoch'] == 1
    save_checkpoint(best, {**older, 'step': 9, 'epoch': 8})  # of a run that went on, and was gone back from
    build(tiny(tmp_path, resume=str(middle)))
    assert load_checkpoint(best)['epoch'] == 8


def test_sums_of_an_epoch_survive_another_number_of_processes(tmp_path):
    class Pair:
        """Two processes whose sums are equal."""

        size, rank, device = 2, 0, torch.device('cpu')

        def sum(self, value):
            return 2 * value

        def gather(self, items):
            return items

    run = build(tiny(tmp_path))
    fit(run)
    run.sums = Sums(0, torch.tensor(6.0), torch.tensor(30.0))
    row = epoch_row(run, run.sums, 0, 0.0)
    save(run, 2, numbered=False)
    for rank in (0, 1):
        run.world, run.recipe = Pair(), tiny(tmp_path, batch_size=50)
        run.world.rank = rank
        restore(run, tmp_path / 'run/last.pth.tar')
        assert [run.sums.loss.item(), run.sums.correct.item()] == ([12.0, 30.0] if rank == 0 else [0.0, 0.0])
    loss, correct = 12.0, 30.0  # summed over the two
    assert loss / run.step / 2 == pytest.approx(row['train_loss']) and correct / run.step / 100 == row['train_acc']
