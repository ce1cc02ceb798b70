"""What the report's figures have in common: size, type, colours, and how they are written.

For a conference paper of two columns: 3.3 or 6.8 inches wide, 7 to 8 points, colours that the
colour-blind tell apart. A system looks the same in every figure. Figures are built without pyplot,
so that nothing global changes, and the same arrays give the same bytes.
"""

import functools
import io
import zlib
from collections.abc import Callable, Collection
from typing import NamedTuple

import matplotlib
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ensadv.storage import files

COLUMN, PAGE = 3.3, 6.8  # widths in inches
LETTER, BOLD_LETTER = 0.057, 0.068  # and those of a letter
_DPI = 200
SOLID, DASHED, DASHDOT, DOTTED = '-', (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2))
GREY = '#555555'
RIGHT, WRONG = '#0072B2', '#D55E00'  # with a tick and a cross
_SETTINGS = {
    'font.family': 'DejaVu Sans',  # comes with matplotlib
    'font.size': 7,
    'axes.labelsize': 7.5,
    'axes.titlesize': 7,
    'axes.titlepad': 2.5,
    'legend.fontsize': 7,
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'axes.linewidth': 0.6,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#DDDDDD',
    'grid.linewidth': 0.4,
    'xtick.major.width': 0.6,
    'ytick.major.width': 0.6,
    'xtick.major.size': 2.5,
    'ytick.major.size': 2.5,
    'lines.linewidth': 1.1,
    'lines.markersize': 3.5,
    'legend.frameon': False,
    'legend.handlelength': 2.2,
    'legend.columnspacing': 1.0,
    'legend.borderaxespad': 0.2,
    'figure.constrained_layout.h_pad': 0.02,
    'figure.constrained_layout.w_pad': 0.04,
    'pdf.fonttype': 42,  # whole TrueType fonts: conferences refuse Type 3
    'path.simplify': True,
    'text.usetex': False,
    'text.parse_math': False,  # names may hold dollars
}


class Style(NamedTuple):
    """How a system is drawn, everywhere: the paper's that are trained cleanly are dashed."""

    color: str
    line: str | tuple
    marker: str  # one that can be hollow


# The palette of Okabe & Ito (2008), grey in the place of its yellow, which is pale on white.
_STYLES = {
    'Baseline': Style('#000000', DASHED, 'o'),
    'Ensemble2': Style('#999999', DASHED, 's'),
    'Ensemble4': Style('#56B4E9', DASHED, 'D'),
    'SingleAdv': Style('#D55E00', SOLID, '^'),
    'DoubleAdv': Style('#E69F00', SOLID, 'v'),
    'Ensemble2Adv': Style('#0072B2', SOLID, 'P'),
    'Ensemble4Adv': Style('#009E73', SOLID, 'X'),
    'Separate2Adv': Style('#CC79A7', SOLID, '*'),
}
# For others, from Tol's muted scheme.
_OTHERS = [
    Style(color, DASHDOT, marker)
    for marker in 'phd<>8'
    for color in ('#332288', '#882255', '#999933', '#44AA99')
]


def styles(systems: Collection[str]) -> dict[str, Style]:
    """Returns how each of these systems is drawn.

    The paper's systems are fixed. Another's style follows from its name; only where two of those
    given would look alike does the later one in the alphabet take the next.
    """
    chosen = {}
    for system in sorted(set(systems) - set(_STYLES)):
        start = zlib.crc32(system.encode())
        order = [_OTHERS[(start + i) % len(_OTHERS)] for i in range(len(_OTHERS))]
        chosen[system] = next((s for s in order if s not in chosen.values()), order[0])
    return {system: _STYLES.get(system) or chosen[system] for system in systems}


def png(figure: Figure) -> bytes:
    """Returns a figure as PNG, 200 dots per inch."""
    return _written(figure, format='png', metadata={'Software': None})


def save(figure: Figure, path: epath.Path) -> bytes:
    """Writes a figure as PNG and as PDF to a path without suffix, and returns the PNG."""
    content = png(figure)
    pdf = _written(figure, format='pdf', metadata={'CreationDate': None})
    files.write_bytes(path.parent / f'{path.name}.png', content)
    files.write_bytes(path.parent / f'{path.name}.pdf', pdf)
    return content


def _written(figure: Figure, **options) -> bytes:
    content = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(content, dpi=_DPI, **options)
    return content.getvalue()


def in_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws with our settings; they are read as the parts of a figure are made."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(_SETTINGS):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(width: float, height: float, layout: str = 'constrained') -> Figure:
    figure = Figure((width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def legend_columns(labels: Collection[str], width: float, most: int) -> int:
    """Returns how many columns of a legend fit into a width in inches."""
    return max(1, min(most, int(width / legend_width(labels))))


def legend_width(labels: Collection[str]) -> float:
    """Returns how wide a column of a legend is, in inches."""
    return 0.38 + LETTER * max(map(len, labels), default=0)  # a handle and spaces


def shortened(text: str, width: float) -> str:
    """Returns a text that fits into a width in inches, its end left out if need be."""
    letters = max(2, int(width / LETTER))
    return text if len(text) <= letters else f'{text[: letters - 1]}…'


def fix_layout(figure: Figure) -> Figure:
    """Lays out once: every file has the same layout, and positions can be measured."""
    figure.draw_without_rendering()
    figure.set_layout_engine('none')
    for axes in figure.axes:
        # The last digits of a layout depend on where its parts lie in memory.
        axes.set_position([round(value, 6) for value in axes.get_position(original=True).bounds])
    return figure
