"""What the ledgers say, of runs whose correct examples are known."""

import math

import numpy as np
import pytest
from etils import epath
from report_runs import (
    CIFAR10,
    DIGITS,
    PAPER_STEPS,
    N,
    member,
    paper_config,
    run_config,
    write_ledger,
    write_run,
)

from ensadv.report import findings, page, paper, sections
from ensadv.report.collect import collect
from ensadv.storage import files, workdir

FIRST = np.arange(N)
PROVEN, NOT_PROVEN, TOO_LITTLE = 'supported', 'not supported', 'too little data'


def correct(count: int) -> np.ndarray:
    """The first so many examples are correct."""
    return count > FIRST


def write(root, system: str, *counts: int, attack: str = 'pgd20', **changes) -> None:
    """Writes a run for each of these numbers of correct examples."""
    for seed, count in enumerate(counts):
        outcomes = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5, attack: correct(count)}
        config = run_config(system, seed=seed, **changes)
        write_run(root / f'{system}{seed}', config, {40: outcomes})


def outcomes_of(root) -> findings.Outcomes:
    collection = collect(epath.Path(root), paper.SYSTEMS)
    assert not collection.apart
    return findings.read_outcomes(collection)


def write_paper(root, system: str, *counts: int, dataset=CIFAR10, **changes) -> None:
    """Writes runs of the paper's system, of these numbers of correct examples."""
    for seed, count in enumerate(counts):
        config = paper_config(system, seed=seed, **changes)
        outcomes = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': correct(count)}
        step = config.train.steps
        write_run(root / f'{system}{seed}', config, {step: outcomes}, dataset=dataset)


def verdicts(root) -> list[page.Claim]:
    return findings.judge_claims(outcomes_of(root))


def left_out(root) -> list[str]:
    return paper.left_out(collect(epath.Path(root), paper.SYSTEMS).systems)


def test_each_claim_of_the_paper_is_judged(tmp_path):
    write_paper(tmp_path, 'singleadv', 30, 31, 32)
    write_paper(tmp_path, 'doubleadv', 50, 51, 52)
    write_paper(tmp_path, 'ensemble2adv', 70, 71, 72)
    write_paper(tmp_path, 'separate2adv', 90, 91, 92)
    over_single, over_double, over_separate, more = verdicts(tmp_path)
    assert over_single.verdict == over_double.verdict == PROVEN
    (text,) = over_single.details
    assert text.startswith('Ensemble2Adv − SingleAdv: +40.0 points (+')
    assert 'under PGD20; seeds 3 and 3, n = 100, McNemar p < 0.0001.' in text
    assert 'opposite' not in text
    assert over_separate.verdict == NOT_PROVEN
    (text,) = over_separate.details
    assert 'Ensemble2Adv − Separate2Adv: −20.0 points' in text
    assert text.endswith('; the data say the opposite.')
    # DoubleAdv is better than SingleAdv, but there is no Ensemble4Adv.
    assert more.verdict == TOO_LITTLE
    assert 'DoubleAdv − SingleAdv: +20.0 points' in more.details[0]
    assert more.details[1] == "Ensemble4Adv − Ensemble2Adv: no run of the paper's Ensemble4Adv."


@pytest.mark.parametrize(
    'wider, more_members, verdict',
    [(50, 85, PROVEN), (50, 70, NOT_PROVEN), (30, 85, NOT_PROVEN)],
)
def test_that_more_parameters_help_needs_both_pairs(tmp_path, wider, more_members, verdict):
    counts = {
        'singleadv': 30, 'doubleadv': wider, 'ensemble2adv': 69, 'ensemble4adv': more_members,
    }  # fmt: skip
    for system, count in counts.items():
        write_paper(tmp_path, system, count - 1, count, count + 1)
    assert verdicts(tmp_path)[3].verdict == verdict


def test_equal_systems_support_nothing_and_are_no_opposite(tmp_path):
    write_paper(tmp_path, 'singleadv', 50, 51, 52)
    write_paper(tmp_path, 'ensemble2adv', 50, 51, 52)
    claim = verdicts(tmp_path)[0]
    assert claim.verdict == NOT_PROVEN
    assert '+0.0 points (−' in claim.details[0]
    assert 'opposite' not in claim.details[0]


