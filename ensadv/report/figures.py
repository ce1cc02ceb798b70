"""Figures that plot numbers: accuracy over training, attack steps and computation; differences."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, Locator, LogLocator, MaxNLocator, NullLocator

from ensadv.report import drawing
from ensadv.report.analysis import Band
from ensadv.report.computation import Accuracy, Panel

FEW_EVALUATIONS = 20  # a curve of no more says so
_LONGEST_LABEL = 44  # letters in a line of a label of two systems


class AttackCurve(NamedTuple):
    """One system's accuracy in 0..1 over the number of an attack's steps.

    The current iterate's is NaN where it is unknown.
    """

    steps: np.ndarray  # int [m], from 1
    worst: np.ndarray  # float [seeds, m], at the worst point so far
    iterate: np.ndarray  # float [seeds, m], at the current iterate
    n: int  # examples of `worst`
    iterate_n: int  # examples of `iterate`; 0 where it is unknown throughout


@drawing.in_style
def over_training(bands: Mapping[str, Band], points: Mapping[str, int], *, attack: str) -> Figure:
    """Draws accuracy over training (the paper's Figures 2a and 2b).

    The mean over seeds, and a band from the lowest to the highest seed. A band holds interpolated
    steps. So that a line between few evaluations is not taken for more, such a line is thin, has
    markers at its two ends only, and the legend says how many evaluations there were.

    Args:
      bands: by system, accuracies in 0..1; one of no steps is named in the legend, as such.
      points: by system, the number of evaluations of a seed.
      attack: its name.
    """
    labels = {system: _label(system, band, points[system]) for system, band in bands.items()}
    columns = drawing.legend_columns(labels.values(), drawing.COLUMN, 2)
    figure = drawing.new_figure(drawing.COLUMN, 2.3 + 0.14 * math.ceil(len(bands) / columns))
    axes = figure.add_subplot()
    unit, words = _training_axis(axes, [step for band in bands.values() for step in band.steps])
    for i, (system, style) in enumerate(drawing.styles(bands).items()):
        band = bands[system]
        few = points[system] <= FEW_EVALUATIONS
        steps, mean, low, high = band.steps / unit, *(100 * np.array(band[1:4]))
        if band.seeds > 1 and len(steps) == 1:
            axes.vlines(steps, low, high, color=style.color, lw=0.8)
        elif band.seeds > 1:
            axes.fill_between(steps, low, high, color=style.color, alpha=0.18, lw=0)
        axes.plot(
            steps,
            mean,
            color=style.color,
            ls=style.line,
            lw=0.7 if few else None,
            marker=style.marker,
            # Of a long curve, at other places than the others' markers.
            markevery=[0, -1] if few and len(steps) else (0.025 * i, 0.25),
            label=labels[system],
        )
    axes.set_xlabel(words)
    _label_accuracy(axes, attack)
    axes.margins(x=0.02)
    short = any(points[system] <= FEW_EVALUATIONS for system in bands)
    title = '(in brackets: number of evaluations)' if short else None
    figure.legend(loc='outside lower center', ncols=columns, title=title)
    return drawing.fix_layout(figure)


def _training_axis(axes: Axes, steps: Sequence[float]) -> tuple[int, str]:
    """Puts ticks at whole numbers of the unit of training steps; returns the unit, and its words.

    A single step gets the one tick.
    """
    first, last = min(steps, default=0), max(steps, default=0)
    thousands = last >= 1e4 and not 0 < last - first < 4e3
    unit, words = (1000, 'training steps (thousands)') if thousands else (1, 'training steps')
    one = bool(steps) and first == last
    whole = MaxNLocator(6, integer=True, steps=[1, 2, 5, 10])
    _ticks(axes, FixedLocator([first / unit]) if one else whole)
    return unit, words


def _label(system: str, band: Band, evaluations: int) -> str:
    """Returns a curve's label, with what the reader must know of it."""
    if not len(band.steps):
        return f'{system} (no common steps)'
    return f'{system} ({evaluations})' if evaluations <= FEW_EVALUATIONS else system


@drawing.in_style
def over_attack_steps(curves: Mapping[str, AttackCurve], *, attack: str) -> Figure:
    """Draws accuracy over the number of an attack's steps (the paper's Figure 2c).

    The worst point so far is the system's own line, with markers; the current iterate is dotted,
    without. Means over seeds, at the steps where all seeds are known; where there are several,
    bands from the lowest to the highest.

    Args:
      curves: by system.
      attack: its name without the number of steps, as 'PGD'.
    """
    columns = drawing.legend_columns(curves, drawing.COLUMN, 3)
    figure = drawing.new_figure(drawing.COLUMN, 2.3 + 0.14 * math.ceil(len(curves) / columns))
    axes = figure.add_subplot()
    for system, style in drawing.styles(curves).items():
        curve = curves[system]
        for values, drawn in (
            (curve.iterate, {'ls': drawing.DOTTED, 'lw': 0.9}),
            (curve.worst, {'ls': style.line, 'marker': style.marker, 'label': system}),
        ):
            values = 100 * np.asarray(values, np.float64)
            known = np.isfinite(values).all(axis=0)
            steps, values = np.asarray(curve.steps)[known], values[:, known]
            if len(values) > 1:
                low, high = values.min(axis=0), values.max(axis=0)
                axes.fill_between(steps, low, high, color=style.color, alpha=0.13, lw=0)
            # A share of a line's length is for lines, and not for a single point.
            every = 0.08 if len(steps) > 1 else None
            axes.plot(steps, values.mean(axis=0), color=style.color, markevery=every, **drawn)
    _label_accuracy(axes, attack)
    axes.set_xlabel(f'{attack} steps')
    last = max(int(curve.steps[-1]) for curve in curves.values())
    axes.set_xscale('log')
    _ticks(axes, FixedLocator(_attack_ticks(last)))
    axes.margins(x=0.02)
    if last == 1:
        axes.set_xlim(0.5, 2)
    figure.legend(loc='outside lower center', ncols=columns)
    kinds = []
    for what, field, drawn in (
        ('worst so far', 'n', {'marker': 'o'}),
        ('current iterate', 'iterate_n', {'ls': drawing.DOTTED}),
    ):
        counts = sorted({getattr(curve, field) for curve in curves.values()} - {0})
        if counts:
            n = '–'.join(f'{count:,}' for count in (counts[0], *counts[1:][-1:]))
            kinds.append(Line2D([], [], color=drawing.GREY, label=f'{what} (n = {n})', **drawn))
    figure.legend(handles=kinds, loc='outside upper center', ncols=2)
    return drawing.fix_layout(figure)


def _attack_ticks(last: int) -> list[int]:
    """Returns the steps that get ticks: 1, 2, 5, 10, ..., or 1, 10, 100, ..., and the last one.

    What is so near to the last that the two would touch is left out.
    """
    multiples = (1, 2, 5) if last <= 1000 else (1,)
    ticks = [m * 10**power for power in range(len(str(last))) for m in multiples]
    return [tick for tick in ticks if tick < last**0.92] + [last]


def _label_accuracy(axes: Axes, attack: str) -> None:
    # An attack's settings may be part of its name.
    axes.set_ylabel(textwrap.fill(f'robust accuracy, {attack} (%)', 30))
    _limit_accuracy(axes, 0.02)  # half a line's width


def _limit_accuracy(axes: Axes, beyond: float) -> None:
    """Limits the y axis to 0 to 100, and to this share of its length beyond.

    Equal numbers have no range: it is 4 or more.
    """
    low, high = axes.get_ylim()
    middle = np.clip((low + high) / 2, 2, 98)
    low, high = max(min(low, middle - 2), 0), min(max(high, middle + 2), 100)
    edge = beyond * (high - low)
    axes.set_ylim(low - edge * (low == 0), high + edge * (high == 100))


def _ticks(axes: Axes, ticks: Locator) -> None:
    """Puts plain numbers at these ticks of the x axis, and no others."""
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.10g}')
    axes.xaxis.set_minor_locator(NullLocator())


