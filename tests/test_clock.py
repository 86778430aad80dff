import pytest

from timm_robust.clock import Clock, parse_duration


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
    assert (clock.progress(0), clock.progress(50), clock.done(199), clock.done(200)) == (0, 0.25, False, True)
    assert clock.left(100, steps_per_second=10) == 10


def test_a_budget_keeps_its_reserve():
    clock = Clock(200, budget=100, spent=45)
    assert clock.progress(0) == pytest.approx(0.45, abs=0.01)
    clock.keep(10)
    assert clock.progress(0) == pytest.approx(0.5, abs=0.01)
    clock.keep(5)  # the largest counts
    assert clock.reserve == 10 and clock.left(0, 1) == pytest.approx(45, abs=1)
    clock.restart(95)
    assert clock.done(0)
