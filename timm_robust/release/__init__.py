"""Trained models made ready for others: staged, measured, described by a card, published."""

from .folder import check
from .model_files import write_model
from .papers import ExtraData, extra_data_of
from .publishing import Options, Outcome, publish, repo_of
from .record import FLAGS, RESULTS, attack_title, percent, read_hyper, read_results, robust_acc
from .staging import measure, render, stage, stored_weights

__all__ = [
    'FLAGS',
    'RESULTS',
    'ExtraData',
    'Options',
    'Outcome',
    'attack_title',
    'check',
    'extra_data_of',
    'measure',
    'percent',
    'publish',
    'read_hyper',
    'read_results',
    'render',
    'repo_of',
    'robust_acc',
    'stage',
    'stored_weights',
    'write_model',
]
