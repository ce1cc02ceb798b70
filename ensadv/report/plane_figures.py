"""Decision planes: boundaries (the paper's Figure 3, measured) and regions (its Figure 4)."""

import itertools
import math
import string
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from matplotlib.path import Path
from matplotlib.patheffects import withStroke

from ensadv.report import drawing, pictures
from ensadv.storage import plane_files
from ensadv.storage.plane_files import Planes

# Tol's light scheme and a purple: dots and arrows show on all of them.
_CLASS_COLORS = (
    '#77AADD', '#EE8866', '#EEDD88', '#FFAABB', '#44BB99',
    '#DDDDDD', '#AAAA00', '#99DDFF', '#BBCC33', '#AA88CC',
)  # fmt: skip
_DIM, _DIMMED = '#444444', 0.65  # what lies outside of [0, 1] is mixed with this grey, to this part
_DARK = '#444444'
_ATTACK_COLOR = '#CC0000'
_CASED = [withStroke(linewidth=2.0, foreground=_DARK)]  # of a light line
_PERMITTED, _OUTSIDE = '#FFF3C4', '#E4E4E4'
# Of the ensemble or the only network, and of members, from 1: the paper's blue and green first.
_MODEL_COLORS = ('#000000', '#0072B2', '#009E73', '#CC79A7', '#E69F00')
_LARGEST_MARGIN = 50.0
_TALLEST = 5.8  # of all rows of panels, in inches


def draw(file: epath.Path) -> None:
    """Draws decision planes beside their file, and tells the user.

    Args:
      file: planes/<name>.npz of a run.
    """
    made = plane_files.read(file)
    drawing.save(regions(made), file.with_suffix(''))
    written = [file, *(file.with_suffix(suffix) for suffix in ('.png', '.pdf'))]
    if made.is_response:
        beside = file.with_name(f'{file.stem}_boundaries')
        drawing.save(boundaries([made]), beside)
        written += [beside.with_name(f'{beside.name}{suffix}') for suffix in ('.png', '.pdf')]
    for place, note in zip(made.places, made.notes, strict=True):
        if note:
            print(f'image {place}: {note}')
    print(*written, sep='\n')


@drawing.in_style
def regions(planes: Planes) -> Figure:
    """Draws decision regions around images (the paper's Figure 4).

    Images are columns and models rows. A class has one colour in every panel; with at most ten
    classes, in every figure; with more, those that occur take the ten colours in turn, darker
    from the eleventh on.

    Args:
      planes: its record may name the classes, in 'class_names'.
    """
    colors, rows = _class_colors(planes), planes.shown
    names = [planes.names[r].split(', ') for r in rows]
    figure, panels = _new(
        planes, names, [planes], [(_class_patches(planes, colors), 6), (_region_symbols(planes), 2)]
    )
    for r, row in zip(rows, panels, strict=True):
        for i, axes in enumerate(row):
            _draw_regions(axes, planes, i, r, colors)
    return drawing.fix_layout(figure)


@drawing.in_style
def boundaries(responses: Sequence[Planes]) -> Figure:
    """Draws what adversarial training does to decision boundaries (the paper's Figure 3, measured).

    Images are columns, and rows are pairs of a system trained cleanly and one trained
    adversarially. A boundary is between the image's label and all other classes.

    Args:
      responses: planes of the same images with the same window, all `is_response`.
    """
    names = []
    for letter, planes in zip(itertools.cycle(string.ascii_lowercase), responses):
        clean, other = (planes.names[r].split(', ') for r in planes.shown)
        seeds = dict.fromkeys(clean[1:] + other[1:])
        names.append([f'({letter}) {clean[0]}', f'→ {other[0]}', *seeds])
    members = max(int(planes.member.max()) for planes in responses)
    figure, panels = _new(responses[0], names, responses, [(_boundary_symbols(members), 3)])
    for planes, row in zip(responses, panels, strict=True):
        for i, axes in enumerate(row):
            _draw_boundaries(axes, planes, i)
    return drawing.fix_layout(figure)


def label_shares(planes: Planes, i: int) -> np.ndarray:
    """Returns the share of the i-th plane's permitted region that each row gives the label.

    Returns:
      float64 [rows], 0 to 1; NaN where the region holds no pixel's middle.
    """
    resolution = planes.classes.shape[-1]
    middles = float(planes.window) * ((np.arange(resolution) + 0.5) / resolution - 0.5)
    points = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
    corners = _region(planes, i)
    within = Path(corners).contains_points(points) if len(corners) > 2 else np.zeros(len(points))
    within = within.astype(bool).reshape(resolution, resolution)
    if not within.any():
        return np.full(len(planes.names), math.nan)
    return np.mean((planes.margins[i] > 0)[:, within], axis=1)


