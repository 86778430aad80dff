"""Publish staged models to the Hugging Face Hub: timm-robust publish [NAME ...] [--dry-run].

Without a name, everything in model_cards/ is published. The token comes from HF_TOKEN or `hf auth login`, never from
the command line. Exit status: 0 all went well, 1 something failed (the table says what), 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from huggingface_hub import get_token

from .command_line import Parser, command, is_input_error, say
from .release import RESULTS, Options, Outcome, publish, repo_of
from .weights import CARDS, read_table, table_of, without_password

_CLIENTS = ('huggingface_hub', 'httpx', 'httpx2', 'httpcore', 'requests', 'urllib3')


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Publish each model on its own; one that fails does not keep the others back."""
    args = parse(argv)
    args.table = args.table or table_of(args.cards)
    read_table(args.table)  # or say what is wrong with it, once
    staged = sorted(path.parent.name for path in args.cards.glob(f'*/{RESULTS}'))
    unknown = [name for name in args.names if name not in staged]
    if unknown or not staged:
        wrong = f'{", ".join(unknown)} is not staged; ' if unknown else ''
        there = ', '.join(staged) or 'no staged model; type: timm-robust stage RUN NAME'
        raise ValueError(f'{wrong}{args.cards} holds {there}')
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    outcomes = [attempt(args.cards / name, options, args.table) for name in args.names or staged]
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        print(table(outcomes))
    return int(any(outcome.status == 'failed' for outcome in outcomes))


def attempt(folder: Path, options: Options, releases: Path) -> Outcome:
    """Publish one model; whatever goes wrong becomes one line, without the token or a password."""
    try:
        return publish(folder, options, table=releases, say=say)
    except Exception as error:  # the edge: errors of this package and of three client libraries end here
        *_, (raised, _) = traceback.walk_tb(error.__traceback__)
        client = raised.f_globals['__name__'].partition('.')[0] in _CLIENTS
        if not (client or is_input_error(error)):  # a fault of ours
            say(masked(traceback.format_exc()))
        message = masked(' '.join(f'{type(error).__name__}: {error}'.split()))
        say(f'error: {folder.name}: {message}')
        try:
            repo = repo_of(folder.name, options.org, releases)
        except (ValueError, OSError):  # the table of releases is what failed
            repo = ''
        return Outcome(folder.name, repo, 'failed', message=message)


def masked(text: str) -> str:
    """The text without the token, and without passwords in addresses."""
    text, token = without_password(text), get_token()
    return text.replace(token, '***') if token else text


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as aligned text."""
    rows = [('model', 'status', 'files', 'commit', 'tag')]
    for outcome in outcomes:
        commit = (outcome.commit or '')[:12]
        rows.append((outcome.name, outcome.status, str(len(outcome.changes)), commit, outcome.tag or ''))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f'{outcome.name}: {outcome.message}' for outcome in outcomes if outcome.message]
    return '\n'.join(lines + [outcome.url for outcome in outcomes if outcome.url])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(description='Publish staged models to the Hugging Face Hub.')
    add = parser.add_argument
    add('names', nargs='*', metavar='NAME', help='<arch>.<tag>; all staged models if none is given')
    add('--dry-run', action='store_true', help='say what would be done; nothing is written')
    add('--private', action='store_true', help='make new repositories private')
    add('--revision', default='main', metavar='BRANCH', help='commit to this branch, made if missing (default: main)')
    add('--tag', help='tag the commit; a tag never moves')
    add('--overwrite', action='store_true', help='allow other weights under a published name')
    add('--org', help='user or organisation on the Hub (default: as the table of releases says)')
    add('--json', action='store_true', help='print the outcomes as JSON')
    add('--cards', type=Path, default=CARDS, help='folder of staged models')
    add('--table', type=Path, help='table of releases that gets the commits; by default the one beside --cards')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(main())
