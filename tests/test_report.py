"""The report job as a whole: every file of it, from runs that were never trained."""

import csv
import html
import json
import pathlib
import shutil
import subprocess
import sys

import browser
import numpy as np
import pytest
import report_runs
from conftest import ROOT
from etils import epath
from matplotlib.figure import Figure
from report_runs import (
    CIFAR10,
    DIGITS,
    PAPER_STEPS,
    paper_config,
    run_config,
    write_ensemble,
    write_run,
)

from ensadv.report import drawing, plane_figures
from ensadv.report import write as report
from ensadv.storage import plane_files
from ensadv.storage.plane_files import Planes

LAST = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5, 'pgd500': 0.4}
ALL = ('baseline', 'ensemble2', 'ensemble4', 'singleadv', 'doubleadv', 'ensemble2adv',
       'ensemble4adv', 'separate2adv')  # fmt: skip
QUICK = ('baseline', 'singleadv', 'doubleadv', 'ensemble2adv', 'separate2adv')
TABLES = {'report.md', 'table1.csv', 'table1.tex', 'report.html'}
OVER_TRAINING = {'over_training.csv', 'over_training.tex'}
COMPARISONS = {
    'differences.csv', 'differences.tex', 'computation.csv', 'computation.tex',
    *(f'figure_{name}.{kind}' for name in ('differences', 'computation')
      for kind in ('png', 'pdf')),
}  # fmt: skip


def figure(*names: str) -> set[str]:
    return {f'figure{name}.{kind}' for name in names for kind in ('png', 'pdf')}


def study(root, systems, seeds: int, evaluations: int, *, like_paper: bool = False) -> None:
    """Writes the runs of a study whose accuracies rise, system by system; each sees its own noise.

    The best snapshot is the last but one. The runs are of tiny networks on digits, or the paper's.
    """
    n = report_runs.N
    make, dataset = (paper_config, CIFAR10) if like_paper else (run_config, DIGITS)
    every = (PAPER_STEPS if like_paper else 100 * evaluations) // evaluations
    attacks = ('clean', 'ifgsm5', 'pgd5', 'pgd20', 'blackbox')
    for number, system in enumerate(systems):
        for seed in range(seeds):
            rng = np.random.default_rng([number, seed])
            config = make(system, seed=seed, train__steps=every * evaluations,
                          eval__attacks=attacks)  # fmt: skip
            results = {}
            for place in range(evaluations):
                share = (place + 1) / evaluations - (place == evaluations - 1) * 0.2
                level = 0.1 * share + 0.05 * number
                results[every * (place + 1)] = {
                    attack: rng.random(n) < top + level
                    for attack, top in zip(attacks, (0.5, 0.3, 0.25, 0.2, 0.4), strict=True)
                }
            for place in (evaluations - 1, evaluations):
                results[every * place]['pgd500'] = rng.random(n) < 0.2 + 0.05 * number
            path = root / f'{system}_seed{seed}'
            size = config.ensemble.size * (2 if system == 'doubleadv' else 1)
            operations = {k: size * v for k, v in report_runs.OPERATIONS.items()}
            write_run(path, config, results, parameters=36_000_000 * size, operations=operations,
                      session={'seconds_per_step': 0.2 * size + 0.01 * seed},
                      dataset=dataset)  # fmt: skip
            report_runs.write_examples(
                path, config, every * evaluations, shift=0.01 * number, count=1
            )


def planes() -> Planes:
    region = np.array([[(-1, -1), (1, -1), (1, 1), (-1, 1)]], np.float32)
    return Planes(
        names=('SingleAdv, seed 0', 'DoubleAdv, seed 0'),
        member=np.zeros(2, np.int32),
        clean=np.zeros(2, bool),
        attacked=('SingleAdv, seed 0', 'DoubleAdv, seed 0'),
        places=np.array([7], np.int32),
        saturated=np.zeros(1, np.int32),
        labels=np.array([0], np.int32),
        images=np.full((1, 8, 8, 1), 99, np.uint8),
        window=np.array(4, np.float32),
        classes=np.zeros((1, 2, 4, 4), np.int16),
        margins=np.ones((1, 2, 4, 4), np.float32),
        inside=np.ones((1, 4, 4), bool),
        points=np.array([[(0, 0), (1, 0), (0.5, 1)]], np.float32),
        point_classes=np.zeros((1, 2, 3), np.int16),
        region=region,
        notes=('',),
        record={'attack': 'pgd20', 'places': []},
    )


