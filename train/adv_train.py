#!/usr/bin/env python3
"""Train a robust model: python train/adv_train.py -c train/recipes/NAME.yaml --data-dir DIR.

Every flag is a field of `timm_robust.recipe.Recipe`; flags win over the recipe file, the file over the defaults. The
folder output/train/<experiment> gets args.yaml, summary.csv, last.pth.tar, model_best.pth.tar (best PGD accuracy on
held-out images) and the newest checkpoints. The last line of the output is the result as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

import timm_robust
from timm_robust.engine import build, fit
from timm_robust.recipe import parse_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe of the command line; 0 if it ended well, 2 after bad input."""
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr, force=True)
    recipe = parse_recipe(sys.argv[1:] if argv is None else argv)
    try:
        run = build(recipe)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    logging.info('timm_robust %s, output in %s', timm_robust.__version__, run.folder)
    print(json.dumps(fit(run)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
