import time

import pytest

from timm_robust.training.clock import Clock, parse_duration


@pytest.mark.parametrize(
    ('text', 'seconds'), [('25m', 1500), ('1.5h', 5400), ('1h30m', 5400), ('90s', 90), ('90', 90), ('1h2m3s', 3723)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize('text', ['', '0', 'soon', '5 minutes', '-3m', '1m1h'])
def test_no_durations(text):
    with pytest.raises(ValueError, match="write for example '25m'"):
        parse_duration(text)


def test_steps_are_the_clock_without_a_budget():
    clock = Clock(200)
    assert [clock.progress(step) for step in (0, 50, 200)] == [0, 0.25, 1]
    assert clock.left(100, steps_per_second=10) == 10


@pytest.fixture
def wall(monkeypatch):
    """A clock on the wall that the test sets: wall[0]."""
    seconds = [1000.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: seconds[0])
    return seconds


def test_a_budget_is_spread_over_training_alone(wall):
    clock = Clock(200, budget=100)
    wall[0] += 20  # start-up
    assert clock.progress(0) == 0
    clock.validations, clock.last_step = [10.0], 1.0
    clock.go()
    assert clock.progress(0) == 0 and clock.closing == 12 and clock.left(0, 1) == 68
    wall[0] += 34
    clock.go()  # it goes already
    assert clock.progress(0) == pytest.approx(0.5)
    clock.stop()
    wall[0] += 24  # validation: the rest of the schedule has 10 s now
    assert clock.progress(0) == pytest.approx(0.5)
    clock.go()
    wall[0] += 5
    assert clock.progress(0) == pytest.approx(0.75)
    wall[0] += 5
    assert clock.progress(0) == 1 and clock.elapsed() == 88


def test_a_budget_leaves_time_for_the_breaks_to_come(wall):
    clock = Clock(200, budget=100)
    clock.go()
    for saving, validation in ((1, 2), (1, 30), (1, 2)):  # one that took long is no measure of the others
        for seconds in (saving, validation):
            wall[0] += 4
            clock.stop()
            wall[0] += seconds
            if seconds == saving:
                clock.go()
        clock.note_validation(validation, interval=8)
        clock.go()
    assert clock.breaks == [3, 31, 3] and clock.elapsed() == 61
    # 33 s are kept for the last validation; the others follow each 8 s of training and take 3 s
    lefts = {6: 6, 8: 8, 10: 8, 11: 8, 12: 9, 19: 16, 21.5: 16, 22: 16, 47: 35, -3: 0}
    for left, seconds in lefts.items():
        assert clock.training_seconds(elapsed=100 - 33 - left) == pytest.approx(seconds), left
    assert clock.training_seconds() == pytest.approx(6)
    wall[0] += 4
    clock.stop()  # half way to the next validation
    assert clock.training_seconds(elapsed=100 - 33 - 4) == 4
    assert clock.training_seconds(elapsed=100 - 33 - 11) == pytest.approx(8)


def test_an_estimate_holds_until_a_validation_like_the_last_one_was_timed(wall):
    clock = Clock(200, budget=1000)
    clock.expect(validation=300, saving=10, interval=50)
    assert clock.closing == pytest.approx(1.1 * 320) and clock.breaks == [310]
    clock.note_validation(20, interval=50, like_the_last=False)  # of smaller images
    assert clock.closing == pytest.approx(1.1 * 320)
    clock.note_validation(40, interval=50)
    assert clock.closing == pytest.approx(1.1 * 50)  # its own save, and the one before it


def test_a_resumed_budget_goes_on_at_its_share(wall):
    clock = Clock(200, budget=100)
    clock.restart(40, 0.25)
    wall[0] += 30  # start-up of this session
    assert clock.progress(0) == 0.25 and clock.elapsed() == 70
    clock.go()
    assert clock.progress(0) == 0.25
    wall[0] += 15
    assert clock.progress(0) == pytest.approx(0.625)
    clock.restart(95)  # a checkpoint of an earlier version holds no share
    assert clock.progress(0) == 0.95
    wall[0] += 5  # nothing is left
    assert clock.progress(0) == 1