def response(system: str = 'SingleAdv', place: int = 7) -> Planes:
    names = 'Baseline, seed 0', f'{system}, seed 0'
    margins = np.ones((1, 2, 4, 4), np.float32)
    margins[0, 0, :2] = -1  # the lower half is not the label's
    return planes()._replace(
        names=names, attacked=names, clean=np.array([True, False]), margins=margins,
        places=np.array([place], np.int32),
    )  # fmt: skip


def written(root) -> set[str]:
    return {path.name for path in (pathlib.Path(root) / 'report').iterdir()}


def read(root, name: str) -> str:
    return (pathlib.Path(root) / 'report' / name).read_text()


def csv_rows(root, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(read(root, f'{name}.csv').splitlines()))


def write_report(root) -> str:
    """Writes the report; returns the page, its entities resolved."""
    path = report.write(epath.Path(root))
    assert path == epath.Path(root) / 'report' / 'report.html'
    return html.unescape(path.read_text())


def one_run(root, name: str = 'run', **changes) -> pathlib.Path:
    return write_run(root / name, run_config(**changes), {40: LAST})


@pytest.fixture
def quick(monkeypatch) -> None:
    """Draws all figures, but writes a dot for each: the test looks at something else."""
    dot = drawing.png(Figure((0.1, 0.1)))
    monkeypatch.setattr(drawing, '_written', lambda figure, **options: dot)


