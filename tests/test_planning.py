from tiny_runs import tiny

from timm_robust.training.builder import build
from timm_robust.training.planning import plan


def test_plan_measures_and_trains_nothing(tmp_path):
    line = plan(build(tiny(tmp_path, max_steps=None)), steps=1)
    assert line['images'] == 3 * 3 * 100 and line['epochs'] == 3
    assert line['hours'] * 3600 > 9 * line['step_ms'] / 1000
    assert line['peak_memory_gib'] > 0.1
    assert not (tmp_path / 'run').exists()
