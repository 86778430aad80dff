"""Two runs beside each other on the images that both held out: clean and PGD-10 accuracy, paired; writes record.json.

python train/studies/progressive_resizing/measure.py RUN_AT_32_PIXELS RUN_WITH_STAGES --data-dir DIR
"""

import argparse
import json
from pathlib import Path

from timm_robust.data import load_dataset, split_holdout
from timm_robust.evaluation.measure import evaluate
from timm_robust.models.checkpoint import LAST, load_checkpoint
from timm_robust.models.load import load_model
from timm_robust.release.results_page import paired_difference
from timm_robust.training.recipe import Recipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('runs', nargs=2, type=Path, help='folders: without stages, with stages')
parser.add_argument('--data-dir', required=True)
args = parser.parse_args()
arms, verdicts, measured = [], [], []
for run in args.runs:
    state = load_checkpoint(run / LAST)
    recipe, row = Recipe.from_checkpoint(state), state['history'][-1]
    seed = state.get('split_seed', recipe.seed)
    images = load_dataset(recipe.dataset, args.data_dir, recipe.train_split)
    _, held_out = split_holdout(images, recipe.held_out_of(len(images)), seed)
    result, flags = evaluate(load_model(run / LAST), held_out, recipe.threat_model, attack='pgd', pgd_steps=10)
    arms.append(
        {
            'stages': recipe.progressive_resizing,
            'epochs': recipe.epochs,
            'images': row['images'],
            'hours': round(row['seconds'] / 3600, 2),
            'clean_acc': result.clean_acc,
            'pgd_acc': result.pgd_acc,
        }
    )
    verdicts.append({key: flags[key].numpy().astype(bool) for key in ('clean_correct', 'robust')})
    origin = state['origins'][-1]
    measured.append(result.data_sha256)
if measured[0] != measured[1]:
    raise SystemExit(f'error: {args.runs[0]} and {args.runs[1]} held out different images, which cannot be paired')
gains = {key: paired_difference(verdicts[1][key], verdicts[0][key]) for key in ('clean_correct', 'robust')}
record = {'arms': arms, 'n': len(held_out), 'gains': gains, 'origin': origin}
Path(__file__).with_name('record.json').write_text(json.dumps(record, indent=2) + '\n')
print(json.dumps(record, indent=2))