@pytest.fixture(scope='module')
def paper_study(tmp_path_factory) -> pathlib.Path:
    """All systems of the paper, and their report, written where there is no JAX."""
    root = tmp_path_factory.mktemp('study')
    study(root, ALL, seeds=3, evaluations=10, like_paper=True)
    for run, name, found in (('baseline_seed0', 'baseline_seed0-singleadv_seed0', response()),
                             ('ensemble2adv_seed0', 'members', planes()),
                             ('ensemble2adv_seed1', 'members', planes())):  # fmt: skip
        plane_files.write(epath.Path(root) / run / 'planes' / f'{name}.npz', found)
    script = (
        'import sys, runpy, importlib.metadata as m; sys.modules.update('
        'dict.fromkeys(("jax", "jaxlib", "tensorflow", "flax"))); '
        'found = m.distribution; m.distribution = lambda name: '
        'found("none" if name.startswith("jax") else name); '
        'runpy.run_path("main.py", run_name="__main__")'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', script, '--mode=report', f'--workdir={root}'],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (root / 'stdout').write_text(done.stdout)
    return root


def test_a_study_of_all_systems_gets_every_file(paper_study):
    expected = figure('2a', '2b', '2c', '3', '_examples', '4_baseline_seed0-singleadv_seed0',
                      '4_ensemble2adv_seed0_members', '4_ensemble2adv_seed1_members')  # fmt: skip
    assert written(paper_study) == TABLES | OVER_TRAINING | COMPARISONS | expected
    page = html.unescape(read(paper_study, 'report.html'))
    for text in (
        '24, of 8 systems',
        'cifar10, 100 of 10,000 test images',
        'L-infinity, epsilon 0.03137 (8/255)',
        "The paper's claims",
        'Ensemble4Adv − Ensemble2Adv: ',
        "paper: the paper's own numbers",
        'Figure 3, as measured',
        'Figure 4. Decision regions of Baseline, seed 0 and SingleAdv, seed 0',
    ):
        assert text in page
    # Each run asked for a black box, and every figure is on the page itself.
    assert page.count('data:image/png;base64,') == len(expected | COMPARISONS) // 2 - 2
    assert 'Not in this report' not in page


def test_what_is_printed_is_the_first_table_and_where_the_report_is(paper_study):
    printed = (paper_study / 'stdout').read_text().strip().split('\n')
    assert printed[0] == '## Last snapshot'
    assert printed[-1] == f'The report: {paper_study / "report" / "report.html"}'
    assert sum(line.startswith('| Ensemble4Adv ') for line in printed) == 1


def test_the_csv_are_numbers(paper_study):
    for name in ('table1', 'differences', 'computation'):
        rows = csv_rows(paper_study, name)
        assert rows
        assert all(None not in row for row in rows)
    # Ensemble2 is no more robust than DoubleAdv, and Separate2Adv the most robust of all.
    fronts = {row['system']: row['on_front_of'] for row in rows}
    assert fronts['Ensemble2'] == ''
    assert fronts['Separate2Adv'].startswith('parameters; prediction; ')
    assert [float(row['parameters']) for row in rows[:3]] == [36e6, 72e6, 144e6]
    rows = csv_rows(paper_study, 'table1')
    mine = [
        row for row in rows
        if (row['table'], row['system'], row['attack'], row['reading'])
        == ('last_snapshot', 'SingleAdv', 'clean', 'worst iterate')
    ]  # fmt: skip
    assert [row['seed'] for row in mine] == ['0', '1', '2', 'all']
    for seed, row in enumerate(mine[:3]):
        path = paper_study / f'singleadv_seed{seed}' / 'eval' / f'{PAPER_STEPS}.json'
        assert float(row['accuracy']) == json.loads(path.read_text())['attacks'][0]['accuracy']
    mean = sum(float(row['accuracy']) for row in mine[:3]) / 3
    assert float(mine[3]['accuracy']) == pytest.approx(mean)


def test_differences_agree_with_the_table(paper_study):
    rows = csv_rows(paper_study, 'table1')
    means = {
        (row['system'], row['attack']): 100 * float(row['accuracy']) for row in rows
        if (row['table'], row['seed'], row['reading']) == ('last_snapshot', 'all', 'worst iterate')
    }  # fmt: skip
    found = csv_rows(paper_study, 'differences')
    assert len(found) == 6 * 8 * 7 / 2
    for row in found:
        expected = means[row['first'], row['attack']] - means[row['second'], row['attack']]
        assert float(row['difference_points']) == pytest.approx(expected)
        assert float(row['low']) <= float(row['difference_points']) <= float(row['high'])


@pytest.mark.skipif(browser.find() is None, reason='no Chromium')
def test_a_browser_finds_nothing_wrong_with_the_page(paper_study):
    assert browser.problems(paper_study / 'report' / 'report.html') == []


@pytest.mark.usefixtures('quick')
def test_a_quick_study(tmp_path):
    study(tmp_path, QUICK, seeds=1, evaluations=2)
    page = write_report(tmp_path)
    expected = TABLES | OVER_TRAINING | COMPARISONS
    assert written(tmp_path) == expected | figure('2a', '2b', '2c', '_examples')
    # It is of other data and networks: nothing of the paper's stands beside it, but what it is of
    # its own does.
    for text in ('too little data', "The paper's claims", '<span class="tag">paper</span>'):
        assert text not in page
    assert "The paper's numbers and claims are left out for Baseline, SingleAdv, " in page
    assert 'data.name digits, not cifar10; epsilon 0.15, not 0.03137; ' in page
    assert 'paper' not in {row['reading'] for row in csv_rows(tmp_path, 'table1')}
    assert {row['first'] for row in csv_rows(tmp_path, 'differences')} >= {'Ensemble2Adv'}
    assert 'Averaged over 2 evaluations' in page


@pytest.mark.usefixtures('quick')
def test_a_second_report_removes_what_it_does_not_have(tmp_path):
    study(tmp_path, ('singleadv', 'doubleadv'), seeds=1, evaluations=2)
    write_report(tmp_path)
    for name in ('figure4_old.png', 'table1.md', 'figure2a.svg', 'mine.png', 'notes.md'):
        (tmp_path / 'report' / name).write_text('kept?')
    shutil.rmtree(tmp_path / 'doubleadv_seed0')
    for path in (tmp_path / 'singleadv_seed0' / 'eval').glob('*.npz'):
        path.unlink()
    write_report(tmp_path)
    kept = {'figure2a.svg', 'mine.png', 'notes.md'}
    assert written(tmp_path) == TABLES | OVER_TRAINING | figure('2a', '2b', '2c') | kept


@pytest.mark.usefixtures('quick')
def test_the_same_runs_give_the_same_files(tmp_path):
    one_run(tmp_path)
    write_report(tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / 'report').iterdir()}
    write_report(tmp_path)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / 'report').iterdir()}


@pytest.mark.usefixtures('quick')
def test_only_unfinished_runs_give_a_report_that_says_so(tmp_path, capsys):
    write_run(tmp_path / 'a', run_config(), {20: LAST})
    write_run(tmp_path / 'b', run_config(seed=1), {})
    page = write_report(tmp_path)
    assert written(tmp_path) == TABLES
    expected = 'a: unfinished: evaluated up to step 20, of 40 steps.'
    assert expected in page
    assert expected in read(tmp_path, 'report.md')
    assert expected in capsys.readouterr().out
    assert read(tmp_path, 'table1.csv').count('\n') == 1


@pytest.mark.usefixtures('quick')
def test_a_runs_own_workdir_is_a_root(tmp_path):
    one_run(tmp_path, 'a run')
    page = write_report(tmp_path / 'a run')
    assert '1, of 1 systems' in page
    # One evaluation is no line over training, and no axes are drawn for it.
    assert not written(tmp_path / 'a run') & figure('2a', '2b')
    assert 'Over training' not in page
    # The report is no run, and does not hinder the next one.
    write_report(tmp_path / 'a run')


