"""Figures: what is drawn is what was given."""

import itertools

import matplotlib
import numpy as np
import pytest
from etils import epath
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from ensadv.report import drawing, figures, pictures, plane_figures
from ensadv.report.analysis import Band
from ensadv.report.computation import Panel
from ensadv.report.figures import AttackCurve
from ensadv.report.pictures import ExampleColumn
from ensadv.storage.plane_files import Planes

PAPER = (
    'Baseline', 'Ensemble2', 'Ensemble4', 'SingleAdv',
    'DoubleAdv', 'Ensemble2Adv', 'Ensemble4Adv', 'Separate2Adv',
)  # fmt: skip


def band(steps, mean, spread=0.0, seeds=1) -> Band:
    mean = np.array(mean, np.float64)
    return Band(np.array(steps, np.float64), mean, mean - spread, mean + spread, seeds)


def lines(figure: Figure) -> dict[str, matplotlib.lines.Line2D]:
    return {line.get_label(): line for line in figure.axes[0].lines}


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def axes_texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def look(line: matplotlib.lines.Line2D) -> tuple:
    return line.get_color(), line.get_marker()


@pytest.fixture
def training() -> Figure:
    bands = {
        'SingleAdv': band([10_000, 20_000, 40_000], [0.2, 0.3, 0.4], 0.05, seeds=3),
        'Baseline': band([10_000, 20_000], [0.1, 0.1]),
    }
    return figures.over_training(bands, {'SingleAdv': 100, 'Baseline': 2}, attack='PGD20')


def test_training_is_drawn_in_percent_and_thousands_of_steps(training):
    drawn = lines(training)['SingleAdv']
    np.testing.assert_allclose(drawn.get_xdata(), [10, 20, 40])
    np.testing.assert_allclose(drawn.get_ydata(), [20, 30, 40])
    axes = training.axes[0]
    assert axes.get_xlabel() == 'training steps (thousands)'
    assert axes.get_ylabel() == 'robust accuracy, PGD20 (%)'
    # The one band is that of the system with several seeds.
    (drawn_band,) = axes.collections
    corners = drawn_band.get_paths()[0].vertices
    for step, low, high in [(10, 15, 25), (20, 25, 35), (40, 35, 45)]:
        at = corners[np.isclose(corners[:, 0], step), 1]
        np.testing.assert_allclose([at.min(), at.max()], [low, high])


def test_few_evaluations_are_told_and_marked_at_the_ends_only(training):
    few, many = lines(training)['Baseline (2)'], lines(training)['SingleAdv']
    assert few.get_markevery() == [0, -1]
    assert few.get_linewidth() < many.get_linewidth()
    assert training.legends[0].get_title().get_text() == '(in brackets: number of evaluations)'


def test_few_steps_are_not_counted_in_thousands():
    figure = figures.over_training({'A': band([150, 300], [0, 1])}, {'A': 2}, attack='PGD20')
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [150, 300])
    assert figure.axes[0].get_xlabel() == 'training steps'


def test_curves_of_one_step_and_of_none():
    bands = {'A': band([100], [0.5], 0.1, seeds=2), 'B': band([], [], seeds=2)}
    figure = figures.over_training(bands, {'A': 1, 'B': 30}, attack='PGD20')
    assert legend_texts(figure) == ['A (1)', 'B (no common steps)']
    (bar,) = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(bar, [(100, 40), (100, 60)])
    assert drawing.png(figure)


