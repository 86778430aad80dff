"""The page of `timm-robust app` as a Space, which serves port 7860 to its visitors."""

from timm_robust.app import launch

if __name__ == '__main__':
    launch(host='0.0.0.0', port=7860).block_thread()
