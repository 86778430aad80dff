"""Trained models made ready for others: staged, measured, described by a card, published."""

from .folder import check
from .model_files import write_model
from .papers import ExtraData, extra_data_of
from .record import FLAGS, attack_title, percent, read_hyper, read_results, robust_acc
from .staging import measure, render, stage

__all__ = [
    'FLAGS',
    'ExtraData',
    'attack_title',
    'check',
    'extra_data_of',
    'measure',
    'percent',
    'read_hyper',
    'read_results',
    'render',
    'robust_acc',
    'stage',
    'write_model',
]