@pytest.mark.parametrize(
    'steps, expected',
    [
        ([1, 2, 3], [1, 2, 3]),
        ([2, 4, 6, 8, 10], [2, 4, 6, 8, 10]),
        ([10, 20, 30, 40], [10, 20, 30, 40]),
        ([2500, 5000, 7500], [3000, 4000, 5000, 6000, 7000]),
        ([5000 * i for i in range(1, 101)], [0, 100_000, 200_000, 300_000, 400_000, 500_000]),
        ([10_000, 10_002], [10_000, 10_001, 10_002]),
        ([7], [7]),
        ([12_345], [12_345]),
    ],
)
def test_ticks_of_training_are_whole_steps(steps, expected):
    curve = band(steps, np.linspace(0.1, 0.4, len(steps)))
    axes = figures.over_training({'A': curve}, {'A': len(steps)}, attack='PGD20').axes[0]
    unit = 1000 if 'thousands' in axes.get_xlabel() else 1
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    np.testing.assert_allclose(unit * np.array(ticks), expected, rtol=1e-12)
    labels = [axes.xaxis.get_major_formatter()(tick) for tick in ticks]
    assert [float(label.replace(',', '')) for label in labels] == pytest.approx(ticks)


@pytest.mark.parametrize(
    'last, expected',
    [
        (1, ['1']),
        (3, ['1', '2', '3']),
        (7, ['1', '2', '5', '7']),
        (50, ['1', '2', '5', '10', '20', '50']),
        (600, ['1', '2', '5', '10', '20', '50', '100', '200', '600']),
        (100_000, ['1', '10', '100', '1,000', '10,000', '100,000']),
    ],
)
def test_ticks_of_attack_steps_are_whole_and_apart(last, expected):
    steps = np.unique([1, last])
    accuracy = np.full((1, len(steps)), 0.5)
    curve = AttackCurve(steps, accuracy, accuracy, 100, 10)
    figure = figures.over_attack_steps({'A': curve}, attack='PGD')
    axes = figure.axes[0]
    left, right = axes.get_xlim()
    assert left < 1 <= last < right
    shown = [label for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right]
    assert [label.get_text() for label in shown] == expected
    boxes = [label.get_window_extent() for label in shown]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_a_long_name_of_an_attack_stays_within_the_figure():
    attack = 'PGD20 (loss=margin, restarts=10)'
    figure = figures.over_training({'A': band([1, 2], [0.1, 0.2])}, {'A': 2}, attack=attack)
    label = figure.axes[0].yaxis.label
    assert label.get_text().replace('\n', ' ') == f'robust accuracy, {attack} (%)'
    box = label.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_an_attack_of_one_step_is_a_point_that_is_seen():
    one = AttackCurve(np.array([1]), np.array([[0.5]]), np.array([[0.5]]), 100, 10)
    figure = figures.over_attack_steps({'A': one}, attack='PGD')
    # Matplotlib draws no marker at all where they are to be so far apart on a line of no length.
    assert lines(figure)['A'].get_markevery() is None


@pytest.mark.parametrize('accuracy', [0.0, 0.5, 1.0])
def test_equal_accuracies_have_an_axis_within_0_to_100(accuracy):
    figure = figures.over_training({'A': band([1, 2], [accuracy] * 2)}, {'A': 2}, attack='PGD20')
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low < 100 * accuracy < high
    assert 4 <= high - low < 7
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(ticks) > 1
    assert min(ticks) >= 0
    assert max(ticks) <= 100


def test_attack_steps_means_and_unknown_iterates():
    curves = {
        'SingleAdv': AttackCurve(
            np.array([1, 10, 500]),
            np.array([[0.8, 0.6, 0.5], [0.6, 0.4, 0.3]]),
            np.array([[0.8, np.nan, 0.6], [0.6, 0.5, 0.4]]),
            10_000,
            1_024,
        )
    }
    figure = figures.over_attack_steps(curves, attack='PGD')
    iterate, worst = figure.axes[0].lines
    np.testing.assert_array_equal(worst.get_xdata(), [1, 10, 500])
    np.testing.assert_allclose(worst.get_ydata(), [70, 50, 40])
    # Where one seed is unknown, a mean would be of other seeds.
    np.testing.assert_array_equal(iterate.get_xdata(), [1, 500])
    np.testing.assert_allclose(iterate.get_ydata(), [70, 50])
    assert iterate.get_linestyle() != worst.get_linestyle()
    axis = figure.axes[0].xaxis
    assert figure.axes[0].get_xscale() == 'log'
    shown = [axis.get_major_formatter()(tick) for tick in axis.get_majorticklocs()]
    expected = ['1', '2', '5', '10', '20', '50', '100', '200', '500']
    assert [text for text in shown if text in expected] == expected
    assert not axis.get_minorticklocs().size
    assert legend_texts(figure) == [
        'SingleAdv', 'worst so far (n = 10,000)', 'current iterate (n = 1,024)',
    ]  # fmt: skip


