"""What the wheel carries beside the code: recipes, records of the releases, and the weights not on the Hub yet."""

import json
import shutil
from pathlib import Path

from setuptools import find_packages, setup

RELEASES = json.loads(Path('timm_robust/weights/releases.json').read_text())
RELEASES = {name: it for name, it in RELEASES.items() if Path('train/recipes', f'{name}.yaml').is_file()}  # ours
STAGED = [name for name, release in RELEASES.items() if release.get('commit') is None]
shutil.rmtree('build/lib/timm_robust/model_cards', ignore_errors=True)  # weights of an earlier build, on the Hub by now
BROUGHT = {'timm_robust.recipes': 'train/recipes', 'timm_robust.model_cards': 'model_cards'}
BROUGHT = {package: folder for package, folder in BROUGHT.items() if Path(folder).is_dir()}

setup(
    packages=[*find_packages(include=['timm_robust*']), *BROUGHT],
    package_dir=BROUGHT,
    package_data={
        'timm_robust': ['py.typed'],
        'timm_robust.weights': ['releases.json'],
        'timm_robust.robustbench': ['published.json'],
        'timm_robust.app': ['examples.png', 'standard/*'],
        'timm_robust.recipes': ['*.yaml'],
        'timm_robust.model_cards': [
            *[f'{name}/{file}' for name in STAGED for file in ('model.safetensors', 'config.json')],
            *[f'{name}/results.json' for name in RELEASES],  # the app shows them
        ],
    },
    include_package_data=False,
)