@pytest.mark.usefixtures('quick')
def test_damaged_planes_are_left_out_and_said_to_be(tmp_path):
    run = one_run(tmp_path)
    (run / 'planes').mkdir()
    (run / 'planes' / 'members.npz').write_bytes(b'damaged')
    page = write_report(tmp_path)
    assert 'Left out: ' in page
    assert 'members.npz' in page
    assert not written(tmp_path) & figure('4_run_members')


@pytest.mark.usefixtures('quick')
def test_responses_of_the_same_images_are_one_figure_in_the_papers_order(tmp_path, monkeypatch):
    run, drawn = one_run(tmp_path), []
    for name, found in (('a', response('DoubleAdv')), ('b', response('DoubleAdv', place=8)),
                        ('c', response('SingleAdv')), ('d', planes())):  # fmt: skip
        plane_files.write(epath.Path(run) / 'planes' / f'{name}.npz', found)

    def draw(responses):
        drawn.append([(each.attacked[1], each.places.tolist()) for each in responses])
        return Figure((0.1, 0.1))

    monkeypatch.setattr(plane_figures, 'boundaries', draw)
    monkeypatch.setattr(plane_figures, 'regions', lambda found: Figure((0.1, 0.1)))
    page = write_report(tmp_path)
    single, double = 'SingleAdv, seed 0', 'DoubleAdv, seed 0'
    assert drawn == [[(single, [7]), (double, [7])], [(double, [8])]]
    assert {name for name in written(tmp_path) if 'figure3' in name} == figure('3', '3_2')
    first, second = (f'50 % by Baseline, seed 0 and 100 % by {name}' for name in (single, double))
    assert f'on average over these 1 images: {first}; {second}.' in page
    assert f'on average over these 1 images: {second}.' in page
    assert 'the first of the test set without a pixel value within epsilon of 0 or 1' in page


@pytest.mark.usefixtures('quick')
def test_examples_other_than_the_first_systems_are_left_out(tmp_path):
    for name, system in (('a', 'baseline'), ('b', 'singleadv')):
        run = one_run(tmp_path, name, system=system)
        report_runs.write_examples(run, run_config(system), 40, count=3 if name == 'b' else 2)
    assert 'No examples, or others, are stored for SingleAdv.' in write_report(tmp_path)
    # The seed that has the same images is the one that is shown.
    run = one_run(tmp_path, 'd', system='singleadv', seed=1)
    report_runs.write_examples(run, run_config(seed=1), 40)
    assert 'with others' not in write_report(tmp_path)


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('channels, said', [(1, False), (2, True), (3, False), (5, True)])
def test_images_of_unusual_channels_are_said_to_be_drawn_in_grey(tmp_path, channels, said):
    run = one_run(tmp_path)
    report_runs.write_examples(run, run_config(), 40, channels=channels)
    images = np.full((1, 8, 8, channels), 99, np.uint8)
    plane_files.write(epath.Path(run) / 'planes' / 'members.npz', planes()._replace(images=images))
    sentence = f'Images have {channels} channels; their mean is drawn in grey.'
    # Below the examples, and below the planes.
    assert write_report(tmp_path).count(sentence) == (2 if said else 0)


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('content', [b'damaged', None])
def test_damaged_examples_are_left_out(tmp_path, content):
    run = one_run(tmp_path)
    path = run / 'eval' / '40_examples.npz'
    if content is None:
        np.savez(path, label=np.zeros(2))
    else:
        path.write_bytes(content)
    write_report(tmp_path)
    assert not written(tmp_path) & figure('_examples')


@pytest.mark.usefixtures('quick')
def test_curves_of_several_restarts_are_said_to_be_of_the_first(tmp_path):
    one_run(tmp_path, eval__pgd__restarts=3)
    assert 'Only the first of 3 restarts is shown.' in write_report(tmp_path)


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize(
    'changes',
    [
        {'eval__iterate_examples': 0},
        {'eval__pgd__restarts': 2},
        {'eval__num_examples': 1},
    ],
    ids=str,
)
def test_unusual_runs(tmp_path, changes):
    one_run(tmp_path, **changes)
    one_run(tmp_path, 'other', system='doubleadv', **changes)
    page = write_report(tmp_path)
    assert 'nan' not in read(tmp_path, 'report.md').lower().replace('nan; they', '')
    assert '2, of 2 systems' in page


