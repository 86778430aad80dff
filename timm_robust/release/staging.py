"""Releases in the making: a run becomes model_cards/<arch>.<tag>/, is measured as stored, and described."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml

from ..activations import activation_state
from ..data import is_named_by_folder
from ..distributed import World
from ..evaluation import evaluate
from ..files import atomic_file, atomic_folder, check_output, one_writer, sha256, write_text
from ..models import BEST, HYPER_PARAMETERS, LAST, load_checkpoint, load_model, note, read_weights
from ..plots import adversarial_figure, new_figure, read_run, run_figure
from ..provenance import CHECKOUT, PACKAGE
from ..results import read_object
from ..threat_model import ThreatModel, parse_eps
from ..training import HELD_OUT_NAMES, VALIDATION, Recipe
from ..weights import CARDS, RELEASES, TABLE, WEIGHTS, Release, is_ours, read_table, split_name, write_table
from .card import LICENSE, arguments_of, model_card, read_license
from .folder import ORGANISATION, check, check_alike, check_sums, forget_sum, sums_of, verify
from .model_files import stored, weights_content, write_files
from .record import FLAGS, RESULTS, read_hyper, read_results, results_of, strongest, verdicts_file
from .results_page import README_END, README_START, results_page, weights_table

_PICTURED = 6


def stage(
    run: str | Path,
    name: str,
    *,
    cards: Path = CARDS,
    notes: Sequence[str] = (),
    license_id: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write model_cards/<name>/ from a finished run: all of it or nothing.

    The weights are those of model_best.pth.tar, averaged ones if the run kept an average. Tensors of two and more
    dimensions are stored in fp16, vectors (biases, batch norm, alpha and beta) in fp32.

    Args:
        run: the folder that training wrote.
        name: '<arch>.<tag>'.
        cards: the folder that gets the folder.
        notes: what limits the weights, for the card; none: those of these weights when they were staged before.
        license_id: of the weights, as the Hub spells it; None: Apache-2.0 for weights trained from random ones or from
            a release of ours, that of timm's weights for those that began from them.
        overwrite: replace the folder, whatever its weights; its measurements are dropped.

    Raises:
        FileNotFoundError: if the run lacks a file.
        ValueError: if the name does not fit the run, if the licence of the weights that it began from is not known, if
            weights overflow fp16, or if the folder exists with others.
    """
    run, folder = Path(run), cards / name
    state, last = load_checkpoint(run / BEST), load_checkpoint(run / LAST)
    recipe = Recipe.from_checkpoint(state)
    _check_name(run, recipe, name)
    model, weights = load_model(run / BEST), stored_weights(run)
    training = _training_facts(name, state, last, notes) | {'activation': activation_state(model)}
    if start := _start_of(recipe):
        training['start'] = Path(start).name
    origin = training['origins'][-1] if training['origins'] else {'versions': {}}
    provenance = {
        'trained_with': f'timm_robust {origin["versions"].get("timm_robust")}',
        'commit': str(origin.get('commit')),
    }
    content = weights_content(weights, name, **provenance)
    if recipe.val_split == 'auto':  # without the data nobody could tell which it was
        recipe = replace(recipe, val_split=_found_split(run, recipe, state))
    cards.mkdir(parents=True, exist_ok=True)
    with one_writer(cards):  # a measurement may end meanwhile
        kept: list[dict[str, Any]] = []
        if (folder / WEIGHTS).is_file() and not overwrite:
            if (folder / WEIGHTS).read_bytes() != content:
                raise ValueError(
                    f'{folder} holds other weights; type --overwrite to replace them and their measurements'
                )
            old = read_results(folder)
            kept, training['notes'] = old['measurements'], training['notes'] or old['training']['notes']
            license_id = license_id or read_license(folder)
        license_id = license_id or _license_of_start(run, recipe)
        note(model, license=license_id)
        with atomic_folder(folder) as new:
            write_files(new, model, content, split_name(name)[1], arguments_of(recipe.model_kwargs))
            if license_id == LICENSE:
                (new / 'LICENSE').write_text(_license())
            settings = yaml.safe_dump(recipe.public(), sort_keys=False, allow_unicode=True)
            (new / HYPER_PARAMETERS).write_text(settings)
            shutil.copyfile(run / 'summary.csv', new / 'summary.csv')
            run_figure(new / 'training.png', {name: read_run(run)})
            facts = {'sha256': sha256(new / WEIGHTS), 'size': len(content), 'dtype': 'float16'}
            facts['parameters'] = sum(parameter.numel() for parameter in model.parameters())
            _write_json(new / RESULTS, {'model': name, 'weights': facts, 'training': training, 'measurements': kept})
            if kept and (folder / FLAGS).is_dir():
                shutil.copytree(folder / FLAGS, new / FLAGS)
            if kept and (folder / 'adversarial.png').is_file():
                shutil.copyfile(folder / 'adversarial.png', new / 'adversarial.png')
    return folder


