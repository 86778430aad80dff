import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_damaged_and_hostile_files_are_read_right_or_refused():
    command = [sys.executable, str(Path(__file__).with_name('fuzz.py')), '--count', '40']
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 8
    for kind, ends in found.items():
        assert not ends['crashed'] and ends['refused'] > 10, kind
