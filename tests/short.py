"""AutoAttack with fewer steps and queries, as the fixture short_attacks makes it, for a process of its own."""

import pyautoattack


class Short(pyautoattack.AutoAttack):
    """The library's own, and by it ours."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for apgd in (self.apgd, self.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = 20
        self.fab.n_iter, self.square.n_queries = 10, 300


def shorten():
    """For the whole process."""
    pyautoattack.AutoAttack = Short