def _check_name(run: Path, recipe: Recipe, name: str) -> None:
    """Refuse a name that tells of another network, norm or data set, and a network that was changed.

    Raises:
        ValueError: saying what the run trained.
    """
    (arch, tag), norm = split_name(name), recipe.norm.lower()
    if recipe.model.partition('.')[0] != arch or not tag.endswith(f'_{norm}'):
        raise ValueError(f'{run} trained {recipe.model} against {recipe.norm}; {name} names another model or norm')
    named, data_set = tag.split('_')[-2], recipe.dataset.rpartition('/')[2]
    if not is_named_by_folder(recipe.dataset) and named != data_set:
        raise ValueError(f'{run} trained on {data_set}, {name} names {named}; call it {arch}.METHOD_{data_set}_{norm}')
    if recipe.act or (recipe.model_kwargs and is_ours(name)):
        changed = recipe.model_kwargs | ({'act': recipe.act} if recipe.act else {})
        raise ValueError(f'{run} changed {arch} by {changed}; a release is the network of that name, unchanged')


def stored_weights(run: Path) -> dict[str, torch.Tensor]:
    """The best weights of a run as a release stores them."""
    return stored(read_weights(run / BEST))


def _start_of(recipe: Recipe) -> str | None:
    """The weights that training began from, as typed, or timm's as the Hub calls them; None for random ones."""
    if recipe.initial_checkpoint or not recipe.pretrained:
        return recipe.initial_checkpoint
    cfg = timm.get_pretrained_cfg(recipe.model)
    return f'{recipe.model.partition(".")[0]}.{cfg.tag}' if cfg and cfg.tag else recipe.model


def _license_of_start(run: Path, recipe: Recipe) -> str:
    """The licence of weights that nobody named one for: that of those that training began from.

    Raises:
        ValueError: if it is not known.
    """
    start = _start_of(recipe)
    if start is None or is_ours(start) or _is_release(Path(start)):
        return LICENSE
    found = None if recipe.initial_checkpoint else getattr(timm.get_pretrained_cfg(recipe.model), 'license', None)
    if found in (None, 'unknown'):
        raise ValueError(
            f'{run} began from {Path(start).name}, whose licence is not known here; name that of the new weights, '
            f'such as --license {LICENSE}'
        )
    return str(found)


def _is_release(folder: Path) -> bool:
    """Whether a folder holds the weights of a release of ours, by their SHA-256."""
    release = RELEASES.get(folder.name)
    return release is not None and (folder / WEIGHTS).is_file() and sha256(folder / WEIGHTS) == release.sha256


def _found_split(run: Path, recipe: Recipe, state: dict[str, Any]) -> str | None:
    """The split that val_split 'auto' found beside the training pictures; None: they were drawn, or none were."""
    folder = recipe.dataset in ('', 'folder') and VALIDATION in state.get('images', ())
    return 'validation' if folder and not (run / HELD_OUT_NAMES).is_file() else None


