"""Records of staged models for tests that care about a part of them: what is missing is filled in."""

HYPER = {
    'model': 'resnet18_relu',
    'dataset': 'cifar10',
    'norm': 'Linf',
    'eps': '8/255',
    'loss': 'pgd_at',
    'attack': 'pgd',
    'steps': 10,
    'beta': 6.0,
    'batch_size': 128,
    'sched': 'cosine',
    'lr': 0.1,
    'val_size': 1000,
}
_RESULT = {
    'dataset': 'cifar10',
    'split': 'test',
    'norm': 'Linf',
    'eps': 8 / 255,
    'eps_text': '8/255',
    'seed': 0,
    'batch_size': 250,
    'dtype': 'float32',
    'wall_time_s': 90.0,
    'images_per_s': 1.0,
    'hardware': 'abacus',
    'versions': {},
    'commit': None,
    'date': '2026-01-01T00:00:00+00:00',
    'clean_acc': 0.8,
}
_TRAINING = {
    'epoch': 1,
    'weights': 'ema',
    'epochs': 3,
    'steps': 9,
    'seconds': 3600.0,
    'images_per_s': 99.5,
    'activation': {},
    'origins': [],
    'notes': [],
}


def complete(record):
    """A record of results.json with every key that a reader asks for."""
    weights = {'sha256': '0' * 64, 'size': 1, 'parameters': 11_173_964} | record.get('weights', {})
    items = [
        item | {'result': _RESULT | {'model': record['model']} | item['result']} for item in record['measurements']
    ]
    return record | {'weights': weights, 'training': _TRAINING | record['training'], 'measurements': items}