def test_one_seed_has_no_band_and_no_iterate_no_legend():
    unknown = np.full((1, 2), np.nan)
    curve = AttackCurve(np.array([1, 2]), np.array([[0.8, 0.7]]), unknown, 360, 0)
    figure = figures.over_attack_steps({'A': curve, 'B': curve}, attack='PGD')
    assert not figure.axes[0].collections
    assert legend_texts(figure) == ['A', 'B', 'worst so far (n = 360)']


def test_systems_look_the_same_in_every_figure():
    accuracy = {system: (0.1 * i + 0.05, 0.1 * i, 0.1 * i + 0.1) for i, system in enumerate(PAPER)}
    looks = []
    for some in (PAPER, PAPER[::-2]):  # others beside it, in another order
        curve = AttackCurve(np.arange(1, 4), np.ones((1, 3)), np.ones((1, 3)), 1, 1)
        bands = {system: band([1, 2], [0.1, 0.2]) for system in some}
        drawn = [
            figures.over_training(bands, dict.fromkeys(some, 99), attack='PGD20'),
            figures.over_attack_steps(dict.fromkeys(some, curve), attack='PGD'),
        ]
        for figure in drawn:
            looks.append({s: look(line) for s, line in lines(figure).items() if s in some})
        costs = [Panel('', '', dict.fromkeys(some, 1.0), some)]
        points = figures.computation(costs, {s: accuracy[s] for s in some}).axes[0].containers
        looks.append({s: look(point.lines[0]) for s, point in zip(some, points, strict=True)})
    for found in looks:
        assert found == {system: looks[0][system] for system in found}
    assert len(set(looks[0].values())) == len(PAPER)


def test_clean_training_is_dashed_and_other_systems_get_what_is_left():
    styles = drawing.styles([*PAPER, 'Mine', 'Yours'])
    dashed = [system for system in PAPER if styles[system].line != '-']
    assert dashed == ['Baseline', 'Ensemble2', 'Ensemble4']
    assert len({(style.color, style.marker) for style in styles.values()}) == 10
    assert drawing.styles(['Mine'])['Mine'] == styles['Mine']
    # As many others as there are styles: none twice.
    assert len(set(drawing.styles([f'system {i}' for i in range(24)]).values())) == 24


def test_computation_draws_points_bars_and_the_front():
    cost = {'A': 1.0, 'B': 2.0, 'C': 4.0, 'unknown': float('nan'), 'unmeasured': 3.0}
    accuracy = {'A': (0.3, 0.25, 0.4), 'B': (0.2, 0.2, 0.2), 'C': (0.5, 0.5, 0.5)}
    accuracy['unknown'] = (0.9, 0.9, 0.9)
    figure = figures.computation([Panel('', 'step time (ms)', cost, {'A', 'C'})], accuracy)
    (axes,) = figure.axes
    assert axes.get_xlabel() == 'step time (ms)'
    assert legend_texts(figure)[:3] == ['A', 'B', 'C']
    points = [container.lines[0] for container in axes.containers]
    assert [(*p.get_xdata(), *p.get_ydata()) for p in points] == [(1, 30), (2, 20), (4, 50)]
    hollow = [to_rgb(point.get_markerfacecolor()) == (1, 1, 1) for point in points]
    assert hollow == [False, True, False]
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bar, [(1, 25), (1, 40)])
    front = next(line for line in axes.lines if line.get_drawstyle() == 'steps-post')
    np.testing.assert_allclose(front.get_ydata(), [30, 50, 50])
    np.testing.assert_allclose(front.get_xdata(), [1, 4, axes.get_xlim()[1]])


