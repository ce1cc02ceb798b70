"""Figures that show images: adversarial examples, and decision planes (the paper's Figure 4)."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from matplotlib.patheffects import withStroke

from ensadv.report import drawing
from ensadv.storage import plane_files

# Tol's light scheme and a purple: dots and arrows show on all of them, and none is near dark grey.
_CLASS_COLORS = (
    '#77AADD', '#EE8866', '#EEDD88', '#FFAABB', '#44BB99',
    '#DDDDDD', '#AAAA00', '#99DDFF', '#BBCC33', '#AA88CC',
)  # fmt: skip
_VOID_COLOR = '#444444'
_ATTACK_COLOR = '#CC0000'
_CASED = [withStroke(linewidth=2.0, foreground=_VOID_COLOR)]  # of a light line
# In inches: an image's longer side, between two of a system, between systems; a line of text.
_SIDE, _BETWEEN, _GAP, _LINE = 0.66, 0.05, 0.13, 0.13


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
    head = 0.32 + _LINE * max(map(len, headings.values()))
    foot = 0.31
    notes = textwrap.wrap(in_grey(channels), int(width / drawing.LETTER))
    height = math.ceil(len(columns) / across) * (head + m * (tall + foot)) + _LINE * len(notes)
    figure = drawing.new_figure(width, height, layout='none')
    top = 0.0
    for start in range(0, len(columns), across):
        block = list(columns)[start : start + across]
        top += head
        for i in range(m):
            axes = _add_axes(figure, 0.05, top, _SIDE, tall)
            _draw_image(axes, clean[i])
            name = drawing.shortened(_class_name(labels[i], class_names), _SIDE + 0.1)
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
    _draw_image(panels[0], adversarial)
    _draw_image(panels[1], 0.5 + 0.5 / epsilon * (adversarial - clean / np.float32(255)))


def _predictions(
    column: ExampleColumn, i: int, label: int, names: Sequence[str] | None, width: float
) -> list[tuple[str, str]]:
    """Returns (text, colour) of a system's predictions before and after the attack."""
    lines = []
    for arrow, probs in (('', column.clean_probs[i]), ('→ ', column.adversarial_probs[i])):
        predicted = int(np.argmax(probs))
        mark, color = _verdict(predicted, label)
        share = f'({100 * probs[predicted]:.0f} %)'
        # Signs, spaces and the share take the width of a dozen letters.
        name = drawing.shortened(_class_name(predicted, names), width + _GAP - 12 * drawing.LETTER)
        lines.append((f'{arrow}{mark} {name} {share}', color))
    return lines


