"""What the ledgers say: are the systems' differences real, and do the paper's claims hold?"""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ensadv.errors import UserError
from ensadv.report import comparable, paper, significance, worst_case
from ensadv.report.collect import Collection, strongest
from ensadv.report.page import VERDICTS, Claim
from ensadv.report.run import Run
from ensadv.report.table1 import attack_name
from ensadv.report.tables import Row, Table

SEEDS_NEEDED = 3  # of each system, for a claim; the paper has as many

# For each of the paper's claims the pairs, first > second in robust accuracy, that it says.
CLAIMS = {
    'Ensemble2Adv is more robust than SingleAdv': [('Ensemble2Adv', 'SingleAdv')],
    'Ensemble2Adv is more robust than DoubleAdv, which in the paper has about as many parameters': [
        ('Ensemble2Adv', 'DoubleAdv')
    ],
    'Ensemble2Adv is more robust than Separate2Adv, whose members were trained separately': [
        ('Ensemble2Adv', 'Separate2Adv')
    ],
    'More parameters help: a wider network, and more members': [
        ('DoubleAdv', 'SingleAdv'),
        ('Ensemble4Adv', 'Ensemble2Adv'),
    ],
}
SUPPORTED, NOT_SUPPORTED, TOO_LITTLE = VERDICTS


class Difference(NamedTuple):
    """The first system's robust accuracy minus the second's under an attack; a row of the CSV.

    It is of the means over seeds, with a 95 % interval, both in points. McNemar's p is of as many
    seeds of each as both have.
    """

    attack: str
    first: str
    second: str
    difference_points: float
    low: float
    high: float
    p_mcnemar: float
    seeds_first: int
    seeds_second: int
    n: int


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """Which examples each run's last snapshot gets right, and bootstrap samples of that.

    The runs are by system, without those whose ledgers could not be read; the attacks are those
    that all of them have. `strongest` is the one by which robustness is judged.
    """

    systems: Mapping[str, Sequence[Run]]
    attacks: Sequence[str]
    # By attack bool [runs, n], runs in the order of `systems`; n is what it was made on.
    correct: Mapping[str, np.ndarray]
    resampled: Mapping[str, np.ndarray]  # by attack float64 [num, runs], `significance.resample`
    notes: Sequence[str]
    strongest: str | None

    def places(self, system: str) -> list[int]:
        """Returns the places of a system's runs among all of them."""
        runs = [run for mine in self.systems.values() for run in mine]
        return [runs.index(run) for run in self.systems[system]]

    def difference(self, first: str, second: str, attack: str) -> Difference:
        """Compares two systems under an attack."""
        a, b = self.places(first), self.places(second)
        correct, resampled = self.correct[attack], self.resampled[attack]
        both = min(len(a), len(b))
        return Difference(
            attack,
            first,
            second,
            100 * float(np.mean(correct[a]) - np.mean(correct[b])),
            *significance.difference_interval(resampled, a, b),
            significance.clustered_mcnemar(correct[a[:both]], correct[b[:both]]),
            len(a),
            len(b),
            correct.shape[1],
        )

    def accuracy(self, system: str, attack: str) -> tuple[float, float, float]:
        """Returns a system's mean accuracy in [0, 1], and its 95 % interval."""
        places = self.places(system)
        mean = float(np.mean(self.correct[attack][places]))
        return mean, *significance.accuracy_interval(self.resampled[attack], places)


def read_outcomes(collection: Collection) -> Outcomes:
    """Reads the last snapshots' ledgers; a run whose ledger contradicts its results is left out."""
    kept: dict[str, list[Run]] = {}
    notes = []
    labels = _usual_labels(collection.runs)
    for run in collection.runs:
        try:
            _check_ledger(run, labels)
        except UserError as error:
            notes.append(f'{run.name} is left out of the comparisons: {error}.')
            continue
        kept.setdefault(run.system, []).append(run)
    runs = [run for mine in kept.values() for run in mine]
    found = {run: run.attacks(run.steps) for run in runs}
    attacks = [name for name in collection.attacks if all(name in found[run] for run in runs)]
    if not runs or not attacks:
        return Outcomes({}, [], {}, {}, notes, None)
    correct = {
        name: np.stack([worst_case.correct(found[run][name], run.ledger) for run in runs])
        for name in attacks
    }
    return Outcomes(kept, attacks, correct, _resample(correct), notes, strongest(attacks, runs))