def test_rounding_and_dollars_do_no_harm():
    low = 0.1 + 0.2  # a little more than 0.3
    panel = Panel('', 'cost ($)', {'A $x$': 1.0}, {'A $x$'})
    figure = figures.computation([panel], {'A $x$': (0.3, low, 0.3)})
    text = figure.legends[0].get_texts()[0]
    assert text.get_text() == 'A $x$'
    assert not text.get_parse_math()
    assert drawing.png(figure)


@pytest.mark.parametrize('panels', [1, 3, 4])
def test_all_systems_of_the_panels_are_in_the_legend_which_fits(panels):
    costs = [Panel('', '', dict.fromkeys(PAPER[i::panels], 1.0), ()) for i in range(panels)]
    figure = figures.computation(costs, dict.fromkeys(PAPER, (0.3, 0.2, 0.4)))
    assert len(figure.axes) == panels
    assert legend_texts(figure)[: len(PAPER)] == list(PAPER)
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_differences_are_filled_where_the_interval_leaves_zero_out():
    nan = float('nan')
    rows = [('A − B', 3.0, 1.0, 5.0), ('A − C', -1.0, -12.0, 0.5), ('B − C', 2.0, nan, nan)]
    figure = figures.differences(rows, attack='PGD20')
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ['A − B', 'A − C', 'B − C']
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    points = [line for line in axes.lines if line.get_marker() == 'o']
    assert [line.get_xdata()[0] for line in points] == [3, -1, 2]
    assert [line.get_markerfacecolor() == 'white' for line in points] == [False, True, True]
    bars = [line.get_xdata() for line in axes.lines if line.get_marker() == 'None'][1:]
    np.testing.assert_array_equal(bars, [[1, 5], [-12, 0.5], [nan, nan]])
    texts = [text.strip('\N{FIGURE SPACE}') for text in axes_texts(figure)]
    assert texts == ['+3.0 [+1.0, +5.0]', '−1.0 [−12.0, +0.5]', '+2.0']


def test_long_names_of_systems_stay_within_the_differences():
    name = 'a system with a name that is too long for a line of the figure'
    rows = [(f'{name} − {name}', 3.0, 1.0, 5.0), ('A − B', 0.0, 0.0, 0.0)]
    figure = figures.differences(rows, attack='PGD20')
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert not boxes[0].overlaps(boxes[1])
    assert all(figure.bbox.x0 <= box.x0 and figure.bbox.y0 <= box.y0 for box in boxes)
    assert figure.axes[0].bbox.width > figure.bbox.width / 3


def test_differences_of_nothing_have_an_axis_in_points():
    figure = figures.differences([('A − B', 0.0, 0.0, 0.0)], attack='PGD20')
    assert figure.axes[0].get_xlim() == (-1, 1)


def probabilities(*predicted: int) -> np.ndarray:
    """Returns 80 % for each of these of five classes."""
    return 0.05 + 0.75 * np.eye(5)[list(predicted)]


def examples(systems, channels=1, **kwargs) -> Figure:
    clean = np.full((2, 2, 2, channels), 102, np.uint8)  # 0.4
    adversarial = np.full((2, 2, 2, channels), 0.4)
    adversarial[:, 0, 0] += 0.1
    adversarial[:, 0, 1] -= 0.1
    adversarial[:, 1, 0] += 0.05
    column = ExampleColumn(adversarial, probabilities(1, 2), probabilities(1, 3))
    columns = dict.fromkeys(systems, column)
    return pictures.examples(
        clean, np.array([1, 2]), columns, epsilon=0.1, attack='PGD20', **kwargs
    )