def _add_axes(figure: Figure, left: float, top: float, wide: float, tall: float) -> Axes:
    """Adds a panel, at inches from the left and the top of the figure, in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))


def _draw_image(axes: Axes, image: np.ndarray) -> None:
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


def _class_name(number: int, names: Sequence[str] | None) -> str:
    return names[number] if names else str(number)


def _verdict(predicted: int, label: int) -> tuple[str, str]:
    return ('✓', drawing.RIGHT) if predicted == label else ('✗', drawing.WRONG)


def draw_planes(file: epath.Path) -> None:
    """Draws decision planes beside their file, and tells the user.

    Args:
      file: planes/<name>.npz of a run.
    """
    made = plane_files.read(file)
    drawing.save(planes(made), file.with_suffix(''))
    for place, note in zip(made.places, made.notes, strict=True):
        if note:
            print(f'image {place}: {note}')
    for suffix in ('.npz', '.png', '.pdf'):
        print(file.with_suffix(suffix))


@drawing.in_style
def planes(planes: plane_files.Planes) -> Figure:
    """Draws decision regions around images (the paper's Figure 4).

    Images are columns and models rows. A class has one colour in every panel; with at most ten
    classes, in every figure; with more, those that occur take the ten colours in turn, darker
    from the eleventh on.

    Args:
      planes: its record may name the classes, in 'class_names'.
    """
    m, rows = len(planes.images), len(planes.names)
    side = np.clip((drawing.PAGE - 0.75) / m - 0.3, 0.8, 1.9)  # of a panel, in inches
    symbols = _plane_symbols(planes)
    room = drawing.legend_width([symbol.get_label() for symbol in symbols])
    width = max(drawing.COLUMN, 0.75 + m * (side + 0.3), min(room, drawing.PAGE))
    names, colors = planes.record.get('class_names'), _class_colors(planes)
    legends = [
        (handles, drawing.legend_columns([handle.get_label() for handle in handles], width, most))
        for handles, most in ((_class_patches(planes, colors), 6), (symbols, 2))
    ]
    noted = zip(planes.places, planes.notes, strict=True)
    notes = [in_grey(planes.images.shape[-1])]
    notes += [f'Test image {place}: {note}' for place, note in noted if note]
    lines = [line for note in notes for line in textwrap.wrap(note, int(width / drawing.LETTER))]
    # From the bottom, in inches: the notes, the legends, the axes' label, the panels.
    tall = [0.1 + 0.15 * math.ceil(len(handles) / columns) for handles, columns in legends]
    place = 0.05 + _LINE * len(lines) + sum(tall)
    height = place + 1.2 + rows * (side + 0.36)
    figure = drawing.new_figure(width, height)
    bottom = (place + 0.17) / height
    figure.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))
    figure.text(0.1 / width, 0.03 / height, '\n'.join(lines), va='bottom')
    text = 'both axes: L₂ distance from the image (pixel values in [0, 1])'
    figure.text(0.5, (place + 0.03) / height, text, va='bottom', ha='center')
    for (handles, columns), each in zip(legends, tall, strict=True):
        at = (0.5, place / height)
        figure.legend(handles=handles, ncols=columns, loc='upper center', bbox_to_anchor=at)
        place -= each
    panels = figure.subplots(1 + rows, m, squeeze=False, height_ratios=[0.55, *[side] * rows])
    for i, (thumbnail, *models) in enumerate(panels.T):
        _draw_image(thumbnail, planes.images[i])
        name = drawing.shortened(_class_label(planes.labels[i], names), side + 0.3)
        thumbnail.set_title(f'test image {planes.places[i]}\n{name}')
        for r, axes in enumerate(models):
            _draw_plane(axes, planes, i, r, colors)
    for axes, name in zip(panels[1:, 0], planes.names, strict=True):
        axes.set_ylabel(_model_label(name, side + 0.36), weight='bold')
    return drawing.fix_layout(figure)


def _model_label(name: str, width: float) -> str:
    """Returns a model's name in lines of this width in inches: what it is, and the seed."""
    letters = int(width / drawing.BOLD_LETTER)
    return '\n'.join(line for part in name.split(', ') for line in textwrap.wrap(part, letters))


def _class_label(number: int, names: Sequence[str] | None) -> str:
    """Returns a class's name; of one that has but a number, which alone could be anything."""
    name = _class_name(number, names)
    return f'class {name}' if name == str(number) else name


def _draw_plane(
    axes: Axes, planes: plane_files.Planes, i: int, r: int, colors: Mapping[int, str]
) -> None:
    """Draws the i-th image's plane as the r-th model sees it."""
    classes = planes.classes[i, r]
    shown = np.empty((*classes.shape, 3))
    for number, color in colors.items():
        shown[classes == number] = to_rgb(color)
    axes.imshow(shown, extent=planes.extent[i], origin='lower', interpolation='nearest')
    axes.grid(visible=False)
    axes.locator_params(nbins=4)
    region = planes.region[i][np.isfinite(planes.region[i]).all(axis=1)]
    axes.add_patch(
        Polygon(region, fill=False, edgecolor='white', lw=1.0, path_effects=_CASED, zorder=2)
    )
    image, first, second = planes.points[i]
    same = np.array_equal(first, second)
    for text, end in (('1, 2', first),) if same else (('1', first), ('2', second)):
        if not np.array_equal(end, image):
            arrow = {'arrowstyle': '-|>', 'color': _ATTACK_COLOR, 'lw': 1.0, 'shrinkA': 0}
            axes.annotate('', end, image, arrowprops={**arrow, 'shrinkB': 2, 'mutation_scale': 7})
        axes.plot(*end, 'o', color=_ATTACK_COLOR, ms=3.5, mec='white', mew=0.4)
        axes.annotate(
            text,
            end,
            5 * np.where(end < image, -1, 1) - (0, 2.5),
            textcoords='offset points',
            ha='center',
            weight='bold',
            path_effects=[withStroke(linewidth=1.5, foreground='white')],
        )
    axes.plot(*image, 'o', color='black', ms=3.5, mec='white', mew=0.4)
    marks = [_verdict(c, planes.labels[i])[0] for c in planes.point_classes[i, r]]
    axes.set_title('image {}   1 {}   2 {}'.format(*marks))


def _class_colors(planes: plane_files.Planes) -> dict[int, str]:
    """Returns the colours of the classes that occur, and of VOID."""
    found = {int(c) for array in (planes.classes, planes.point_classes) for c in np.unique(array)}
    classes = sorted(found - {plane_files.VOID})
    ten = len(_CLASS_COLORS)
    if max(classes, default=0) < ten:
        colors = {c: _CLASS_COLORS[c] for c in classes}
    else:
        shades = [np.array(to_rgb(color)) for color in _CLASS_COLORS]
        colors = {
            c: to_hex(shades[place % ten] * 0.75 ** (place // ten))
            for place, c in enumerate(classes)
        }
    return colors | ({plane_files.VOID: _VOID_COLOR} if plane_files.VOID in found else {})


def _class_patches(planes: plane_files.Planes, colors: Mapping[int, str]) -> list[Patch]:
    """Returns the legend of the classes that occur."""
    names = planes.record.get('class_names')
    patches = [
        Patch(facecolor=color, label=_class_label(c, names))
        for c, color in colors.items()
        if c != plane_files.VOID
    ]
    if plane_files.VOID in colors:
        patches.append(Patch(facecolor=_VOID_COLOR, label='outside [0, 1]'))
    return patches


def _plane_symbols(planes: plane_files.Planes) -> list[Line2D]:
    """Returns the legend of what is drawn on the classes."""
    red = {'color': _ATTACK_COLOR, 'ls': '-', 'marker': 'o'}
    return [
        Line2D([], [], color='black', ls='', marker='o', label='the image'),
        Line2D([], [], color='white', path_effects=_CASED, label='permitted region'),
        *(
            Line2D([], [], label=f'{k}: adversarial example of {who}', **red)
            for k, who in enumerate(planes.attacked, 1)
        ),
    ]
