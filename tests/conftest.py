import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for records.py: --import-mode=importlib does not


@pytest.fixture(scope='session')
def hub_server():
    """The module tests/hub_server.py: --import-mode=importlib gives tests no package to import it from."""
    spec = importlib.util.spec_from_file_location('hub_server', Path(__file__).with_name('hub_server.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
