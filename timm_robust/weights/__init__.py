"""The table of released weights, and their checked content."""

from .download import bounded_waits, fetch_folder, read_release, told_stalls, without_password
from .releases import (
    CARDS,
    EXTERNAL,
    RELEASES,
    STAGED,
    TABLE,
    WEIGHTS,
    Release,
    external_file,
    is_ours,
    read_table,
    releases_of,
    split_name,
    table_of,
    write_table,
)

__all__ = [
    'CARDS',
    'EXTERNAL',
    'RELEASES',
    'STAGED',
    'TABLE',
    'WEIGHTS',
    'Release',
    'bounded_waits',
    'external_file',
    'fetch_folder',
    'is_ours',
    'read_release',
    'read_table',
    'releases_of',
    'split_name',
    'table_of',
    'told_stalls',
    'without_password',
    'write_table',
]
