"""The figure of what ensembles' members do under attack: who is fooled by whose examples."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ensadv.report import drawing

Content = Mapping[str, Any]  # of eval/<step>_members.json
_ACROSS = 4  # systems side by side, at most
_COLORS = 'cividis'  # whose lightness rises evenly, also for the colour-blind


@drawing.in_style
def members(systems: Mapping[str, Sequence[Content]], attack: str) -> Figure:
    """Draws each system's transfer matrix, and below how many members err on one example.

    Several runs are averaged; then bars of the histogram are from the lowest to the highest run,
    else they are 95 % intervals.

    Args:
      systems: contents of the runs' files, by system; all have the attack.
      attack: its name in them.
    """
    across = min(len(systems), _ACROSS)
    blocks = math.ceil(len(systems) / across)
    width = min(drawing.PAGE, max(drawing.COLUMN, 0.5 + 1.75 * across))
    side = (width - 0.75) / across
    figure = drawing.new_figure(width, blocks * (side + 1.7) + 0.3)
    grid = figure.subplots(2 * blocks, across, squeeze=False, height_ratios=[side, 0.95] * blocks)
    image = None
    for number, (system, contents) in enumerate(systems.items()):
        block, column = divmod(number, across)
        matrix, histogram = grid[2 * block : 2 * block + 2, column]
        image = _draw_transfer(matrix, contents, attack)
        _draw_erring(histogram, contents, attack)
        runs = f' ({len(contents)} runs)' if len(contents) > 1 else ''
        letters = int((side + 0.1) / drawing.BOLD_LETTER)
        matrix.set_title('\n'.join(textwrap.wrap(f'{system}{runs}', letters)), weight='bold')
        if column == 0:
            matrix.set_ylabel('examples made on')
            histogram.set_ylabel('images (%)')
    for axes in grid.ravel()[[*_unused(len(systems), blocks, across)]]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid[::2].ravel().tolist(), fraction=0.05, pad=0.01, aspect=25)
    bar.set_label('accuracy (%)')
    bar.outline.set_visible(False)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc='outside lower center', ncols=2)
    return drawing.fix_layout(figure)


def _unused(count: int, blocks: int, across: int) -> list[int]:
    """Returns the places of the panels of the last block that no system has."""
    missing = range(across - (blocks * across - count), across)
    return [row * across + column for row in (2 * blocks - 2, 2 * blocks - 1) for column in missing]


def _draw_transfer(axes: Axes, contents: Sequence[Content], attack: str) -> AxesImage:
    """Draws accuracies: a row for each part that was attacked, a column for each that is judged."""
    values = 100 * np.mean(
        [
            [[cell['value'] for cell in row] for row in content['attacks'][attack]['transfer']]
            for content in contents
        ],
        axis=0,
    )
    size = len(values)
    image = axes.imshow(values, cmap=_COLORS, vmin=0, vmax=100, aspect='auto')
    colors = matplotlib.colormaps[_COLORS]
    for row, column in np.ndindex(size, size):
        red, green, blue, _ = colors(values[row, column] / 100)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        own = row == column
        axes.text(
            column,
            row,
            f'{values[row, column]:.0f}',
            ha='center',
            va='center_baseline',
            color='white' if dark else 'black',
            weight='bold' if own else 'normal',
            size=7 if size <= 6 else 5,
        )
    # The whole, apart from the members.
    for draw in (axes.axhline, axes.axvline):
        draw(size - 1.5, color='white', lw=1.5)
    names = [*map(str, range(1, size)), 'all']
    axes.set_xticks(range(size), names)
    axes.set_yticks(range(size), names)
    axes.tick_params(length=0, pad=1.5)
    axes.set_xlabel('accuracy of')
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _draw_erring(axes: Axes, contents: Sequence[Content], attack: str) -> None:
    """Draws how many members err on the examples made on the whole, and what is independent."""
    found = [content['attacks'][attack]['on_whole']['erring'] for content in contents]
    observed, reach = _mean_and_reach([each['observed'] for each in found])
    counts = np.arange(len(observed))
    axes.bar(counts, observed, width=0.7, color=drawing.RIGHT, label='observed')
    line = {'fmt': 'none', 'elinewidth': 0.8}
    axes.errorbar(counts - 0.17, observed, yerr=reach, ecolor='black', **line)
    independent, reach = _mean_and_reach([each['independent'] for each in found])
    axes.errorbar(counts + 0.17, independent, yerr=reach, ecolor='black', **line)
    axes.plot(
        counts + 0.17,
        independent,
        ls='none',
        marker='D',
        ms=4.5,
        color=drawing.WRONG,
        mec='white',
        mew=0.6,
        label='if members erred independently',
    )
    axes.set_xticks(counts)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100])
    axes.grid(axis='x', visible=False)
    axes.set_xlabel('members that err')


def _mean_and_reach(
    estimates: Sequence[Sequence[Mapping[str, float]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns means over runs in %, and how far intervals, or of several runs these, reach.

    Args:
      estimates: of each run as many.

    Returns:
      float [m] and [2, m], below and above.
    """
    percent = lambda what: 100 * np.array([[each[what] for each in mine] for mine in estimates])
    values = percent('value')
    mean = values.mean(axis=0)
    several = len(estimates) > 1
    low, high = (
        (values.min(0), values.max(0)) if several else (percent('low')[0], percent('high')[0])
    )
    return mean, np.maximum([mean - low, high - mean], 0)