@pytest.mark.parametrize('channels', [1, 3])
def test_examples_show_the_image_the_attack_and_the_perturbation(channels):
    figure = examples(['A'], channels)
    assert len(figure.axes) == 2 * 3
    image, adversarial, perturbation = (np.array(a.images[0].get_array()) for a in figure.axes[:3])
    assert image.shape == (2, 2, 3)
    np.testing.assert_allclose(image, 0.4, atol=1e-6)
    np.testing.assert_allclose(adversarial[..., 0], [[0.5, 0.3], [0.45, 0.4]], atol=1e-6)
    # From -epsilon, black, to +epsilon, white.
    np.testing.assert_allclose(perturbation[..., 2], [[1, 0], [0.75, 0.5]], atol=1e-5)
    assert figure.axes[2].get_title() == 'perturbation\n×5'
    assert {axes.images[0].get_interpolation() for axes in figure.axes} == {'nearest'}
    # The first stays right, the second does not.
    expected = ['1', '✓ 1 (80 %)', '→ ✓ 1 (80 %)', 'A', '2', '✓ 2 (80 %)', '→ ✗ 3 (80 %)']
    assert axes_texts(figure) == expected
    colors = {t.get_text(): t.get_color() for axes in figure.axes for t in axes.texts}
    assert colors['✓ 2 (80 %)'] != colors['→ ✗ 3 (80 %)']


def test_examples_of_many_systems_are_in_blocks_and_classes_have_names():
    figure = examples(PAPER, class_names=['a', 'b', 'c', 'd', 'e'])
    assert len(figure.axes) == 2 * 2 * 9  # two blocks of two images, with four systems each
    assert figure.get_size_inches()[0] <= drawing.PAGE
    texts = axes_texts(figure)
    assert [text for text in texts if text in PAPER] == list(PAPER)
    assert texts.count('→ ✗ d (80 %)') == len(PAPER)
    places = [axes.get_position() for axes in figure.axes]
    assert all(place.y0 >= 0 and place.y1 <= 1 and place.x1 <= 1 for place in places)
    inch = figure.get_size_inches()
    # Between any two images are 0.04 inches or more, sideways or up and down.
    for a, b in itertools.combinations(places, 2):
        aside = max(b.x0 - a.x1, a.x0 - b.x1) * inch[0]
        above = max(b.y0 - a.y1, a.y0 - b.y1) * inch[1]
        assert max(aside, above) > 0.04


def test_a_wide_image_takes_no_more_room_than_it_needs():
    clean = np.zeros((3, 8, 32, 3), np.uint8)
    column = ExampleColumn(clean / 255, *2 * [np.full((3, 2), 0.5)])
    figure = pictures.examples(clean, np.zeros(3, int), {'A': column}, epsilon=0.1, attack='PGD20')
    low, square = figure.get_size_inches()[1], examples(['A']).get_size_inches()[1]
    assert low < square  # three of them than two square ones


def test_long_names_cover_no_others_and_are_not_cut_off():
    classes = ['malignant melanoma of the skin', 'basal cell carcinoma of the skin', *'cde']
    systems = ['my own system with a rather long name, seed 0', 'DoubleAdv', 'x' * 60]
    figure = examples(systems, class_names=classes)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert len(boxes) == 2 + 3 * 2 * 2 + 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert '✓ basal cell ca… (80 %)' in ' '.join(axes_texts(figure))
    # None of a system's name is left out.
    headings = [text.replace('\n', ' ') for text in axes_texts(figure)]
    assert systems[0] in headings


@pytest.mark.parametrize('channels', [2, 4, 5])
def test_of_unusual_channels_the_mean_is_drawn_and_said_to_be(channels, planes):
    clean = np.full((1, 2, 2, channels), 20, np.uint8)
    clean[..., 0] = 20 * (1 + channels)  # so that the mean is 40
    column = ExampleColumn(clean / 255, probabilities(1), probabilities(1))
    arguments = {'epsilon': 0.1, 'attack': 'PGD20'}
    figure = pictures.examples(clean, np.array([1]), {'A': column}, **arguments)
    for axes in figure.axes[:2]:
        np.testing.assert_allclose(axes.images[0].get_array(), 40 / 255, atol=1e-6)
    said = f'Images have {channels} channels; their mean is drawn in grey.'
    (text,) = figure.texts
    assert text.get_text().replace('\n', ' ') == said
    box = text.get_window_extent()
    assert not any(box.overlaps(t.get_window_extent()) for a in figure.axes for t in a.texts)
    of_planes = plane_figures.regions(planes._replace(images=np.repeat(clean, 2, axis=0)))
    assert said in ' '.join(text.get_text() for text in of_planes.texts)
    for usual in (1, 3):
        assert not [text for text in examples(['A'], usual).texts if text.get_text()]


