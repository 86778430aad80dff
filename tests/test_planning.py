import time

import pytest
from tiny_runs import draw_pictures, tiny

from timm_robust.training import planning
from timm_robust.training.builder import build
from timm_robust.training.planning import plan


def test_plan_measures_and_trains_nothing(tmp_path):
    line = plan(build(tiny(tmp_path, max_steps=None)), steps=1)
    assert line['images'] == 3 * 3 * 100 and line['epochs'] == 3
    assert line['hours'] * 3600 > 9 * line['step_ms'] / 1000
    assert line['peak_memory_gib'] > 0.1
    assert not (tmp_path / 'run').exists()


def test_a_step_takes_no_less_than_the_reading_of_its_images(tmp_path, monkeypatch):
    pictures = draw_pictures(tmp_path / 'pictures')
    settings = {'dataset': 'folder', 'data_dir': str(pictures), 'val_size': 0.2, 'img_size': 32, 'batch_size': 6}
    run = build(tiny(tmp_path, max_steps=None, workers=3, **settings))
    now, take = [0.0], planning.training_batch

    def read(run, number):  # three processes, a round of theirs in 6 s: the first three batches are there at once
        now[0] += 6.0 if number % 3 == 0 and number < 6 else 0.0
        return take(run, number % 4)

    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(planning, 'training_batch', read)
    assert planning._loader_seconds(run) == pytest.approx(2.0)
    monkeypatch.setattr(planning, '_step_seconds', lambda *_: 0.5)
    assert plan(run, steps=1)['step_ms'] == pytest.approx(2000)


def test_an_average_without_held_out_images_is_re_estimated_once(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, 'saving_seconds', lambda run: 0.0)
    monkeypatch.setattr(planning, '_step_seconds', lambda *_: 1e-9)
    seconds = []
    for epochs in (1, 50):
        line = plan(build(tiny(tmp_path, max_steps=None, epochs=epochs, val_size=0)), steps=1)
        seconds.append(line['hours'] * 3600 - line['start_up_s'] - line['validation_s'])
    assert seconds == pytest.approx([0, 0], abs=1e-4)
