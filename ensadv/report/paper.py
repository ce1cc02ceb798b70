"""What the paper reports, its systems and the numbers of its Table 1, and which runs are of them.

"Strength in Numbers: Trading-off Robustness and Computation via Adversarially-Trained Ensembles",
Table 1: accuracies on CIFAR-10's test set, epsilon 8/255, WRN-28-10, three seeds, by the attacks'
last iterates. Separate2Adv is in Table 1c alone.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ensadv import config as config_lib
from ensadv.report import comparable
from ensadv.report.run import Run

# What all its systems are, by config field, and in what each is another.
_COMMON = {
    'data.name': 'cifar10',
    'norm': 'linf',
    'epsilon': 8 / 255,
    'model.name': 'wide_resnet',
    'model.depth': 28,
    'model.width': 10,
    'ensemble.size': 1,
    'train.adversarial_weight': 1.0,
}
_CLEAN = {'train.adversarial_weight': 0.0}
_OF_TWO, _OF_FOUR = (
    {'ensemble.size': size, 'ensemble.combine': 'probs', 'ensemble.training': 'joint'}
    for size in (2, 4)
)
_OWN = {
    'Baseline': _CLEAN,
    'Ensemble2': _OF_TWO | _CLEAN,
    'Ensemble4': _OF_FOUR | _CLEAN,
    'SingleAdv': {},
    'DoubleAdv': {'model.width': 15},
    'Ensemble2Adv': _OF_TWO,
    'Ensemble4Adv': _OF_FOUR,
    'Separate2Adv': _OF_TWO | {'ensemble.training': 'separate'},
}
SYSTEMS = tuple(_OWN)
# How they were trained, as far as the paper says it.
_TRAINING = {
    'train.steps': 500_000,
    'train.batch_size': 128,
    'train.learning_rate': 0.1,
    'train.learning_rate_steps': [30_000, 60_000, 90_000],
    'train.learning_rate_factor': 0.2,
    'train.momentum': 0.9,
    'data.cutout': 0,
    'data.cutmix': 0.0,
    'data.extra_fraction': 0.0,
    'train.objective': 'paper',
    'train.cross_entropy_of': 'ensemble',
    'train.diversity': 'none',
    'train.label_smoothing': 0.0,
    'train.awp_gamma': 0.0,
    'train.schedule': 'steps',
    'train.warmup_steps': 0,
    'train.ema_decay': 0.0,
    'train.weight_decay_on': 'all',
    'model.activation': 'relu',
}
_ATTACK = {'attack.name': 'ifgsm', 'attack.steps': 7}
# With other values of these, and of model.width, it is the same experiment at another scale.
_SCALE = (
    'model.depth',
    'train.steps',
    'train.batch_size',
    'train.learning_rate',
    'train.learning_rate_steps',
)

_COLUMNS = ('clean', 'ifgsm5', 'pgd5', 'pgd20', 'blackbox')


def _rows(*rows: tuple[float, ...]) -> dict[str, dict[str, float]]:
    return {
        system: dict(zip(_COLUMNS, row, strict=True))
        for system, row in zip(SYSTEMS[:7], rows, strict=True)
    }


# The mean of the last 10 evaluations.
TABLE_1A = _rows(
    (0.94, 0.34, 0.15, 0.01, 0.27),
    (0.94, 0.59, 0.44, 0.30, 0.22),
    (0.91, 0.50, 0.40, 0.34, 0.26),
    (0.82, 0.55, 0.44, 0.43, 0.80),
    (0.83, 0.57, 0.46, 0.44, 0.82),
    (0.85, 0.62, 0.55, 0.52, 0.83),
    (0.87, 0.66, 0.58, 0.53, 0.85),
)
# At the step with the best IFGSM5 accuracy.
TABLE_1B = _rows(
    (0.95, 0.57, 0.29, 0.09, 0.26),
    (0.95, 0.65, 0.52, 0.38, 0.22),
    (0.93, 0.60, 0.48, 0.43, 0.24),
    (0.84, 0.57, 0.46, 0.45, 0.81),
    (0.85, 0.60, 0.48, 0.47, 0.84),
    (0.87, 0.64, 0.56, 0.52, 0.85),
    (0.88, 0.67, 0.58, 0.52, 0.86),
)
# After 500 steps, of the snapshots of Table 1b.
TABLE_1C = {
    'Baseline': {'ifgsm500': 0.16, 'pgd500': 0.04},
    'SingleAdv': {'ifgsm500': 0.46, 'pgd500': 0.44},
    'DoubleAdv': {'ifgsm500': 0.47, 'pgd500': 0.47},
    'Ensemble2': {'ifgsm500': 0.13, 'pgd500': 0.02},
    'Ensemble2Adv': {'ifgsm500': 0.55, 'pgd500': 0.52},
    'Separate2Adv': {'ifgsm500': 0.49, 'pgd500': 0.47},
}


def unlike(runs: Sequence[Run]) -> list[str]:
    """Returns in what a system's runs are not the paper's system of that name.

    With other data, epsilon, networks or members they are something else, and the paper's numbers
    are no measure of them. None are of the paper's if it has no system of that name.
    """
    return list(_unlike(runs).values())


def trained_otherwise(runs: Sequence[Run]) -> list[str]:
    """Returns in what a system's runs were not trained as the paper's were."""
    return list(_trained_otherwise(runs).values())


def _unlike(runs: Sequence[Run]) -> dict[str, str]:
    system = runs[0].system
    if any(run.model for run in runs):
        return {'model': 'a model that was given'}
    if any(run.imported for run in runs):
        return {'weights': 'imported weights'}
    if system not in _OWN:
        return {'system': 'system'}
    return _differences(runs, _COMMON | _OWN[system])


def _trained_otherwise(runs: Sequence[Run]) -> dict[str, str]:
    attacked = runs[0].config['train']['adversarial_weight']
    return _differences(runs, _TRAINING | (_ATTACK if attacked else {}))


def judged(systems: Mapping[str, Sequence[Run]]) -> dict[str, list[str]]:
    """Returns the systems that can speak on the paper's claims.

    These are the paper's own, with its networks and training. Where there is none of them, they are
    those that are the paper's but for their scale, if that is the same for all: networks of another
    size, but DoubleAdv's wider than the others', and other steps, batches and learning rates.

    Returns:
      By the name of the system, in what its scale is not the paper's.
    """
    found = {
        system: _unlike(runs) | _trained_otherwise(runs)
        for system, runs in systems.items()
        if system in SYSTEMS and all(run.is_trained_here for run in runs)
    }
    if its := {system: [] for system, other in found.items() if not other}:
        return its
    allowed = {*_SCALE, 'model.width'}
    scaled = {system: other for system, other in found.items() if other.keys() <= allowed}
    scales, widths, double_widths = set(), set(), set()
    for system in scaled:
        for settings in itertools.chain.from_iterable(map(_settings, systems[system])):
            scales.add(str([settings[field] for field in _SCALE]))
            of = double_widths if system == 'DoubleAdv' else widths
            of.add(settings['model.width'])
    if max(map(len, (scales, widths, double_widths))) > 1 or any(
        double <= width for double in double_widths for width in widths
    ):
        return {}
    return {system: list(other.values()) for system, other in scaled.items()}


def other_scale(systems: Mapping[str, Sequence[Run]]) -> str:
    """Returns in what the scale of the systems that are judged is not the paper's; '' if it is."""
    return _joined(judged(systems))


