"""timm's own tests/test_models.py, of the installed version, pointed at our models.

The wheel does not hold the tests, so timm's source archive is fetched from the package index once and kept in .cache/;
without a network, and without the archive, these tests are skipped.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import warm

import timm_robust

ROOT = Path(__file__).parents[1]
# ResNet-18 with every activation, and each wide size; of wrn70_16 (267 million parameters) what fits a small machine.
# torch.jit.script is deprecated, and cannot share an activation: one network of each kind goes through it.
RESNETS = [*(f'resnet50_{act}' for act in ('gelu', 'elu', 'softplus', 'smoothrelu', 'pssilu')), 'resnet101_silu']
LARGE = 'resnet152_silu or resnext152_32x8d_silu or efficientnet_b7_silu'
CASES = {
    'ResNet-18': [f'resnet18_{act}' for act in timm_robust.ACTIVATIONS],
    'wide ResNets': [
        *('wrn28_10_pssilu', '(wrn28_10_relu or wrn34_10_pssilu) and not torchscript'),
        'test_model_default_cfgs and wrn70_16_pssilu',
    ],
    'ResNets': ['resnet50_silu', 'resnext50_32x4d_silu', f'({" or ".join(RESNETS)}) and not torchscript'],
    'EfficientNets': [
        *('efficientnet_b0_silu', '(efficientnet_b1_silu or efficientnet_b2_silu) and not torchscript'),
        f'test_model_default_cfgs and ({LARGE})',
    ],
}
# Only our models are listed: 18,000 tests would be collected for 300. Names such as resnet18_pssilu_cifar10_linf, by
# which RobustBench asks for a release, are these networks too (test_robustbench.py).
START = """import timm, timm_robust
listed, ours = timm.list_models, ('cifar_resnet', 'wide_resnet', 'imagenet')
timm.list_models = lambda *args, **options: [
    name for name in listed(*args, **options) if timm.models.is_model_in_modules(name, ours) and 'cifar10' not in name
]
"""


@pytest.fixture(scope='module')
def upstream(tmp_path_factory):
    """A folder with upstream's test file, our modules added to its list of those with forward_intermediates."""
    cache = ROOT / '.cache'
    archive = cache / f'timm-{timm.__version__}.tar.gz'
    if not archive.is_file():
        cache.mkdir(exist_ok=True)
        fetch = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary=timm', '-d', str(cache)]
        run = subprocess.run([*fetch, f'timm=={timm.__version__}'], capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f'timm {timm.__version__}: no source archive to be had: {run.stderr.strip()[-200:]}')
    folder = tmp_path_factory.mktemp('upstream')
    with tarfile.open(archive) as tar:
        for name in ('test_models.py', 'conftest.py'):
            (folder / name).write_bytes(tar.extractfile(f'timm-{timm.__version__}/tests/{name}').read())
    text, marker = (folder / 'test_models.py').read_text(), 'FEAT_INTER_FILTERS = ['
    assert marker in text, 'upstream renamed its list of modules with forward_intermediates'
    text = text.replace(marker, f"{marker}'cifar_resnet', 'wide_resnet', 'imagenet', ", 1)
    (folder / 'test_models.py').write_text(START + text)
    return folder


@pytest.mark.upstream
@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_upstream_model_tests_pass(case, upstream):
    chosen = ' or '.join(f'({model})' for model in CASES[case])
    command = ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'ignore', '-k', chosen, 'test_models.py']
    run = warm.run(command, cwd=upstream)
    tail = run.stdout[-3000:]
    assert run.returncode == 0, tail
    assert 'passed' in tail and 'failed' not in tail and ' skipped' not in tail, tail
