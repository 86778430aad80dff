#!/usr/bin/env python3
"""What an activation's shape does to robustness: as `timm-robust study STUDY.yaml -o OUT`."""

import sys

from timm_robust.study import main

if __name__ == '__main__':
    sys.exit(main())