def test_two_seeds_are_too_little_however_large_the_difference(tmp_path):
    write_paper(tmp_path, 'singleadv', 10, 11)
    write_paper(tmp_path, 'ensemble2adv', 90, 91, 92)
    claim = verdicts(tmp_path)[0]
    assert claim.verdict == TOO_LITTLE
    assert '+80.5 points' in claim.details[0]
    assert claim.details[0].endswith('seeds 3 and 2, n = 100, McNemar p < 0.0001; a claim needs 3 '
                                     'seeds of each.')  # fmt: skip


def test_without_an_attack_there_is_no_claim(tmp_path):
    for system in ('singleadv', 'ensemble2adv'):
        config = paper_config(system, eval__attacks=('clean',), eval__long_attacks=())
        write_run(tmp_path / system, config, {PAPER_STEPS: {'clean': 0.9}}, dataset=CIFAR10)
    found = outcomes_of(tmp_path)
    assert found.strongest is None
    claims = findings.judge_claims(found)
    assert [claim.verdict for claim in claims] == 4 * [TOO_LITTLE]
    assert claims[0].details == ['Ensemble2Adv − SingleAdv: no attack that all runs have.']


OTHERS = [
    ({'dataset': DIGITS}, 'data.name digits, not cifar10'),
    ({'dataset': CIFAR10 | {'name': 'cifar100'}}, 'data.name cifar100, not cifar10'),
    ({'epsilon': 4 / 255}, 'epsilon 0.01569, not 0.03137'),
    ({'model__name': 'vgg'}, 'model.name vgg, not wide_resnet'),
    ({'ensemble__size': 3}, 'ensemble.size 3, not '),
    ({'train__adversarial_weight': 0.5}, 'train.adversarial_weight 0.5, not 1'),
]
OTHERWISE = [
    ({'attack__steps': 3}, 'attack.steps 3, not 7'),
    ({'train__objective': 'trades'}, 'train.objective trades, not paper'),
    ({'train__awp_gamma': 0.005}, 'train.awp_gamma 0.005, not 0'),
    ({'train__cross_entropy_of': 'members'}, 'train.cross_entropy_of members, not ensemble'),
    ({'train__diversity': 'gal'}, 'train.diversity gal, not none'),
    ({'train__schedule': 'cosine'}, 'train.schedule cosine, not steps'),
]


@pytest.mark.parametrize('changes, reason', [*OTHERS, *OTHERWISE])
def test_of_other_systems_no_claim_is_judged(tmp_path, changes, reason):
    for system, first in (('singleadv', 10), ('ensemble2adv', 90)):
        write_paper(tmp_path, system, first, **changes)
    assert verdicts(tmp_path) == []
    (sentence,) = left_out(tmp_path)
    claims_alone = (changes, reason) in OTHERWISE
    assert sentence.startswith(
        "The paper's claims are left out for SingleAdv, Ensemble2Adv, which were not trained like"
        if claims_alone
        else "The paper's numbers and claims are left out for SingleAdv, Ensemble2Adv, which are "
    )
    assert reason in sentence
    # What a study of one's own wants is there.
    (difference,) = findings.differences(outcomes_of(tmp_path), 'pgd20')
    assert (difference.first, difference.difference_points) == ('Ensemble2Adv', pytest.approx(80))


OTHER_SCALES = [
    ({'model__depth': 16}, 'model.depth 16, not 28'),
    ({'model__width': 4}, 'model.width 4, not 10'),
    ({'train__steps': 300}, 'train.steps 300, not 500,000'),
    ({'train__batch_size': 64}, 'train.batch_size 64, not 128'),
    ({'train__learning_rate': 0.2}, 'train.learning_rate 0.2, not 0.1'),
    (
        {'train__learning_rate_steps': (9,)},
        'train.learning_rate_steps (9), not (30,000, 60,000, 90,000)',
    ),
]


@pytest.mark.parametrize('changes, reason', OTHER_SCALES)
def test_at_another_scale_the_claims_are_judged_and_the_scale_is_said(tmp_path, changes, reason):
    for system, first in (('singleadv', 10), ('ensemble2adv', 90)):
        write_paper(tmp_path, system, first, first + 1, first + 2, **changes)
    found = outcomes_of(tmp_path)
    assert [claim.verdict for claim in findings.judge_claims(found)] == [PROVEN, *3 * [TOO_LITTLE]]
    assert paper.other_scale(found.systems) == reason
    section = sections.claims(found, [])
    assert section.title == "The paper's claims, at another scale"
    assert reason in section.blocks[1]
    is_network = 'model' in reason
    assert left_out(tmp_path) == is_network * [
        "The paper's numbers are left out for SingleAdv, Ensemble2Adv, which are not the paper's: "
        f'{reason}.'
    ]


