"""Networks registered in timm's way: one tag a release in default_cfgs, and pretrained=True, with the checked bytes."""

import sys
from typing import Any, Callable, Dict, NamedTuple

import safetensors.torch
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from ..weights import EXTERNAL, RELEASES, STAGED, WEIGHTS, external_file, read_release, releases_of
from .config import SOURCES, forget_weights


class Network(NamedTuple):
    """A network to register: its pretrained_cfg without weights, make(name, pretrained, **kwargs), and what it is."""

    cfg: Dict[str, Any]
    make: Callable[..., nn.Module]
    doc: str


def register_family(module: str, networks: Dict[str, Network]) -> None:
    """Register networks with timm, with their releases, in the module that makes them, which gets their factories.

    `<arch>_<dataset>_<norm>` stands for the most robust release of a network for that data set and norm: RobustBench's
    load_model('<arch>', dataset, threat_model) asks timm for that name.

    Args:
        module: its `__name__`.
        networks: name of an architecture -> the network.
    """
    entries: Dict[str, Any] = {}
    for arch, network in networks.items():
        entries.update(_tagged(arch, network.cfg))
    vars(sys.modules[module])['default_cfgs'] = generate_default_cfgs(entries)  # register_model reads it there
    for arch, network in networks.items():
        factory = _factory(arch, network)
        _register(module, arch, factory, network.doc)
        for release in releases_of(arch):  # the most robust first
            name = f'{arch}_{"_".join(release.tag.split("_")[-2:])}'
            if name not in vars(sys.modules[module]):
                _register(module, name, _alias(factory, release.tag), f'{release.name}, as RobustBench asks for it.')


def _factory(arch: str, network: Network) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return forget_weights(network.make(arch, pretrained, **_with_weights(arch, pretrained, kwargs)))

    return create


def _alias(factory: Callable[..., nn.Module], tag: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        return factory(pretrained, pretrained_cfg=pretrained_cfg or tag, **kwargs)

    return create


def _register(module: str, name: str, factory: Callable[..., nn.Module], doc: str) -> None:
    """Register a factory with timm as if it stood in the module under this name."""
    factory.__name__ = factory.__qualname__ = name
    factory.__module__, factory.__doc__ = module, doc
    setattr(sys.modules[module], name, register_model(factory))


def _tagged(arch: str, cfg: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """What generate_default_cfgs takes for a network: one entry a release, the default first; or one without a tag."""
    entries = {}
    for release in releases_of(arch):
        hub = f'{release.repo}@{release.commit}' if release.commit else release.repo
        entries[release.name] = {**cfg, 'hf_hub_id': hub}
    entries = entries or {arch: cfg}
    for name, (entry, drive_id) in EXTERNAL.items():
        if name.partition('.')[0] == arch:
            path, where = STAGED / name / WEIGHTS, (f'RobustBench {entry}, Google Drive {drive_id}',)
            entries[name] = {**cfg, 'notes': where, 'file': str(path) if path.is_file() else None}
    return entries


def _with_weights(arch: str, pretrained: bool, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of build_model_with_cfg, with the released weights where those are asked for.

    They are handed over as tensors, made of the bytes whose SHA-256 was checked: a file could be another one when timm
    opens it. `forget_weights` takes them out of the model's pretrained_cfg again.

    Weights of the user's own (a `pretrained_cfg` of theirs, or a file, url, hf_hub_id or state_dict in
    `pretrained_cfg_overlay`) are left to timm.

    Raises:
        RuntimeError: if the network has no released weights, or none of that tag.
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `download.read_release`.
    """
    cfg, overlay = kwargs.get('pretrained_cfg'), dict(kwargs.get('pretrained_cfg_overlay') or {})
    if not pretrained or (cfg and not isinstance(cfg, str)) or any(overlay.get(key) for key in SOURCES):
        return kwargs
    tag = resolve_pretrained_cfg(arch, cfg).tag
    name = f'{arch}.{tag}'
    if name in EXTERNAL:
        return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'file': str(external_file(name))}}
    if name not in RELEASES:
        names = [release.name for release in releases_of(arch)] or sorted(RELEASES)
        raise RuntimeError(
            f'No pretrained weights exist for {arch}; released are {", ".join(names) or "none yet"}'
            '. Train it with timm-robust train and one of its recipes, or pass weights of your own: '
            'pretrained_cfg_overlay=dict(file=PATH)'
        )
    weights = safetensors.torch.load(read_release(RELEASES[name]))
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'state_dict': weights}}