@pytest.mark.usefixtures('quick')
def test_a_curve_of_fewer_seeds_than_the_table_says_so(tmp_path):
    one_run(tmp_path, 'a')
    without = {attack: accuracy for attack, accuracy in LAST.items() if attack != 'pgd500'}
    write_run(tmp_path / 'b', run_config(seed=1), {40: without})
    write_run(tmp_path / 'c', run_config('baseline'), {40: without})
    assert 'Not all seeds have it: Baseline (0 of 1), SingleAdv (1 of 2).' in write_report(tmp_path)


@pytest.mark.usefixtures('quick')
def test_clean_accuracy_alone(tmp_path):
    config = run_config(eval__attacks=('clean',), eval__long_attacks=())
    write_run(tmp_path / 'a', config, {20: {'clean': 0.8}, 40: {'clean': 0.9}})
    write_report(tmp_path)
    assert written(tmp_path) == TABLES | OVER_TRAINING
    assert '| SingleAdv |  clean |    80.0 |    90.0 |' in read(tmp_path, 'report.md')


@pytest.mark.usefixtures('quick')
def test_accuracy_over_training(tmp_path):
    """Means over the seeds, at up to six of the steps that all runs have, the ends among them."""
    counts = {step: place / 10 for place, step in enumerate(range(4, 41, 4))}
    for seed, higher in enumerate((0, 0.02)):
        config = run_config(seed=seed, eval__attacks=('clean', 'ifgsm5'))
        config.train.snapshot_every = 4
        write_run(tmp_path / f'seed{seed}', config, {
            step: {'clean': 0.5, 'ifgsm5': low + higher} for step, low in counts.items()
            if seed or step != 12
        })  # fmt: skip
    write_report(tmp_path)
    table = read(tmp_path, 'report.md').split('### Accuracy over training\n\n')[1].split('\n\n')[0]
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.split('\n')]
    assert rows[0] == ['system', 'attack', *(f'step {step}' for step in (4, 16, 20, 28, 32, 40))]
    assert rows[2] == ['SingleAdv', 'clean', *6 * ['50.0']]
    assert rows[3] == ['SingleAdv', 'IFGSM5', '1.0', '31.0', '41.0', '61.0', '71.0', '91.0']
    numbers = csv_rows(tmp_path, 'over_training')
    assert len(numbers) == 2 * 20 - 2
    assert {(row['seed'], row['step'], row['attack'], row['accuracy']) for row in numbers} >= {
        ('1', '12', 'ifgsm5', '0.22'), ('0', '40', 'clean', '0.5')
    }  # fmt: skip


@pytest.mark.usefixtures('quick')
def test_selection_on_the_validation_split_is_said(tmp_path):
    config = run_config(eval__select_on='validation', data__validation_examples=100)
    write_run(tmp_path / 'a', config, {40: LAST | {'validation_ifgsm5': 0.5}})
    assert 'selected on the validation split.' in write_report(tmp_path)


@pytest.mark.usefixtures('quick')
def test_names_of_any_kind(tmp_path):
    config = run_config()
    config.system = '<b>x</b>|$y_1$ & 50 %'
    write_run(tmp_path / 'a b' / "it's <i>", config, {40: LAST})
    write_run(tmp_path / 'c', run_config('baseline'), {40: LAST})
    path = report.write(epath.Path(tmp_path))
    assert '<b>x' not in path.read_text()
    assert config.system in html.unescape(path.read_text())
    rows = csv_rows(tmp_path, 'table1')
    assert {row['system'] for row in rows} == {'Baseline', config.system}
    assert r'\$y\_1\$ \& 50 \%' in read(tmp_path, 'table1.tex')
    lines = read(tmp_path, 'report.md').split('\n')
    header = next(line for line in lines if line.startswith('| system'))
    mine = next(line for line in lines if line.startswith('| ') and 'x</b>' in line)
    assert mine.replace(r'\|', '').count('|') == header.count('|')


@pytest.mark.usefixtures('quick')
def test_ensembles_of_runs_stand_beside_runs(tmp_path):
    members = [one_run(tmp_path, f's{seed}', seed=seed) for seed in range(4)]
    write_ensemble(tmp_path / 'e0', members[:2], LAST)
    write_ensemble(tmp_path / 'e1', members[2:], LAST)
    page = write_report(tmp_path)
    assert '6, of 2 systems' in page
    assert '0, 1, 2, 3, 0+1, 2+3' in page
    lines = read(tmp_path, 'report.md').split('\n')
    line = next(line for line in lines if line.startswith('| Separate2Adv'))
    assert [cell.strip() for cell in line.split('|')[2:6]] == [
        '2', '2,000', '40.0 ± 0.0', '90.0 ± 0.0'
    ]  # fmt: skip