def is_its_attack(settings: Mapping[str, Any]) -> bool:
    """Returns whether an attack may be the paper's of that name, by its settings in a result."""
    loss, restarts = settings.get('loss', 'cross_entropy'), settings.get('restarts', 1)
    return loss == 'cross_entropy' and restarts == 1


def left_out(systems: Mapping[str, Sequence[Run]]) -> list[str]:
    """Returns sentences on why numbers or claims of the paper's are left out for these systems."""
    mine = {system: runs for system, runs in systems.items() if system in SYSTEMS}
    others = {system: found for system, runs in mine.items() if (found := unlike(runs))}
    shorter = {
        system: found
        for system, runs in mine.items()
        if system not in others and (found := trained_otherwise(runs))
    }
    spoken = judged(systems)
    return [
        f"{what} are left out for {', '.join(reasons)}, which {why} the paper's: "
        f'{_joined(reasons)}.'
        for what, why, reasons in (
            ("The paper's numbers and claims", 'are not', _without(others, spoken)),
            ("The paper's numbers", 'are not', _without(others, others.keys() - spoken.keys())),
            ("The paper's claims", 'were not trained like', _without(shorter, spoken)),
        )
        if reasons
    ]


def _without(reasons: Mapping[str, Sequence[str]], systems: Collection[str]) -> dict[str, Any]:
    return {system: found for system, found in reasons.items() if system not in systems}


def _joined(reasons: Mapping[str, Sequence[str]]) -> str:
    """Returns reasons, each once, and of which systems it is one where that is not all."""
    texts = []
    for reason in dict.fromkeys(reason for found in reasons.values() for reason in found):
        of = [system for system, found in reasons.items() if reason in found]
        texts.append(reason if len(of) == len(reasons) else f'{reason} ({", ".join(of)})')
    return '; '.join(texts)


def _differences(runs: Sequence[Run], expected: Mapping[str, Any]) -> dict[str, str]:
    """Returns the fields that are not as expected, as {'train.steps': 'train.steps 40, not 9'}."""
    found: dict[str, list[str]] = {}
    for settings in itertools.chain.from_iterable(map(_settings, runs)):
        for field, value in expected.items():
            if not _same(settings.get(field), value):
                found.setdefault(field, []).append(_text(settings.get(field)))
    return {
        field: f'{field} {" or ".join(dict.fromkeys(values))}, not {_text(expected[field])}'
        for field, values in found.items()
    }


def _settings(run: Run) -> list[dict[str, Any]]:
    """Returns the settings, flat, of a run or of each of its members."""
    own = config_lib.flatten(run.config)
    shared = {field: own[field] for field in own if field.startswith('ensemble.')}
    shared |= {'norm': own.get('norm', 'linf'), 'epsilon': own['epsilon']}
    shared |= {'data.name': run.record['dataset']['name']}
    return [each | shared for each in comparable.trained(run)]


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, float | int):
        return math.isclose(found, expected, rel_tol=1e-3)
    return found == expected


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f'({", ".join(map(_text, value))})'
    if isinstance(value, float):
        return f'{value:.4g}'
    return f'{value:,}' if isinstance(value, int) else str(value)
