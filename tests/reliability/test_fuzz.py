import json
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ('checkpoint', 'safetensors', 'config', 'recipe', 'npz', 'parquet', 'result', 'releases')


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_damaged_and_hostile_files_are_read_right_or_refused(kind):
    script = Path(__file__).with_name('fuzz.py')
    command = [sys.executable, str(script), '--kind', kind, '--count', '40']
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])[kind]
    assert not found['crashed']
    assert found['refused'] > 10