def _new(
    planes: Planes,
    names: Sequence[Sequence[str]],
    noted: Sequence[Planes],
    legends: Sequence[tuple[Sequence[Any], int]],
) -> tuple[Figure, np.ndarray]:
    """Begins a figure: the images above, the rows' names on the left, legends and notes below.

    Args:
      planes: of the images.
      names: of each row, in lines.
      noted: whose notes are written.
      legends: of each its handles, and the most columns.

    Returns:
      The figure, and its empty panels [rows, m].
    """
    m, rows = len(planes.images), len(names)
    side = np.clip((drawing.PAGE - 0.75) / m - 0.15, 0.8, 1.9)  # of a panel, in inches
    side = min(side, max(_TALLEST / rows, 1.2))
    labels = [[handle.get_label() for handle in handles] for handles, _ in legends]
    width = max(drawing.COLUMN, 0.75 + m * (side + 0.15))
    width = max(width, min(drawing.legend_width(labels[-1]), drawing.PAGE))
    columns = [
        drawing.legend_columns(texts, width, most)
        for texts, (_, most) in zip(labels, legends, strict=True)
    ]
    lines = [
        line for note in _notes(noted) for line in textwrap.wrap(note, int(width / drawing.LETTER))
    ]
    # From the bottom, in inches: the notes, the legends, the axes' label, the panels.
    tall = [
        0.1 + 0.15 * math.ceil(len(texts) / n) for texts, n in zip(labels, columns, strict=True)
    ]
    place = 0.05 + pictures.LINE * len(lines) + sum(tall)
    height = place + 1.3 + rows * (side + 0.25)
    figure = drawing.new_figure(width, height)
    bottom = (place + 0.17) / height
    figure.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))
    figure.text(0.1 / width, 0.03 / height, '\n'.join(lines), va='bottom')
    text = 'both axes: {}, in units of ε'.format(
        'L₂ distance from the image'
        if planes.record.get('norm') == 'l2'
        else 'root-mean-square change of the pixel values'
    )
    figure.text(0.5, (place + 0.03) / height, text, va='bottom', ha='center')
    for (handles, _), n, each in zip(legends, columns, tall, strict=True):
        at = (0.5, place / height)
        figure.legend(handles=handles, ncols=n, loc='upper center', bbox_to_anchor=at)
        place -= each
    panels = figure.subplots(1 + rows, m, squeeze=False, height_ratios=[0.55, *[side] * rows])
    of_classes = planes.record.get('class_names')
    for i, thumbnail in enumerate(panels[0]):
        pictures.draw_image(thumbnail, planes.images[i])
        name = drawing.shortened(_class_label(planes.labels[i], of_classes), side + 0.3)
        thumbnail.set_title(f'test image {planes.places[i]}\n{name}')
    for row, texts in zip(panels[1:], names, strict=True):
        letters = int((side + 0.2) / drawing.BOLD_LETTER)
        lines = [line for text in texts for line in textwrap.wrap(text, letters)]
        row[0].set_ylabel('\n'.join(lines), weight='bold')
    half = float(planes.window) / 2
    for axes in panels[1:].flat:
        axes.set(xlim=(-half, half), ylim=(-half, half), aspect='equal')
        axes.grid(visible=False)
        axes.locator_params(nbins=5)
        axes.label_outer()
    return figure, panels[1:]


def _notes(noted: Sequence[Planes]) -> list[str]:
    """Returns what is to be said of images and of planes that are degenerate."""
    notes = [pictures.in_grey(noted[0].images.shape[-1])]
    for planes in noted:
        system = f'{planes.attacked[-1]}: ' if len(noted) > 1 else ''
        pairs = zip(planes.places, planes.notes, strict=True)
        notes += [f'{system}Test image {place}: {note}' for place, note in pairs if note]
    return [note for note in notes if note]


def _class_label(number: int, names: Sequence[str] | None) -> str:
    """Returns a class's name; of one that has but a number, which alone could be anything."""
    name = pictures.class_name(number, names)
    return f'class {name}' if name == str(number) else name


def _region(planes: Planes, i: int) -> np.ndarray:
    return planes.region[i][np.isfinite(planes.region[i]).all(axis=1)]


def _extent(planes: Planes) -> tuple[float, float, float, float]:
    half = float(planes.window) / 2
    return (-half, half, -half, half)


def _draw_regions(axes: Axes, planes: Planes, i: int, r: int, colors: Mapping[int, str]) -> None:
    """Draws the i-th image's plane as the r-th model sees it."""
    classes = planes.classes[i, r]
    shown = np.empty((*classes.shape, 3))
    for number, color in colors.items():
        shown[classes == number] = to_rgb(color)
    outside = ~planes.inside[i]
    shown[outside] = dimmed(shown[outside])
    axes.imshow(shown, extent=_extent(planes), origin='lower', interpolation='nearest')
    region = {'fill': False, 'edgecolor': 'white', 'lw': 1.0, 'path_effects': _CASED, 'zorder': 2}
    axes.add_patch(Polygon(_region(planes, i), **region))
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
    marks = [pictures.verdict(c, planes.labels[i])[0] for c in planes.point_classes[i, r]]
    axes.set_title('image {}   1 {}   2 {}'.format(*marks))


