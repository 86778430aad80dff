"""Trained models made ready for others: staged, measured, described by a card, published."""

from .folder import check, sums_of
from .model_files import write_model
from .papers import extra_data_of
from .publishing import Options, Outcome, publish, repo_of
from .record import FLAGS, RESULTS, measurement_notes, percent, read_hyper, read_results, results_of, strongest
from .staging import measure, render, stage, stored_weights

__all__ = [
    'FLAGS',
    'RESULTS',
    'Options',
    'Outcome',
    'check',
    'extra_data_of',
    'measure',
    'measurement_notes',
    'percent',
    'publish',
    'read_hyper',
    'read_results',
    'render',
    'repo_of',
    'results_of',
    'stage',
    'stored_weights',
    'strongest',
    'sums_of',
    'write_model',
]
