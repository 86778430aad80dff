import platform

import pytest
import warm

FAULTS = """
import resource, sys, torch
from timm_robust.command_line import keep_freed_memory
if sys.argv[1] == 'keep':
    assert keep_freed_memory()
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs glibc')
def test_memory_is_not_handed_back():
    faults = [int(warm.run(['-c', FAULTS, how]).stdout) for how in ('give', 'keep')]
    assert faults[0] > 300_000 > 40_000 > faults[1]  # 64 MiB are 16,384 pages