@pytest.mark.parametrize(
    'doubleadv, ensemble2adv, is_judged',
    [
        ({'model__width': 3}, {}, True),
        ({'model__width': 2}, {}, False),  # no wider than the others
        ({'model__width': 1}, {}, False),
        ({'model__width': 3}, {'model__width': 3}, False),
        ({'model__width': 3}, {'train__steps': 301}, False),
        ({'model__width': 3, 'model__depth': 16}, {}, False),
    ],
)
def test_claims_are_judged_at_one_scale(tmp_path, doubleadv, ensemble2adv, is_judged):
    small = {'model__depth': 10, 'model__width': 2, 'train__steps': 300}
    write_paper(tmp_path, 'singleadv', 30, **small)
    write_paper(tmp_path, 'doubleadv', 40, **(small | doubleadv))
    write_paper(tmp_path, 'ensemble2adv', 50, **(small | ensemble2adv))
    assert bool(verdicts(tmp_path)) == is_judged
    assert len(left_out(tmp_path)) == 1


def test_at_the_papers_scale_its_claims_have_no_other(tmp_path):
    write_paper(tmp_path, 'singleadv', 30)
    write_paper(tmp_path, 'ensemble2adv', 50)
    found = outcomes_of(tmp_path)
    assert paper.other_scale(found.systems) == ''
    assert sections.claims(found, []).title == "The paper's claims"


def test_what_the_systems_wrote_down_is_the_papers(tmp_path):
    """The configs of configs/ are the paper's systems, and so are ensembles of their runs."""
    systems = [name.lower() for name in paper.SYSTEMS]
    for system in systems:
        write_paper(tmp_path, system, 50)
    assert left_out(tmp_path) == []
    members = [tmp_path / 'singleadv0', tmp_path / 'doubleadv0']
    outcomes = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5}
    for name, of in (('same', [members[0]] * 2), ('mixed', members)):
        config = paper_config('separate2adv')
        write_run(tmp_path / name / 'e', config, {PAPER_STEPS: outcomes}, dataset=CIFAR10,
                  members=[member(path) for path in of])  # fmt: skip
    assert left_out(tmp_path / 'same') == []
    (sentence,) = left_out(tmp_path / 'mixed')
    assert sentence.endswith("which are not the paper's: model.width 15, not 10.")


def test_a_claim_about_a_system_that_is_not_the_papers_is_not_judged(tmp_path):
    for system in ('singleadv', 'ensemble2adv'):
        write_paper(tmp_path, system, 30, 31, 32)
    write_paper(tmp_path, 'doubleadv', 10, 11, 12, model__width=20)
    claims = verdicts(tmp_path)
    assert [claim.verdict for claim in claims] == [NOT_PROVEN, *3 * [TOO_LITTLE]]
    assert claims[1].details == ["Ensemble2Adv − DoubleAdv: no run of the paper's DoubleAdv."]
    (sentence,) = left_out(tmp_path)
    assert sentence == (
        "The paper's numbers and claims are left out for DoubleAdv, which are not the paper's: "
        'model.width 20, not 15.'
    )


def test_one_system_is_no_claim_and_ones_own_is_not_left_out(tmp_path):
    write_paper(tmp_path, 'singleadv', 30, 31, 32)
    assert verdicts(tmp_path) == []
    config = run_config()
    config.system = 'Mine'
    write_run(tmp_path / 'own' / 'mine', config, {40: {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5}})
    assert left_out(tmp_path / 'own') == []


def test_the_attack_with_the_most_steps_that_all_runs_have_decides(tmp_path):
    write(tmp_path, 'singleadv', 30, attack='pgd500')
    write(tmp_path, 'doubleadv', 40, attack='pgd500')
    assert outcomes_of(tmp_path).strongest == 'pgd500'
    write(tmp_path, 'ensemble2adv', 50)
    assert outcomes_of(tmp_path).strongest == 'pgd20'


