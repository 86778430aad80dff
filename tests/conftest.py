import logging
import random

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def what_a_test_draws_is_its_own():
    """Whatever the tests before it drew."""
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)


@pytest.fixture(autouse=True)
def logs_go_where_they_went():
    """A command sends the log to its stderr, which is closed after its test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in before and type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(autouse=True)
def compiled_kernels_stay_in_their_test():
    """A training compiles PSSiLU for the whole process, and its networks keep more for backward from then on."""
    from timm_robust.activations import using

    with using(None):
        yield


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    """The folder of a small run that nothing disturbed, and its last line; read it, and write elsewhere."""
    from tiny_runs import tiny

    from timm_robust.training import build, fit

    folder = tmp_path_factory.mktemp('undisturbed')
    return folder, fit(build(tiny(folder)))


@pytest.fixture
def short_attacks(monkeypatch):
    """AutoAttack with fewer steps and queries, the library's own and ours alike: for claims that hold at any length."""
    pyautoattack = pytest.importorskip('pyautoattack')
    from short import Short

    monkeypatch.setattr(pyautoattack, 'AutoAttack', Short)