def dimmed(colors: np.ndarray) -> np.ndarray:
    """Returns colours [..., 3] as they are drawn outside of [0, 1]."""
    return _DIMMED * colors + (1 - _DIMMED) * np.array(to_rgb(_DIM))


def _draw_boundaries(axes: Axes, planes: Planes, i: int) -> None:
    """Draws where on the i-th image's plane each model's decision for its label ends."""
    shown = np.where(planes.inside[i][..., None], 1.0, to_rgb(_OUTSIDE))
    axes.imshow(shown, extent=_extent(planes), origin='lower', interpolation='nearest')
    axes.add_patch(Polygon(_region(planes, i), facecolor=_PERMITTED, edgecolor='#B8A76A', lw=0.6))
    resolution = shown.shape[0]
    middles = float(planes.window) * ((np.arange(resolution) + 0.5) / resolution - 0.5)
    for r in np.lexsort([~planes.clean, planes.member == 0]):  # ensembles lie above members
        margin = np.clip(planes.margins[i, r], -_LARGEST_MARGIN, _LARGEST_MARGIN)
        if margin.min() < 0 < margin.max():
            axes.contour(
                middles,
                middles,
                margin,
                levels=[0],
                colors=_MODEL_COLORS[planes.member[r] % len(_MODEL_COLORS)],
                linewidths=1.3 if planes.member[r] == 0 else 0.9,
                linestyles=[drawing.SOLID if planes.clean[r] else drawing.DASHED],
            )
    image, first, second = planes.points[i]
    for end, face in ((second, 'white'), (first, _ATTACK_COLOR)):
        axes.plot(*end, 'o', color=face, ms=3.8, mec=_ATTACK_COLOR, mew=1.0, zorder=4)
    axes.plot(*image, 'o', color='black', ms=3.8, mec='white', mew=0.4, zorder=4)
    shares = 100 * label_shares(planes, i)[planes.shown]
    if np.isfinite(shares).all():
        axes.set_title('label: {:.0f} % → {:.0f} %'.format(*shares))


def _class_colors(planes: Planes) -> dict[int, str]:
    """Returns the colours of the classes that occur in the panels."""
    rows = planes.shown
    found = (planes.classes[:, rows], planes.point_classes[:, rows])
    classes = sorted({int(c) for array in found for c in np.unique(array)})
    ten = len(_CLASS_COLORS)
    if max(classes, default=0) < ten:
        return {c: _CLASS_COLORS[c] for c in classes}
    shades = [np.array(to_rgb(color)) for color in _CLASS_COLORS]
    return {
        c: to_hex(shades[place % ten] * 0.75 ** (place // ten)) for place, c in enumerate(classes)
    }


def _class_patches(planes: Planes, colors: Mapping[int, str]) -> list[Patch]:
    """Returns the legend of the classes that occur."""
    names = planes.record.get('class_names')
    patches = [Patch(facecolor=color, label=_class_label(c, names)) for c, color in colors.items()]
    if not planes.inside.all():
        patches.append(Patch(facecolor=to_hex(dimmed(np.ones(3))), label='darker: outside [0, 1]'))
    return patches


def _region_symbols(planes: Planes) -> list[Line2D]:
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


def _boundary_symbols(members: int) -> list[Any]:
    """Returns the legend of boundaries."""
    line = drawing.GREY if members else 'black'
    dot = {'ls': '', 'marker': 'o', 'mec': _ATTACK_COLOR}
    which = ['network or whole ensemble', *(f'member {i}' for i in range(1, members + 1))]
    return [
        Line2D([], [], color=line, ls=drawing.SOLID, label='trained on clean images alone'),
        Line2D([], [], color=line, ls=drawing.DASHED, label='adversarially trained'),
        Line2D([], [], color='black', ls='', marker='o', label='the image'),
        Line2D([], [], color=_ATTACK_COLOR, label='adversarial example of the former', **dot),
        Line2D([], [], color='white', label='adversarial example of the latter', **dot),
        Patch(facecolor=_PERMITTED, edgecolor='#B8A76A', label='permitted region'),
        Patch(facecolor=_OUTSIDE, label='outside [0, 1]'),
        *(
            Line2D([], [], color=_MODEL_COLORS[i % len(_MODEL_COLORS)], label=name)
            for i, name in enumerate(which)
            if members
        ),
    ]