def test_autoattack_decides_where_all_have_it_though_on_fewer_examples(tmp_path):
    # By their first 10 examples the second is better, by all of them the first.
    settings = {'eval__long_attacks': ('autoattack',), 'eval__autoattack__examples': 10}
    for system, first, rest in (('singleadv', 4, 40), ('doubleadv', 6, 20)):
        correct = np.concatenate([np.arange(10) < first, np.arange(N - 10) < rest])
        attacks = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': correct, 'autoattack': correct[:10]}
        write_run(tmp_path / system, run_config(system, **settings), {40: attacks})
    found = outcomes_of(tmp_path)
    assert (found.notes, found.strongest) == ([], 'autoattack')
    d = found.difference('DoubleAdv', 'SingleAdv', 'autoattack')
    assert (d.n, round(d.difference_points)) == (10, 20)
    assert d.low <= 20 <= d.high
    assert found.difference('DoubleAdv', 'SingleAdv', 'pgd20').n == N
    assert found.accuracy('DoubleAdv', 'autoattack')[0] == 0.6
    write_run(
        tmp_path / 'without',
        run_config('baseline'),
        {40: {'clean': 0.9, 'ifgsm5': 0.5, 'pgd20': 0.1}},
    )
    assert outcomes_of(tmp_path).strongest == 'pgd20'


def test_a_claim_says_what_a_weaker_attack_on_more_examples_finds(tmp_path):
    """It does not decide: under AutoAttack the first is better, on all examples the second."""
    settings = {'eval__long_attacks': ('autoattack',), 'eval__autoattack__examples': 10}
    for system, first, rest in (('singleadv', 1, 80), ('ensemble2adv', 9, 20)):
        for seed in range(3):
            correct = np.concatenate([np.arange(10) < first, np.arange(N - 10) < rest])
            attacks = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': correct, 'autoattack': correct[:10]}
            config = paper_config(system, seed=seed, **settings)
            write_run(tmp_path / f'{system}{seed}', config, {PAPER_STEPS: attacks}, dataset=CIFAR10)
    claim = verdicts(tmp_path)[0]
    assert claim.verdict == PROVEN
    decides, other = claim.details
    assert 'under AutoAttack; seeds 3 and 3, n = 10, ' in decides
    assert other.startswith('Ensemble2Adv − SingleAdv: −52.0 points (')
    assert other.endswith(') under PGD20, n = 100: weaker, so it does not decide.')


def test_differences_by_hand(tmp_path):
    write(tmp_path, 'singleadv', 50, 40, 45)
    write(tmp_path, 'ensemble2adv', 60, 70)
    d = outcomes_of(tmp_path).difference('Ensemble2Adv', 'SingleAdv', 'pgd20')
    assert (d.difference_points, d.n) == (pytest.approx(65 - 45), 100)
    assert (d.seeds_first, d.seeds_second) == (2, 3)
    assert d.low < 20 < d.high
    # Of the first two seeds each: d_i is 1 for examples 40..49, 2 for 50..59, 1 for 60..69, and
    # z^2 = 40^2 / (10 + 40 + 10). Of one degree of freedom, P(chi^2 > z^2) = erfc(z / sqrt(2)).
    assert d.p_mcnemar == pytest.approx(math.erfc(math.sqrt(1600 / 60 / 2)))
    table = findings.differences_table([d])
    assert table.rows[0].cells[:2] == ('Ensemble2Adv − SingleAdv', '+20.0')
    assert table.rows[0].cells[3:] == ('< 0.0001', '2, 3')
    assert any('as many of them as the other has' in note for note in table.notes)


def test_one_seed_each_is_tested_exactly(tmp_path):
    for system, places in (('singleadv', [0, 10]), ('ensemble2adv', [0, 1, 2, 3, 4, 5])):
        right = np.isin(FIRST, places)
        config = run_config(system)
        write_run(tmp_path / system, config, {40: {'clean': 1.0, 'ifgsm5': 0.5, 'pgd20': right}})
    d = outcomes_of(tmp_path).difference('Ensemble2Adv', 'SingleAdv', 'pgd20')
    assert d.difference_points == pytest.approx(4)
    # Only Ensemble2Adv: 5, only SingleAdv: 1. Two-sided: 2 (1 + 6) / 2^6.
    assert d.p_mcnemar == pytest.approx(14 / 64)
    notes = findings.differences_table([d]).notes
    assert any(note.startswith('One seed each: the interval does not') for note in notes)


