"""The page itself: Gradio's components, what a press of a button calls, and what it may not do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..data import CIFAR10_CLASSES, ImageData
from ..threat_model import NORMS, ThreatModel
from .markup import CSS, curves, example_css, outcomes, records, refusal
from .outcome import ATTACKS, accuracy_curve, compare
from .pictures import FORMATS, classes_of, example, example_data, read_picture

TITLE = 'timm-robust: one picture, an attack, networks side by side'
SEEN = 'what each network sees in it'
_SLIDERS = {'Linf': (8, 32, 0.5), 'L2': (128, 512, 8)}  # value, maximum, step; in 255ths


@dataclass(frozen=True)
class Shown:
    """What the page is about, and what it answers.

    Args:
        models: title -> model, as load_model gives it.
        data: images for accuracy over eps.
        measured: title -> rows of recorded measurements.
    """

    models: dict[str, nn.Module]
    data: ImageData = field(default_factory=example_data)
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def attack(self, upload: str | None, name: str, norm: str, eps: float | None, method: str, label: str) -> str:
        """The pictures of all models as HTML, or what is wrong with what was given.

        Args:
            upload: file of the visitor's; None: the example.
            name: class of the example.
            norm: of the perturbation.
            eps: radius in 255ths.
            method: a key of ATTACKS.
            label: class in an upload, or SEEN.
        """
        try:
            if upload:
                picture, said = read_picture(upload)
                truth = None if label == SEEN else label
                note = f'Your picture{f", {said}" if said else ""}: {picture.width} x {picture.height} pixels.'
            elif name in CIFAR10_CLASSES:
                picture, truth = example(CIFAR10_CLASSES.index(name)), name
                note = f'CIFAR-10 test image of class {name}, 32 x 32 pixels.'
            else:
                raise ValueError(f'example {name!r} is unknown; allowed: {", ".join(CIFAR10_CLASSES)}')
            if eps is None:
                raise ValueError('eps is empty; allowed: a number of 255ths, such as 8')
            threat_model = ThreatModel(norm, eps / 255)
            found = {
                title: compare(model, picture, threat_model, method, truth) for title, model in self.models.items()
            }
        except ValueError as error:
            return refusal(error)
        return outcomes(found, method, note)

    def curve(self, norm: str) -> Iterator[str]:
        """Accuracy of each model over eps as HTML, one point more each time."""
        found: dict[str, Sequence[tuple[float, int]]] = {}
        try:
            ThreatModel(norm)
            for title, model in self.models.items():
                for points in accuracy_curve(model, self.data, norm):
                    found[title] = points
                    yield curves(found, len(self.data), norm, self.data.name)
        except ValueError as error:
            yield refusal(error)


def build_page(shown: Shown) -> tuple[Any, dict[str, Any]]:
    """Gradio's Blocks, not served yet, and how it looks, as arguments of its launch.

    Raises:
        ImportError: if Gradio is missing, with what to type.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the page needs gradio; type: pip install 'gradio>=6.31'") from error
    classes = dict.fromkeys(name for model in shown.models.values() for name in classes_of(model))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f'# {TITLE}\nChanges too small to see turn the answer of a standard network around; a robust one was '
            'trained on such pictures, and gives way later.'
        )
        with gr.Tab('Attack a picture'), gr.Row():
            with gr.Column(scale=1, min_width=300):
                examples = gr.Radio(
                    list(CIFAR10_CLASSES),
                    value=CIFAR10_CLASSES[0],
                    label='Example (CIFAR-10 test images)',
                    elem_id='examples',
                )
                upload = gr.File(label='or your own picture', file_types=['image'], elem_id='upload', height=140)
                gr.Markdown(
                    f'{", ".join(FORMATS)}. Each network sees it resized and cropped to its own size: one for 32 x 32 '
                    'pixels sees no more than those.'
                )
                _refuse_links(gr, upload)
                label = gr.Dropdown([SEEN, *classes], value=SEEN, label='what your picture shows', elem_id='label')
                norm = gr.Radio(list(NORMS), value='Linf', label='norm', elem_id='norm')
                eps = _slider(gr, 'Linf')
                method = gr.Dropdown(list(ATTACKS), value=next(iter(ATTACKS)), label='attack', elem_id='method')
                button = gr.Button('Attack', variant='primary', elem_id='attack')
            with gr.Column(scale=3):
                result = gr.HTML(elem_id='result')
        with gr.Tab('Accuracy over eps'):
            gr.Markdown(
                'What was recorded on the first images of the CIFAR-10 test split, with one standard error. No curve '
                'over eps was recorded: it is measured when you ask for it.'
            )
            gr.HTML(records(shown.measured), elem_id='records')
            curve_norm = gr.Radio(list(NORMS), value='Linf', label='norm')
            measure = gr.Button(f'Measure PGD-10 on {len(shown.data)} images', elem_id='measure')
            curve = gr.HTML(elem_id='curve')
        given = [upload, examples, norm, eps, method, label]
        called: dict[str, Any] = {'fn': shown.attack, 'inputs': given, 'outputs': result, 'concurrency_id': 'compute'}
        gr.on([button.click, upload.upload, page.load], api_name='attack', api_visibility='undocumented', **called)
        private: dict[str, Any] = {'api_visibility': 'private'}
        examples.input(lambda: None, None, upload, **private).then(**called, **private)  # the last choice counts
        norm.change(lambda norm: _slider(gr, norm), norm, eps, **private)
        measure.click(
            shown.curve,
            curve_norm,
            curve,
            api_name='curve',
            api_visibility='undocumented',
            concurrency_id='compute',
        )
    page.queue(max_size=20, default_concurrency_limit=1)
    return page, {
        'css': f'{CSS}\n{example_css()}',
        'theme': gr.themes.Default(font='sans-serif', font_mono='monospace'),
    }


def _slider(gr: Any, norm: str) -> Any:
    """The radius, in the range that is usual for a norm."""
    value, most, step = _SLIDERS[norm]
    return gr.Slider(step, most, value=value, step=step, label=f'eps, {norm}, in 255ths of the range', elem_id='eps')


def _refuse_links(gr: Any, upload: Any) -> None:
    """Take no address for a file: Gradio would fetch it."""
    keep = upload.async_move_resource_to_block_cache

    async def checked(path: str | Path | None) -> str | None:
        if path is not None and not Path(path).is_file():
            raise gr.Error('an upload is a file, not an address', print_exception=False)
        return await keep(path)

    upload.async_move_resource_to_block_cache = checked
