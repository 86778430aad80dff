#!/usr/bin/env python3
"""The package's main job in a few minutes on two CPU cores: python train/demo.py; as `timm-robust demo`."""

import sys

from timm_robust.demo import main

if __name__ == '__main__':
    sys.exit(main())
