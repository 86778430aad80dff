"""The command `timm-robust`: each subcommand is the main of a module."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from .command_line import Parser
from .provenance import __version__

COMMANDS = {
    'train': ('train', (), 'train a model by a recipe; every setting is a flag'),
    'plan': ('train', ('--plan',), 'measure a few steps of a training, and say what it will take'),
    'evaluate': ('evaluate', (), 'clean, PGD and AutoAttack accuracy of a model'),
    'report': ('report', (), 'what a run learned, class by class, with a picture'),
    'plot': ('plots', (), 'draw the course of runs side by side'),
    'study': ('study', (), 'test claims: arms, seeds, the same images, intervals'),
    'stage': ('staging', ('stage',), 'make a release out of a finished run'),
    'measure': ('staging', ('measure',), 'measure a staged release as it is stored'),
    'render': ('staging', ('render',), 'write cards, check sums, the table of releases and RESULTS.md anew'),
    'publish': ('publish', (), 'publish staged releases to the Hugging Face Hub'),
    'robustbench': ('robustbench.__main__', (), 'load, benchmark, convert, compare, submit'),
    'demo': ('demo', (), 'all of it in two minutes, on digits'),
    'app': ('app', (), 'a page to play with: attack a picture on a robust and a standard network'),
}
"""Subcommand -> module, the words that come first there, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; its exit status, or 2 for one that there is not."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ('-h', '--help'):
        print(_help())
        return 0 if words else 2
    if words[0] in ('-V', '--version'):
        print(f'timm-robust {__version__}')
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f'did you mean {near[0]!r}? ' if near else ''
        print(f'error: {words[0]!r} is no command; {hint}there are {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    module, first, _ = COMMANDS[words[0]]
    Parser.called_as = 'timm-robust' if first and not first[0].startswith('-') else f'timm-robust {words[0]}'
    try:
        return importlib.import_module(f'{__package__}.{module}').main([*first, *words[1:]])
    finally:
        Parser.called_as = None


def _help() -> str:
    commands = '\n'.join(f'  {name:13s}{about}' for name, (_, _, about) in COMMANDS.items())
    return f'usage: timm-robust COMMAND ...\n\n{commands}\n\ntimm-robust COMMAND --help lists its flags.'


if __name__ == '__main__':
    sys.exit(main())