def _multiples(left: float, right: float) -> tuple[float, ...]:
    """Returns the coarsest multiples of powers of ten of which three or more are on an axis."""
    powers = 10.0 ** np.arange(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = np.outer(powers, multiples)
        if np.sum((ticks >= left) & (ticks <= right)) >= 3:
            return multiples
    return (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


@drawing.in_style
def computation(costs: Sequence[Panel], accuracy: Mapping[str, Accuracy]) -> Figure:
    """Draws robust accuracy against computation, a panel for each kind, with the Pareto front.

    Args:
      costs: one to four kinds; a cost that is not a positive number is not drawn.
      accuracy: by system, mean, lowest and highest (or an interval's ends) in 0..1.
    """
    columns = min(len(costs), 2)
    rows = math.ceil(len(costs) / columns)
    width = drawing.COLUMN if columns == 1 else drawing.PAGE
    figure = drawing.new_figure(width, 2.3 * rows + 0.25)
    handles = {}
    for i, panel in enumerate(costs):
        axes = figure.add_subplot(rows, columns, i + 1)
        handles |= _draw_costs(axes, panel, accuracy)
        axes.set_xlabel(textwrap.fill(panel.label, 48))
        if i % columns == 0:
            axes.set_ylabel('robust accuracy (%)')
    names = [system for system in accuracy if system in handles]
    figure.legend(
        handles=[handles[system] for system in names],
        loc='outside lower center',
        ncols=drawing.legend_columns(names, width, 4),
    )
    marks = [
        Line2D([], [], color=drawing.GREY, marker='o', ls='', label='on the Pareto front'),
        Line2D([], [], color=drawing.GREY, marker='o', ls='', mfc='white', label='not on it'),
        Line2D([], [], color=drawing.GREY, lw=0.8, label='Pareto front'),
    ]
    figure.legend(handles=marks, loc='outside upper center', ncols=3)
    return drawing.fix_layout(figure)


def _draw_costs(axes: Axes, panel: Panel, accuracy: Mapping[str, Accuracy]) -> dict[str, Line2D]:
    """Draws a panel, and returns for the legend the marker of each system in it."""
    known = {s: c for s, c in panel.cost.items() if math.isfinite(c) and c > 0}
    drawn = [s for s in accuracy if s in known and math.isfinite(accuracy[s][0])]
    handles = {}
    for system, style in drawing.styles(drawn).items():
        mean, low, high = (100 * value for value in accuracy[system])
        look = {'color': style.color, 'marker': style.marker, 'ms': 5, 'mew': 0.9}
        handles[system] = Line2D([], [], ls='', label=system, **look)
        axes.errorbar(
            known[system],
            mean,
            # The mean of equal numbers may differ from them by rounding.
            yerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
            elinewidth=0.8,
            mfc=style.color if system in panel.front else 'white',
            zorder=3,
            **look,
        )
    least, most = (choose((known[s] for s in drawn), default=1) for choose in (min, max))
    room = math.exp(0.15 * max(math.log(most / least), 0.5))
    left, right = least / room, most * room
    axes.set_xlim(left, right)
    axes.set_xscale('log')
    _ticks(axes, LogLocator(subs=_multiples(left, right), numticks=50))
    axes.margins(y=0.16)
    _limit_accuracy(axes, 0.05)
    if front := sorted((known[s], 100 * accuracy[s][0]) for s in drawn if s in panel.front):
        # What the costliest system reaches, so does more computation.
        front.append((right, front[-1][1]))
        axes.step(*zip(*front, strict=True), where='post', color=drawing.GREY, lw=0.8, zorder=1)
    return handles


@drawing.in_style
def differences(rows: Sequence[tuple[str, float, float, float]], *, attack: str) -> Figure:
    """Draws differences between systems with their intervals, and writes the numbers beside.

    Args:
      rows: from the top: a label, the difference in points, and the interval's ends; NaN ends
        where there is no interval. The marker is filled where the interval leaves zero out.
      attack: its name.
    """
    labels = ['\n'.join(textwrap.wrap(label, _LONGEST_LABEL)) for label, *_ in rows]
    lines = max((label.count('\n') + 1 for label in labels), default=1)
    figure = drawing.new_figure(drawing.PAGE, (0.05 + 0.12 * lines) * len(rows) + 0.55)
    axes = figure.add_subplot()
    axes.axvline(0, color='black', lw=0.7)
    for i, (_, value, low, high) in enumerate(rows):
        apart = low > 0 or high < 0
        color = drawing.RIGHT if apart else drawing.GREY
        axes.plot([low, high], [i, i], color=color, lw=1.2)
        axes.plot(value, i, 'o', color=color, mfc=color if apart else 'white', ms=4)
        interval = f' [{low:+.1f}, {high:+.1f}]' if math.isfinite(low + high) else ''
        number = f'{value:+5.1f}'.replace(' ', '\N{FIGURE SPACE}')
        text = (number + interval).replace('-', '\N{MINUS SIGN}')
        axes.text(1.01, i, text, transform=axes.get_yaxis_transform(), va='center_baseline')
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, (left + right) / 2 - 1), max(right, (left + right) / 2 + 1))
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    axes.spines['left'].set_visible(False)
    axes.grid(axis='y', visible=False)
    axes.set_xlabel(f'difference in robust accuracy, {attack} (points)')
    return drawing.fix_layout(figure)
