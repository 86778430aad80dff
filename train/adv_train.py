#!/usr/bin/env python3
"""Train a robust model: python train/adv_train.py -c train/recipes/NAME.yaml --data-dir DIR; as `timm-robust train`."""

import sys

from timm_robust.train import main

if __name__ == '__main__':
    sys.exit(main())