def _resample(correct: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns `significance.resample` of each attack; those of equal n share the test sets."""
    resampled = {}
    for n in dict.fromkeys(array.shape[1] for array in correct.values()):
        same = {name: array for name, array in correct.items() if array.shape[1] == n}
        drawn = significance.resample(np.concatenate(list(same.values())))
        resampled |= zip(same, np.split(drawn, len(same), axis=1), strict=True)
    return resampled


def _usual_labels(runs: Sequence[Run]) -> bytes | None:
    """Returns the labels that most ledgers hold."""
    found = []
    for run in runs:
        with contextlib.suppress(UserError):
            found.append(_labels(run))
    return comparable.most_frequent(found)


def _labels(run: Run) -> bytes:
    return run.ledger['label'].astype(np.int64).tobytes()


def _check_ledger(run: Run, labels: bytes | None) -> None:
    """Raises UserError if a ledger is not that of its run's results, or of other examples."""
    for result in run.results(run.steps):
        worst_case.check(result, run.ledger)
    if _labels(run) != labels:
        raise UserError('its ledger is of other examples')


def differences(outcomes: Outcomes, attack: str) -> list[Difference]:
    """Returns the comparison of every pair of systems, the claims' first."""
    claimed = [pair for pairs in CLAIMS.values() for pair in pairs]
    pairs = [pair for pair in claimed if set(pair) <= set(outcomes.systems)]
    others = itertools.combinations(outcomes.systems, 2)
    pairs += [(b, a) for a, b in others if not {(a, b), (b, a)} & set(claimed)]
    return [outcomes.difference(*pair, attack) for pair in pairs]


def differences_table(found: Sequence[Difference]) -> Table:
    """Returns the table of these comparisons, all under one attack."""
    rows = [
        Row(
            (
                f'{d.first} − {d.second}',
                _signed(d.difference_points),
                f'{_signed(d.low)} to {_signed(d.high)}',
                p_value(d.p_mcnemar),
                f'{d.seeds_first}, {d.seeds_second}',
            )
        )
        for d in found
    ]
    return Table(
        'differences',
        f'Differences in accuracy under {attack_name(found[0].attack)}, last snapshots',
        ('systems', 'points', '95 % interval', 'p (McNemar)', 'seeds'),
        tuple(rows),
        tuple(_differences_notes(found)),
    )


def _differences_notes(found: Sequence[Difference]) -> list[str]:
    seeds = [(d.seeds_first, d.seeds_second) for d in found]
    fewest, most = (extreme(map(min, seeds)) for extreme in (min, max))
    notes = [
        f'n = {found[0].n:,} test examples. Interval: percentile bootstrap, 10,000 draws, of the '
        'examples (the same for both systems) and, where a system has several, of its seeds (S - 1 '
        'of S). With three seeds each it may cover 86 % instead of 95 %, where most of the spread '
        'is between seeds.',
        "p: McNemar's test of these networks on these examples, exact with one seed each, else "
        'with examples as clusters. It says nothing about networks from other seeds.',
    ]
    if any(a != b for a, b in seeds):
        notes.append('Where one system has more seeds, p uses as many of them as the other has.')
    if len(found) > 1:
        notes.append(
            f'Of {len(found)} pairs of equal systems about {0.05 * len(found):.1f} would have p < '
            '0.05 by chance.'
        )
    if fewest == 1:
        which = 'One seed each' if most == 1 else 'Where a system has one seed'
        notes.append(f'{which}: the interval does not account for the choice of seed.')
    if any('Separate2Adv' in (d.first, d.second) for d in found):
        notes.append(
            "Separate2Adv's members may be SingleAdv runs of this table. Then the two are not "
            'independent.'
        )
    return notes


def p_value(p: float) -> str:
    """Returns a p-value, with a bound where it is tiny."""
    return '< 0.0001' if p < 1e-4 else f'{p:.2g}'


def _signed(points: float) -> str:
    return f'{points:+.1f}'.replace('-', '−')


def judge_claims(outcomes: Outcomes, notes: Sequence[str] = ()) -> list[Claim]:
    """Returns what the data say of each of the paper's claims.

    A claim is what the paper says of its systems, and nothing else: where no two of those that it
    compares are here, with its data, epsilon and training, no claim is judged. `paper.judged` says
    which systems are, and which scale.

    Args:
      outcomes: of all systems.
      notes: of these, those that begin with the name of a claim's system are among its details.
    """
    its = set(paper.judged(outcomes.systems))
    if not any(its.issuperset(pair) for pairs in CLAIMS.values() for pair in pairs):
        return []
    claims = []
    for claim, pairs in CLAIMS.items():
        verdicts, details = zip(*(_judge(pair, outcomes, its) for pair in pairs), strict=True)
        details = itertools.chain.from_iterable(details)
        # A claim of several pairs is supported if each of them is.
        verdict = next(v for v in (TOO_LITTLE, NOT_SUPPORTED, SUPPORTED) if v in verdicts)
        systems = {system for pair in pairs for system in pair}
        mine = [note for note in notes if note.split(' ', 1)[0] in systems]
        claims.append(Claim(claim, verdict, [*details, *mine]))
    return claims


def _judge(pair: tuple[str, str], outcomes: Outcomes, its: set[str]) -> tuple[str, list[str]]:
    """Returns the verdict that the first is more robust than the second, and the evidence.

    It is supported if the whole interval lies above 0. `its` are the paper's systems among ours.
    """
    first, second = pair
    lacking = ''
    if missing := [name for name in pair if name not in its]:
        lacking = f"run of the paper's {' or '.join(missing)}"
    elif outcomes.strongest is None:
        lacking = 'attack that all runs have'
    if lacking:
        return TOO_LITTLE, [f'{first} − {second}: no {lacking}.']
    d = outcomes.difference(first, second, outcomes.strongest)
    text = (
        f'{_points(d)} under {attack_name(d.attack)}; seeds {d.seeds_first} and '
        f'{d.seeds_second}, n = {d.n:,}, McNemar p {p_value(d.p_mcnemar)}'
    )
    weaker = _on_more_examples(outcomes)
    more = [
        f'{_points(d)} under {attack_name(d.attack)}, n = {d.n:,}: weaker, so it does not decide.'
        for d in (outcomes.difference(first, second, attack) for attack in weaker)
    ]
    if min(d.seeds_first, d.seeds_second) < SEEDS_NEEDED:
        return TOO_LITTLE, [f'{text}; a claim needs {SEEDS_NEEDED} seeds of each.', *more]
    if d.high < 0:
        return NOT_SUPPORTED, [f'{text}; the data say the opposite.', *more]
    return SUPPORTED if d.low > 0 else NOT_SUPPORTED, [f'{text}.', *more]


def _points(d: Difference) -> str:
    return (
        f'{d.first} − {d.second}: {_signed(d.difference_points)} points ({_signed(d.low)} to '
        f'{_signed(d.high)})'
    )


def _on_more_examples(outcomes: Outcomes) -> list[str]:
    """Returns the strongest of the attacks on more examples than the strongest of all; or none."""
    n = outcomes.correct[outcomes.strongest].shape[1]
    others = [attack for attack in outcomes.attacks if outcomes.correct[attack].shape[1] > n]
    found = strongest(others, [run for runs in outcomes.systems.values() for run in runs])
    return [found] if found else []
