#!/usr/bin/env python3
"""Publish staged models to the Hugging Face Hub: python hub_upload.py [NAME ...]; as `timm-robust publish`."""

import sys

from timm_robust.publish import main

if __name__ == '__main__':
    sys.exit(main())
