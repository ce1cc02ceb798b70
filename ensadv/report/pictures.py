"""Images, and the figure that shows adversarial examples."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ensadv.report import drawing

# In inches: an image's longer side, between two of a system, between systems; a line of text.
_SIDE, _BETWEEN, _GAP, LINE = 0.66, 0.05, 0.13, 0.13


def in_grey(channels: int) -> str:
    """Returns a sentence that says how images of so many channels are drawn; '' if as they are."""
    if channels in (1, 3):
        return ''
    return f'Images have {channels} channels; their mean is drawn in grey.'


class ExampleColumn(NamedTuple):
    """What one system makes of the images: probabilities before and after the attack."""

    adversarial: np.ndarray  # float [m, H, W, C] in [0, 1]
    clean_probs: np.ndarray  # float [m, classes]
    adversarial_probs: np.ndarray  # float [m, classes]


@drawing.in_style
def examples(
    clean: np.ndarray,
    labels: np.ndarray,
    columns: Mapping[str, ExampleColumn],
    *,
    epsilon: float,
    attack: str,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draws images, their adversarial examples and perturbations, and what systems predict.

    More than four systems are drawn in several blocks, one beneath another.

    Args:
      clean: uint8 [m, H, W, C]; unless C is 3, the mean of the channels is drawn, in grey.
      labels: int [m].
      columns: by system.
      epsilon: the threat model's, for pixels in [0, 1]; perturbations are magnified so that
        -epsilon is black and +epsilon white.
      attack: its name.
      class_names: by class; None: numbers.
    """
    across = math.ceil(len(columns) / math.ceil(len(columns) / 4))
    m, *size, channels = clean.shape
    tall = _SIDE * np.clip(size[0] / size[1], 0.1, 1)
    pair = 2 * _SIDE + _BETWEEN
    width = 0.1 + _SIDE + across * (_GAP + pair)
    headings = {
        system: textwrap.wrap(system, int((pair + _GAP) / drawing.BOLD_LETTER))
        for system in columns
    }
    # Above the images of a block, and below each.
    head = 0.32 + LINE * max(map(len, headings.values()))
    foot = 0.31
    notes = textwrap.wrap(in_grey(channels), int(width / drawing.LETTER))
    height = math.ceil(len(columns) / across) * (head + m * (tall + foot)) + LINE * len(notes)
    figure = drawing.new_figure(width, height, layout='none')
    top = 0.0
    for start in range(0, len(columns), across):
        block = list(columns)[start : start + across]
        top += head
        for i in range(m):
            axes = _add_axes(figure, 0.05, top, _SIDE, tall)
            draw_image(axes, clean[i])
            name = drawing.shortened(class_name(labels[i], class_names), _SIDE + 0.1)
            _write_below(axes, 0.05 + _SIDE / 2, top + tall, [(name, 'black')])
            if i == 0:
                axes.set_title('image')
            for c, system in enumerate(block):
                left = 0.05 + _SIDE + _GAP + c * (pair + _GAP)
                places = (left, left + _SIDE + _BETWEEN)
                panels = [_add_axes(figure, place, top, _SIDE, tall) for place in places]
                _draw_example(panels, columns[system], i, clean[i], epsilon)
                lines = _predictions(columns[system], i, labels[i], class_names, pair)
                _write_below(panels[0], left + pair / 2, top + tall, lines)
                if i == 0:
                    panels[0].set_title(f'adversarial\n({attack})')
                    panels[1].set_title(f'perturbation\n×{0.5 / epsilon:.2g}')
                    heading = '\n'.join(headings[system])
                    at = (left + pair / 2, top - 0.29)
                    _write(panels[0], at, heading, va='bottom', weight='bold')
            top += tall + foot
    figure.text(0.05 / width, 0.03 / height, '\n'.join(notes), va='bottom')
    return figure


def _draw_example(
    panels: Sequence[Axes], column: ExampleColumn, i: int, clean: np.ndarray, epsilon: float
) -> None:
    """Draws a system's i-th adversarial example and what it changed."""
    adversarial = column.adversarial[i]
    draw_image(panels[0], adversarial)
    draw_image(panels[1], 0.5 + 0.5 / epsilon * (adversarial - clean / np.float32(255)))


def _predictions(
    column: ExampleColumn, i: int, label: int, names: Sequence[str] | None, width: float
) -> list[tuple[str, str]]:
    """Returns (text, colour) of a system's predictions before and after the attack."""
    lines = []
    for arrow, probs in (('', column.clean_probs[i]), ('→ ', column.adversarial_probs[i])):
        predicted = int(np.argmax(probs))
        mark, color = verdict(predicted, label)
        share = f'({100 * probs[predicted]:.0f} %)'
        # Signs, spaces and the share take the width of a dozen letters.
        name = drawing.shortened(class_name(predicted, names), width + _GAP - 12 * drawing.LETTER)
        lines.append((f'{arrow}{mark} {name} {share}', color))
    return lines


def _add_axes(figure: Figure, left: float, top: float, wide: float, tall: float) -> Axes:
    """Adds a panel, at inches from the left and the top of the figure, in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))


def draw_image(axes: Axes, image: np.ndarray) -> None:
    """Draws an image [H, W, C], uint8 or float in [0, 1]; see `in_grey`."""
    if image.dtype == np.uint8:
        image = image / np.float32(255)
    if image.shape[-1] != 3:
        image = image.mean(axis=-1, keepdims=True)
    image = np.broadcast_to(image, (*image.shape[:-1], 3))
    axes.imshow(np.clip(image, 0, 1), interpolation='nearest')
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.4, color=drawing.GREY)


def _write_below(axes: Axes, x: float, top: float, lines: Sequence[tuple[str, str]]) -> None:
    """Writes lines of (text, colour) below a panel's end, centred at x, in inches."""
    for i, (text, color) in enumerate(lines):
        _write(axes, (x, top + 0.03 + 0.12 * i), text, va='top', color=color)


def _write(axes: Axes, at: tuple[float, float], text: str, **how) -> None:
    """Writes a text of a panel, centred at inches from the left and the top of the figure."""
    width, height = axes.figure.get_size_inches()
    place = (at[0] / width, 1 - at[1] / height)
    axes.annotate(text, place, xycoords='figure fraction', ha='center', **how)


def class_name(number: int, names: Sequence[str] | None) -> str:
    """Returns a class's name; of one that has none, its number."""
    return names[number] if names else str(number)


def verdict(predicted: int, label: int) -> tuple[str, str]:
    """Returns a tick or a cross, and its colour."""
    return ('✓', drawing.RIGHT) if predicted == label else ('✗', drawing.WRONG)