@pytest.fixture
def planes() -> Planes:
    classes = np.zeros((2, 1, 4, 4), np.int16)
    classes[0, 0, 3, :] = 5  # at the top: y is large
    classes[1, 0, 0, 0] = 9
    inside = np.ones((2, 4, 4), bool)
    inside[0, 0, 3] = False
    region = [[(-1, -1), (1, -1), (1, 1), (-1, 1)], [(0, -1), (1, 1), (-1, 1), (np.nan, np.nan)]]
    return Planes(
        names=('SingleAdv, seed 0',),
        member=np.zeros(1, np.int32),
        clean=np.zeros(1, bool),
        attacked=('SingleAdv, seed 0', 'Ensemble2Adv, seed 1'),
        places=np.array([7, 12], np.int32),
        saturated=np.zeros(2, np.int32),
        labels=np.array([0, 3], np.int32),
        images=np.full((2, 2, 2, 1), 255, np.uint8),
        window=np.array(4, np.float32),
        classes=classes,
        margins=np.where(classes == 0, 1, -1).astype(np.float32),
        inside=inside,
        points=np.array([[(0, 0), (1, 0), (0.5, 1)], [(0, 0), (0.5, 0), (0, 0.5)]], np.float32),
        point_classes=np.array([[(0, 0, 5)], [(3, 0, 3)]], np.int16),
        region=np.array(region, np.float32),
        notes=('', 'both adversarial examples are the same'),
        record={'attack': 'pgd20', 'places': []},
    )


def test_planes_show_classes_with_y_upwards_and_dim_what_is_no_image(planes):
    figure = plane_figures.regions(planes)
    assert len(figure.axes) == 4  # per image: the image, and one model's panel
    thumbnail, _, panel, _ = figure.axes
    assert thumbnail.get_title() == 'test image 7\nclass 0'
    np.testing.assert_array_equal(thumbnail.images[0].get_array(), 1)
    image = panel.images[0]
    assert image.origin == 'lower'
    np.testing.assert_array_equal(image.get_extent(), [-2, 2, -2, 2])
    patches = {
        text.get_text(): to_rgb(patch.get_facecolor())
        for text, patch in zip(
            figure.legends[0].get_texts(), figure.legends[0].get_patches(), strict=True
        )
    }
    # Those that occur: class 3, which only a point has, too.
    assert list(patches) == ['class 0', 'class 3', 'class 5', 'class 9', 'darker: outside [0, 1]']
    drawn = np.array(image.get_array())
    np.testing.assert_allclose(drawn[3], [patches['class 5']] * 4)
    np.testing.assert_allclose(drawn[0, :3], [patches['class 0']] * 3)
    # Of the same hue, and darker than any class.
    zero, five = (np.array(patches[f'class {c}']) for c in (0, 5))
    np.testing.assert_allclose(drawn[0, 3], plane_figures.dimmed(zero))
    assert plane_figures.dimmed(zero).mean() < 0.8 * zero.mean()
    assert np.abs(plane_figures.dimmed(zero) - plane_figures.dimmed(five)).max() > 0.1
    other = np.array(figure.axes[3].images[0].get_array())
    np.testing.assert_allclose(other[0, 0], patches['class 9'])
    np.testing.assert_allclose(other[1, 1], patches['class 0'])
    assert 'root-mean-square change' in figure.texts[-1].get_text()
    everywhere = planes._replace(inside=np.ones_like(planes.inside), record={'norm': 'l2'})
    figure = plane_figures.regions(everywhere)
    assert 'darker: outside [0, 1]' not in legend_texts(figure)
    assert 'L₂ distance from the image, in units of ε' in figure.texts[-1].get_text()


