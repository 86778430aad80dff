import importlib
import logging

import pytest


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
    with importlib.import_module('timm_robust.activations.pssilu').using(None):
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

    class Short(pyautoattack.AutoAttack):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for apgd in (self.apgd, self.apgd_targeted):
                apgd.n_iter = apgd.n_iter_orig = 20
            self.fab.n_iter, self.square.n_queries = 10, 300

    monkeypatch.setattr(pyautoattack, 'AutoAttack', Short)