def _training_facts(name: str, state: dict[str, Any], last: dict[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """What results.json says of a training, from its best checkpoint and its last one."""
    closing = state['history'][-1] if state['history'] else {}
    best = {key: closing[key] for key in ('val_clean_acc', 'val_pgd_acc') if key in closing}
    return {
        'recipe': name,
        'epoch': state['epoch'],
        'weights': 'ema' if state.get('state_dict_ema') is not None else 'last step of the epoch',
        **best,
        'epochs': last['epoch'] + 1,
        'steps': last['step'],
        'images': last['history'][-1]['images'],
        'seconds': round(last['seconds'], 1),
        'images_per_s': round(statistics.median(row['images_per_s'] for row in last['history']), 1),
        'rollbacks': last['rollbacks'],
        'changes': state.get('changes', []),
        'origins': last['origins'],
        'notes': list(notes),
    }


def measure(
    folder: Path,
    data: Any,
    note: str | None = None,
    progress: Any = None,
    device: torch.device | str = 'cpu',
    world: World | None = None,
    eps: float | str | None = None,
    **settings: Any,
) -> None:
    """Measure staged weights exactly as stored, and keep the record and the verdict on every image.

    Args:
        folder: model_cards/<name>.
        data: the split, as load_dataset gives it.
        note: what the reader must know of these images.
        progress: called with lines of text.
        device: where the model runs.
        world: the processes that share AutoAttack's batches out; the first keeps the record.
        eps: radius, such as '8/255'; None: that of the measurements before, or else of training.
        settings: of `evaluate`; the norm is that of training.

    Raises:
        ValueError: for training images, for others than those measured before, and if the weights change meanwhile.
    """
    before, n = read_results(folder), settings.get('n')
    verify(folder, before, f'{settings.get("attack", "autoattack")}_{len(data) if n is None else n}')
    name, hyper = before['model'], read_hyper(folder)
    if eps is None:
        eps = next((result.eps for result in results_of(before) if result.attack != 'none'), hyper['eps'])
    threat_model = ThreatModel(hyper['norm'], parse_eps(eps))
    threat_model.check_scale()
    check_alike(before, hyper, data.name, settings.get('split', 'test'), threat_model)
    check_output(folder / RESULTS)
    if settings.get('attack', 'autoattack') != 'none':
        new_figure(1, 1)  # says now that matplotlib is missing, not hours later
    model = load_model(folder, device=device)
    result, tensors = evaluate(model, data, threat_model, name=name, progress=progress, world=world, **settings)
    if world is not None and world.rank:
        return
    if progress is not None:  # where the disk refuses, the log has it
        progress(result.to_line())
    with one_writer(folder.parent):  # another measurement may end at the same time
        record = read_results(folder)
        if record['weights'] != before['weights']:
            raise ValueError(f'{folder} got other weights while these were measured; type the same again')
        check_alike(record, hyper, result.dataset, result.split, threat_model)
        verdicts = verdicts_file(folder, result)
        verdicts.parent.mkdir(exist_ok=True)
        with atomic_file(verdicts) as file:
            arrays: dict[str, Any] = {item: value.cpu().numpy() for item, value in tensors.items() if value.ndim == 1}
            np.savez_compressed(file, **arrays)
        measurements = [item for item in record['measurements'] if item['key'] != verdicts.stem]
        measurements.append({'key': verdicts.stem, 'note': note, 'result': result})
        record['measurements'] = sorted(measurements, key=lambda item: (item['result'].attack, item['result'].n))
        _write_json(folder / RESULTS, record)
        forget_sum(folder, verdicts.relative_to(folder).as_posix())
        if strongest(results_of(record)) is result:
            x_adv, labels, y = (tensors[item][:_PICTURED].cpu() for item in ('x_adv', 'y_pred_adv', 'y'))
            x = data.pixels(slice(0, len(y))).cpu()
            adversarial_figure(
                folder / 'adversarial.png', x, y, {name: (x_adv, labels)}, result.classes or data.classes, threat_model
            )


def render(cards: Path = CARDS, table: Path = TABLE, recipes: Path | None = None) -> list[Path]:
    """Write every card, every SHA256SUMS, the table of releases and RESULTS.md from what was measured.

    Nothing is written if weights or verdicts are not those of the records, of SHA256SUMS and of the table.

    Args:
        cards: the folder of staged models.
        table: releases.json of the package; repository and commit of known releases stay as long as the weights do.
        recipes: the folder of recipes, of which RESULTS.md lists those that have not run.

    Returns:
        The folders.

    Raises:
        ValueError, FileNotFoundError: naming what differs.
    """
    with one_writer(cards):
        folders = _render(cards, table, recipes)
        for folder in folders:
            check(folder)
        return folders


def _render(cards: Path, table: Path, recipes: Path | None) -> list[Path]:
    """What `render` does while no other command writes."""
    folders = sorted(path.parent for path in cards.glob(f'*/{RESULTS}'))
    known = read_table(table) if table.is_file() else {}
    releases = dict(known)  # those without a folder here stay
    records = [read_results(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        verify(folder, record)
        check_sums(folder, record, known.get(record['model']))
    readme = cards.parent / 'README.md'
    before, start, rest = (readme.read_text(encoding='utf-8') if readme.is_file() else '').partition(README_START)
    if start and README_END not in rest:
        raise ValueError(f'{readme} has {README_START}, but {README_END} is missing after it; put it there')
    for folder, record in zip(folders, records, strict=True):
        name, weights, best = record['model'], record['weights'], strongest(results_of(record))
        accuracy = best.autoattack_acc if best else None
        old = known.get(name)
        kept = old if old is not None and old.sha256 == weights['sha256'] else None
        releases[name] = Release(
            name,
            weights['sha256'],
            weights['size'],
            accuracy,
            old.repo if old else f'{ORGANISATION}/{name}',
            kept.commit if kept else None,
        )
        _add_robustness(folder, record)
        write_text(folder / 'README.md', model_card(folder))
        write_text(folder / 'SHA256SUMS', sums_of(folder))
    write_table(releases, table)
    write_text(cards / 'RESULTS.md', results_page(cards, recipes))
    if start:
        after = rest.partition(README_END)[2]
        table_lines = weights_table([record for record in records if is_ours(record['model'])])
        write_text(readme, '\n'.join([before + README_START, *table_lines, README_END + after]))
    return folders


def _add_robustness(folder: Path, record: dict[str, Any]) -> None:
    """The robustness block of config.json: what the strongest measurement found."""
    path = folder / 'config.json'
    config, best = read_object(path), strongest(results_of(record))
    keys = ('dataset', 'split', 'n', 'norm', 'eps_text', 'attack', 'clean_acc', 'pgd_acc', 'apgd_acc', 'autoattack_acc')
    config['robustness'] = {key: getattr(best, key) for key in keys} if best else None
    write_text(path, json.dumps(config, indent=2))


def _license() -> str:
    """The text of the package's licence."""
    files = [(CHECKOUT or PACKAGE) / 'LICENSE']
    with suppress(metadata.PackageNotFoundError):  # run from a checkout
        files += [Path(str(file.locate())) for file in metadata.files('timm-robust') or [] if file.name == 'LICENSE']
    for file in files:
        if file.is_file():
            return file.read_text()
    raise FileNotFoundError('the LICENSE of timm-robust is missing; install the package again')


def _write_json(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=2, allow_nan=False, default=asdict) + '\n')