@pytest.fixture
def response(planes) -> Planes:
    """Of four models on one image: the label is right of x = -1, -0.5, y = 0.5 and everywhere."""
    middles = 0.5 * (np.arange(8) - 3.5)
    x, y = np.meshgrid(middles, middles)
    margins = np.stack([x + 1, x + 0.5, 0.5 - y, 1 + 0 * x]).astype(np.float32)[None]
    clean, other = 'Ensemble2, seed 0', 'Ensemble2Adv, seed 0'
    inside = np.ones((1, 8, 8), bool)
    inside[0, :, 7] = False
    return planes._replace(
        names=(clean, f'{clean}, member 2', other, f'{other}, member 1'),
        member=np.array([0, 2, 0, 1], np.int32),
        clean=np.array([True, True, False, False]),
        attacked=(clean, other),
        classes=(margins < 0).astype(np.int16),
        margins=margins,
        inside=inside,
        point_classes=np.zeros((1, 4, 3), np.int16),
        **{name: getattr(planes, name)[:1]
           for name in ('places', 'saturated', 'labels', 'images', 'points', 'region', 'notes')},
    )  # fmt: skip


def test_boundaries_are_where_the_label_ends(response):
    figure = plane_figures.boundaries([response, response])
    _, panel, other = figure.axes
    found = {}
    for lines in panel.collections:
        (path,) = lines.get_paths()
        solid = lines.get_linestyles()[0][1] is None
        found[to_hex(lines.get_edgecolor()[0]), solid] = path.vertices
    black, green = '#000000', '#009e73'
    # The one that gives the label all of the plane has no boundary in it.
    assert set(found) == {(black, True), (green, True), (black, False)}
    np.testing.assert_allclose(found[black, True][:, 0], -1, atol=1e-6)
    np.testing.assert_allclose(found[green, True][:, 0], -0.5, atol=1e-6)
    np.testing.assert_allclose(found[black, False][:, 1], 0.5, atol=1e-6)
    # Of the square of side 2 around the image.
    shares = plane_figures.label_shares(response, 0)
    np.testing.assert_allclose(shares, [1, 0.75, 0.75, 1])
    assert panel.get_title() == other.get_title() == 'label: 100 % → 75 %'
    drawn = np.array(panel.images[0].get_array())
    assert (drawn[:, :7] == 1).all()
    assert (drawn[:, 7] < 0.9).all()
    assert panel.get_ylabel().split('\n') == ['(a) Ensemble2', '→ Ensemble2Adv', 'seed 0']
    points = [[float(v) for v in line.get_xydata()[0]] for line in panel.lines]
    assert points == [[0.5, 1], [1, 0], [0, 0]]
    assert legend_texts(figure)[-3:] == ['network or whole ensemble', 'member 1', 'member 2']


def test_regions_of_a_response_are_those_of_the_ensembles(response):
    assert len(plane_figures.regions(response).axes) == 3  # the image and two of four models


def test_planes_show_points_arrows_and_the_region(planes):
    figure = plane_figures.regions(planes)
    panel, other = figure.axes[2:]
    first, second, image = ([float(v) for v in line.get_xydata()[0]] for line in panel.lines)
    assert (image, first, second) == ([0, 0], [1, 0], [0.5, 1])
    ends = [(a.xyann, tuple(map(float, a.xy))) for a in panel.texts if a.arrow_patch]
    assert [tuple(end) for _, end in ends] == [(1, 0), (0.5, 1)]
    assert all(tuple(start) == (0, 0) for start, _ in ends)
    assert panel.get_title() == 'image ✓   1 ✓   2 ✗'
    assert other.get_title() == 'image ✓   1 ✗   2 ✓'
    # The padding is left out; a polygon's first corner is repeated at its end.
    assert len(panel.patches[0].get_xy()) == 5
    np.testing.assert_array_equal(other.patches[0].get_xy()[:3], [(0, -1), (1, 1), (-1, 1)])
    assert legend_texts(figure)[-2:] == [
        '1: adversarial example of SingleAdv, seed 0',
        '2: adversarial example of Ensemble2Adv, seed 1',
    ]
    notes, _ = figure.texts
    assert notes.get_text() == 'Test image 12: both adversarial examples are the same'


