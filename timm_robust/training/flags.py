"""The recipe as a command line: one flag for each setting, which wins over the file, as the file over the default."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

from ..command_line import KeyValue, Parser
from .recipe import KINDS, SETTINGS, Recipe, find_recipe, kinds_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and one flag for each setting; a flag that is not given leaves nothing in the namespace."""
    about = 'name of a recipe that the package brings, or a file; flags override it'
    parser.add_argument('recipe', nargs='?', metavar='RECIPE', help=about)
    parser.add_argument('-c', '--config', metavar='RECIPE', help='the same')
    groups: dict[str, Any] = {}
    for name, field in SETTINGS.items():
        title = field.metadata['group']
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        kinds, allowed = kinds_of(name), field.metadata['allowed']
        default = 'none' if field.default in (None, dataclasses.MISSING) else field.default
        options: dict[str, Any] = {'help': f'{field.metadata["help"]} (default: {default})'.replace('%', '%%')}
        if kinds == (bool,):
            options['action'] = argparse.BooleanOptionalAction
        elif kinds == (dict,):
            options |= {'nargs': '*', 'action': KeyValue, 'metavar': 'KEY=VALUE'}
        elif kinds == (list,):
            options |= {'nargs': '*', 'type': int, 'metavar': 'N'}
        elif isinstance(allowed, tuple):
            options['choices'] = allowed
        else:
            options |= {'type': _reader(kinds), 'metavar': {int: 'N', float: 'X'}.get(kinds[0], 'TEXT')}
        flags = ['--' + name.replace('_', '-')]
        if name == 'batch_size':
            flags.insert(0, '-b')
        group.add_argument(*flags, **options).default = argparse.SUPPRESS


def _reader(kinds: tuple[type, ...]) -> Callable[[str], Any]:
    """What turns the text of a flag into a value; `none` unsets a setting that may be None."""
    kind = next(kind for kind in (str, int, float) if kind in kinds)

    def read(text: str) -> Any:
        if NoneType in kinds and text.lower() == 'none':
            return None
        if kind is int and float in kinds and not text.isdecimal():
            return float(text)
        return kind(text)

    read.__name__ = KINDS[kind].removeprefix('a ')  # argparse: invalid whole number value: 'x'
    return read


def parse_recipe(argv: Sequence[str]) -> Recipe:
    """The recipe of a command line (without the program's name): default < recipe < flags.

    Raises:
        SystemExit: for wrong flags, after a line on stderr, with status 2.
        ValueError, OSError: as Recipe and Recipe.from_yaml.
    """
    about = 'Train a robust model. With --plan, measure a few steps, print time and memory of the run, and end.'
    parser = Parser('train/adv_train.py', description=about, allow_abbrev=False)
    parser.usage = f'{parser.prog} [RECIPE] [--flag VALUE ...] [--plan]; {parser.prog} --help lists the flags'
    add_arguments(parser)
    given = vars(parser.parse_args(list(argv)))
    named = [name for name in (given.pop('recipe'), given.pop('config')) if name]
    if len(named) > 1:
        parser.error(f'two recipes, {named[0]} and {named[1]}; give one')
    recipe = Recipe.from_yaml(find_recipe(named[0])) if named else Recipe()
    return dataclasses.replace(recipe, **given)