def test_of_one_seed_the_interval_is_that_of_its_examples(tmp_path):
    write(tmp_path, 'singleadv', 36)
    mean, low, high = outcomes_of(tmp_path).accuracy('SingleAdv', 'pgd20')
    assert mean == 0.36
    # The standard error is sqrt(.36 x .64 / 100) = .048, and 1.96 of it .094.
    assert (low, high) == (pytest.approx(0.266, abs=0.015), pytest.approx(0.454, abs=0.015))


def test_every_pair_is_compared_once_the_claims_first(tmp_path):
    for system in ('baseline', 'singleadv', 'doubleadv', 'ensemble2adv'):
        write(tmp_path, system, 50)
    found = findings.differences(outcomes_of(tmp_path), 'pgd20')
    assert [(d.first, d.second) for d in found] == [
        ('Ensemble2Adv', 'SingleAdv'),
        ('Ensemble2Adv', 'DoubleAdv'),
        ('DoubleAdv', 'SingleAdv'),
        ('SingleAdv', 'Baseline'),
        ('DoubleAdv', 'Baseline'),
        ('Ensemble2Adv', 'Baseline'),
    ]
    notes = findings.differences_table(found).notes
    assert any(note.startswith('Of 6 pairs of equal systems about 0.3') for note in notes)


@pytest.mark.parametrize(
    'odd', ['singleadv0', 'ensemble2adv0', 'baseline0'], ids=['second', 'last', 'first']
)
def test_a_ledger_that_contradicts_its_results_is_left_out(tmp_path, odd):
    for system in ('baseline', 'singleadv', 'ensemble2adv'):
        write(tmp_path, system, 50)
    config = run_config(odd[:-1])
    write_ledger(tmp_path / odd, config, 40, {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.51})
    found = outcomes_of(tmp_path)
    assert found.notes == [
        f'{odd} is left out of the comparisons: its ledger and its results differ in pgd20.'
    ]
    assert len(found.systems) == 2


@pytest.mark.parametrize('odd', ['baseline0', 'singleadv0', 'ensemble2adv0'])
def test_a_ledger_of_other_examples_is_left_out_wherever_it_stands(tmp_path, odd):
    for system in ('baseline', 'singleadv', 'ensemble2adv'):
        write(tmp_path, system, 50)
    path = epath.Path(tmp_path) / odd / 'eval' / '40.npz'
    ledger = workdir.read_ledger(path)
    files.write_arrays(path, ledger | {'label': ledger['label'][::-1].copy()})
    found = outcomes_of(tmp_path)
    assert found.notes == [
        f'{odd} is left out of the comparisons: its ledger is of other examples.'
    ]
    assert {name: array.shape for name, array in found.correct.items()} == dict.fromkeys(
        ('clean', 'ifgsm5', 'pgd20'), (2, N)
    )


@pytest.mark.parametrize('content', [None, b'damaged'])
def test_a_run_without_a_ledger_is_left_out(tmp_path, content):
    write(tmp_path, 'singleadv', 50, 60)
    path = tmp_path / 'singleadv1' / 'eval' / '40.npz'
    path.unlink() if content is None else path.write_bytes(content)
    found = outcomes_of(tmp_path)
    (note,) = found.notes
    assert note.startswith('singleadv1 is left out of the comparisons: ')
    assert found.accuracy('SingleAdv', 'pgd20')[0] == 0.5


def test_no_ledger_at_all_is_no_outcome(tmp_path):
    write(tmp_path, 'singleadv', 50)
    (tmp_path / 'singleadv0' / 'eval' / '40.npz').unlink()
    found = outcomes_of(tmp_path)
    assert (found.systems, found.strongest) == ({}, None)
    assert len(found.notes) == 1


@pytest.mark.parametrize(
    'p, text',
    [
        (0.0, '< 0.0001'),
        (1e-4, '0.0001'),
        (0.0042, '0.0042'),
        (0.0512, '0.051'),
        (0.0496, '0.05'),
        (1, '1'),
    ],
)
def test_p_values(p, text):
    assert findings.p_value(p) == text