def test_planes_of_attacks_that_found_one_point_or_none(planes):
    points = np.array([[(0, 0), (1, 0), (1, 0)], [(0, 0), (0, 0), (0, 0.5)]], np.float32)
    figure = plane_figures.regions(planes._replace(points=points))
    texts = [[text.get_text() for text in figure.axes[i].texts] for i in (2, 3)]
    assert texts == [['', '1, 2'], ['1', '', '2']]  # '' is an arrow
    assert drawing.png(figure)


def test_classes_of_planes_have_names_and_more_than_ten_have_colors_of_their_own(planes):
    many = planes._replace(classes=np.arange(32, dtype=np.int16).reshape(2, 1, 4, 4))
    many = many._replace(inside=np.ones_like(planes.inside))
    many = many._replace(record={'class_names': [f'name {i}' for i in range(32)]})
    figure = plane_figures.regions(many)
    assert figure.axes[0].get_title() == 'test image 7\nname 0'
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == many.record['class_names']
    assert len({to_rgb(patch.get_facecolor()) for patch in legend.get_patches()}) == 32


def test_numbers_of_classes_are_not_taken_for_those_of_the_points(planes):
    named = planes._replace(record={'class_names': [str(i) for i in range(10)]})
    figure = plane_figures.regions(named)
    assert 'class 5' in legend_texts(figure)
    assert figure.axes[0].get_title() == 'test image 7\nclass 0'


def test_legends_stay_within_the_figure(planes, response, training):
    named = planes._replace(record={'class_names': ['a class with a long name'] * 10})
    bands = {f'a system with a long name {i}': band([1, 2], [0, 1]) for i in range(9)}
    points = dict.fromkeys(bands, 2)
    for figure in (
        training,
        plane_figures.regions(planes),
        plane_figures.regions(named),
        plane_figures.boundaries([response]),
        plane_figures.regions(planes._replace(attacked=('a system with a name that is long', 'b'))),
        figures.over_training(bands, points, attack='PGD20'),
    ):
        figure.draw_without_rendering()
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0


def test_files_are_png_and_pdf_with_embedded_fonts(training, tmp_path):
    drawing.save(training, epath.Path(tmp_path) / 'report' / 'figure2.b')
    assert sorted(p.name for p in (tmp_path / 'report').iterdir()) == [
        'figure2.b.pdf', 'figure2.b.png',
    ]  # fmt: skip
    png = (tmp_path / 'report' / 'figure2.b.png').read_bytes()
    assert png.startswith(b'\x89PNG\r\n\x1a\n')
    assert int.from_bytes(png[16:20], 'big') == 660  # 3.3 inches at 200 dots
    pdf = (tmp_path / 'report' / 'figure2.b.pdf').read_bytes()
    assert pdf.startswith(b'%PDF')
    assert b'/Type3' not in pdf
    assert b'/FontFile2' in pdf
    assert b'CreationDate' not in pdf


def test_the_same_arrays_give_the_same_bytes_and_change_nothing_global(planes, response, tmp_path):
    before = dict(matplotlib.rcParams)
    contents = []
    for folder in ('a', 'b'):
        path = epath.Path(tmp_path) / folder
        drawing.save(plane_figures.regions(planes), path / 'planes')
        accuracy = {'A': (0.3, 0.25, 0.4), 'B': (0.2, 0.2, 0.2)}
        panel = Panel('', 'parameters (millions)', {'A': 1.0, 'B': 2.0}, {'A'})
        figure = figures.computation([panel], accuracy)
        assert drawing.png(figure) == drawing.png(figure)
        drawing.save(figure, path / 'computation')
        contents.append({p.name: p.read_bytes() for p in path.iterdir()})
        contents[-1]['boundaries'] = drawing.png(plane_figures.boundaries([response]))
    assert len(contents[0]) == 5
    assert contents[0] == contents[1]
    assert dict(matplotlib.rcParams) == before
