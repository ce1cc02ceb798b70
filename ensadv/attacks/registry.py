"""Attacks by name: each kind's settings, declared once, and where its code is.

A setting's declaration gives the config field and its default, what is allowed, what JSON has, and
the report's words. Nothing here needs JAX: a config is checked, and a report written, without it.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ensadv import values
from ensadv.errors import ConfigError

NORMS = {'linf': 'L-infinity', 'l2': 'L2'}
STARTS = ('gaussian', 'uniform', 'none')
LOSSES = ('cross_entropy', 'margin')
SCHEDULES = ('constant', 'linear', 'cosine')
MAX_STEPS = 10**6
MAX_RESTARTS = 1000  # of each stage


def longest(norm: str) -> float:
    """Returns how long a vector may be that lies in the box of images, as far as that is known."""
    return 1 if norm == 'linf' else values.MAX_NUMBER


def choice(*allowed: str, default: str) -> Any:
    """Declares a setting that is one of a few words."""
    check = lambda field, found, norm: values.check_choice(field, found, allowed)
    return dataclasses.field(default=default, metadata={'check': check})


def length(share: float, default: Any = dataclasses.MISSING) -> Any:
    """Declares a length in the threat model's norm; in a config it is a share of epsilon."""
    check = lambda field, found, norm: values.check_number(field, found, 0, longest(norm))
    return dataclasses.field(default=default, metadata={'check': check, 'share': share})


def whole(low: int, high: int = values.MAX_INTEGER, default: Any = dataclasses.MISSING) -> Any:
    """Declares a whole number; with the default None it may be None, and is then no setting."""
    optional = default is None

    def check(field, found, norm):
        if found is not None or not optional:
            values.check_integer(field, found, low, high)

    return dataclasses.field(default=default, metadata={'check': check, 'optional': optional})


def starts_differ(start: str, sigma: float | None) -> bool:
    """Returns whether restarts of an attack begin at different points: else one is enough."""
    return start != 'none' and not (start == 'gaussian' and sigma == 0)


@dataclasses.dataclass(frozen=True)
class IFGSMSettings:
    """What decides the outcome of an attack by gradient steps.

    Attributes:
      steps: gradient steps of each restart.
      step_size: a step's length in the threat model's norm; for linf in pixels.
      schedule: how the step size changes: 'constant', or 'linear' or 'cosine' down to 0.
      start: 'gaussian', 'uniform' (in the ball) or 'none' (the image itself).
      sigma: the gaussian start's size, a length; needed for it alone.
      restarts: independent starts, each with the full number of steps.
      loss: what is climbed: 'cross_entropy' or 'margin'; or, in a program, a function
        (outputs, labels) -> [B], which is given the outputs as they are.
    """

    steps: int = whole(1, MAX_STEPS)
    step_size: float = length(1 / 4)
    schedule: str = choice(*SCHEDULES, default='constant')
    start: str = choice(*STARTS, default='gaussian')
    sigma: float | None = length(1 / 2, default=None)
    restarts: int = whole(1, default=1)
    loss: str | Callable[..., Any] = choice(*LOSSES, default='cross_entropy')  # noqa: RUF009

    @staticmethod
    def check(prefix: str, found: Mapping[str, Any]) -> None:
        """Raises ConfigError for restarts that would all be equal."""
        start, sigma, restarts = found.get('start'), found.get('sigma'), found.get('restarts', 1)
        if restarts > 1 and not starts_differ(start, sigma):
            sigma = f', {prefix}sigma' * (start == 'gaussian')
            raise ConfigError(
                f'{prefix}restarts: {restarts} of them would be equal with {prefix}start{sigma}: '
                f'{start}{" and 0" if sigma else ""}; expected 1, or start=uniform, or '
                'start=gaussian with sigma > 0'
            )


@dataclasses.dataclass(frozen=True)
class PGDSettings(IFGSMSettings):
    """As `IFGSMSettings`, with Adam's rate as the step size."""

    step_size: float = length(1 / 2)


@dataclasses.dataclass(frozen=True)
class FGSMSettings:
    """What decides the outcome of `fgsm`: one step from a random start (Wong et al., 2020).

    Attributes:
      step_size: the step's length in the threat model's norm; its end is projected into the ball.
      start: 'uniform' (in the ball) or 'none' (the image itself: Goodfellow et al., 2015).
    """

    step_size: float = length(5 / 4)
    start: str = choice('uniform', 'none', default='uniform')


@dataclasses.dataclass(frozen=True)
class NFGSMSettings:
    """What decides the outcome of `n_fgsm`: one step after noise (de Jorge et al., 2022).

    Attributes:
      step_size: the step's length, in pixels.
      noise: the largest move of a pixel by the noise, which is uniform.
    """

    step_size: float = length(1)
    noise: float = length(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedSettings:
    """What all attacks in stages have.

    Attributes:
      examples: how many of the evaluated images are attacked, the first ones; None: all.
    """

    examples: int | None = whole(1, default=None)


@dataclasses.dataclass(frozen=True)
class RepeatedSettings(StagedSettings):
    """What decides the outcome of `apgd_ce`, `apgd_dlr`, `apgd_nce`, `members` and `fab`.

    Attributes:
      steps: iterations of each restart.
      restarts: independent starts; of `fab` all but the first are random.
    """

    steps: int = whole(1, MAX_STEPS, default=100)
    restarts: int = whole(1, MAX_RESTARTS, default=1)


@dataclasses.dataclass(frozen=True)
class QueriesSettings(StagedSettings):
    """What decides the outcome of `square`.

    Attributes:
      steps: queries of each restart, but for the start's.
      restarts: independent starts.
    """

    steps: int = whole(1, MAX_STEPS, default=5000)
    restarts: int = whole(1, MAX_RESTARTS, default=1)


@dataclasses.dataclass(frozen=True)
class TargetsSettings(StagedSettings):
    """What decides the outcome of `apgd_t`, `mora` and `fab_t`.

    Attributes:
      steps: iterations for each target.
      targets: classes at most that are targets, from the likeliest on.
    """

    steps: int = whole(1, MAX_STEPS, default=100)
    targets: int = whole(1, 1000, default=9)


@dataclasses.dataclass(frozen=True)
class AutoAttackSettings(StagedSettings):
    """What decides the outcome of `autoattack` and `autoattack_plus`, as the reference has it.

    Attributes:
      gradient_steps: iterations of APGD and FAB.
      targets: classes at most that a targeted attack goes for.
      queries: of Square.
    """

    gradient_steps: int = whole(1, MAX_STEPS, default=100)
    targets: int = whole(1, 1000, default=9)
    queries: int = whole(1, MAX_STEPS, default=5000)


@dataclasses.dataclass(frozen=True)
class AutoAttackRandSettings(StagedSettings):
    """What decides the outcome of `autoattack_rand`, AutoAttack's version for random networks.

    Attributes:
      gradient_steps: iterations of APGD.
      draws: of the network's randomness, over which each gradient and loss is averaged.
    """

    gradient_steps: int = whole(1, MAX_STEPS, default=100)
    draws: int = whole(1, 10_000, default=20)


class Stage(NamedTuple):
    """A part of an attack that is made of several, on the examples that still stand.

    Attributes:
      name: what it is called: 'apgd_t 3', which goes for the third target.
      settings: its attack and that one's settings, as `make` takes them.
    """

    name: str
    settings: Mapping[str, Any]


def _apgd(name, loss, steps, restarts) -> Iterator[Stage]:
    yield Stage(name, {'attack': 'apgd', 'loss': loss, 'steps': steps, 'restarts': restarts})


_TARGETED = {
    'apgd_t': {'attack': 'apgd', 'loss': 'targeted_dlr'},
    'fab_t': {'attack': 'fab', 'targeted': True},
    'mora': {'attack': 'apgd', 'loss': 'reweighed_gap'},
}


def _targets(name, steps, targets, classes) -> Iterator[Stage]:
    for rank in range(1, min(targets, classes - 1) + 1):
        yield Stage(f'{name} {rank}', _TARGETED[name] | {'steps': steps, 'rank': rank})


def _members(steps, restarts, members) -> Iterator[Stage]:
    for member in range(members):
        for stage in _apgd(f'members {member + 1}', 'normalised_cross_entropy', steps, restarts):
            yield stage._replace(settings={**stage.settings, 'member': member})


def _fab(steps, restarts) -> Iterator[Stage]:
    yield Stage('fab', {'attack': 'fab', 'steps': steps})
    if restarts > 1:
        random = {'start': 'boundary', 'restarts': restarts - 1}
        yield Stage('fab restarts', {'attack': 'fab', 'steps': steps} | random)


def _square(steps, restarts) -> Iterator[Stage]:
    yield Stage('square', {'attack': 'square', 'steps': steps, 'restarts': restarts})


def _autoattack(found, classes, members) -> Iterator[Stage]:
    del members
    steps, targets = found['gradient_steps'], found['targets']
    yield from _apgd('apgd_ce', 'cross_entropy', steps, 1)
    yield from _targets('apgd_t', steps, targets, classes)
    yield from _targets('fab_t', steps, targets, classes)
    yield from _square(found['queries'], 1)


def _autoattack_plus(found, classes, members) -> Iterator[Stage]:
    del members
    steps, targets = found['gradient_steps'], found['targets']
    yield from _apgd('apgd_ce', 'cross_entropy', steps, 5)
    yield from _apgd('apgd_dlr', 'dlr', steps, 5)
    yield from _fab(steps, 5)
    yield from _square(found['queries'], 1)
    yield from _targets('apgd_t', steps, targets, classes)
    yield from _targets('fab_t', steps, targets, classes)


def _of_loss(name, loss) -> Callable[..., Iterator[Stage]]:
    return lambda found, *_: _apgd(name, loss, found['steps'], found['restarts'])


def _of_targets(name) -> Callable[..., Iterator[Stage]]:
    return lambda found, classes, _: _targets(name, found['steps'], found['targets'], classes)


def _autoattack_rand(found, *_) -> Iterator[Stage]:
    for name, loss in (('apgd_ce', 'cross_entropy'), ('apgd_dlr', 'dlr')):
        for stage in _apgd(name, loss, found['gradient_steps'], 1):
            yield stage._replace(settings={**stage.settings, 'draws': found['draws']})


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of attack.

    Attributes:
      settings: a frozen dataclass, whose fields `choice`, `length` and `whole` declare.
      attack: the class of its code, which has the settings' fields, see `attacks.attack.Attack`;
        or where that is, as 'module:class'; None for an attack in stages.
      stages: (settings, number of classes, of members) -> stages, one after another.
      norms: in which it is defined.
    """

    settings: type
    attack: type | str | None = None
    stages: Callable[[Mapping[str, Any], int, int], Iterator[Stage]] | None = None
    norms: tuple[str, ...] = tuple(NORMS)


KINDS: dict[str, Kind] = {
    'ifgsm': Kind(IFGSMSettings, 'ensadv.attacks.first_order:IFGSM'),
    'pgd': Kind(PGDSettings, 'ensadv.attacks.first_order:PGD'),
    'apgd_ce': Kind(RepeatedSettings, stages=_of_loss('apgd_ce', 'cross_entropy')),
    'apgd_dlr': Kind(RepeatedSettings, stages=_of_loss('apgd_dlr', 'dlr')),
    'apgd_nce': Kind(RepeatedSettings, stages=_of_loss('apgd_nce', 'normalised_cross_entropy')),
    'apgd_t': Kind(TargetsSettings, stages=_of_targets('apgd_t')),
    'mora': Kind(TargetsSettings, stages=_of_targets('mora')),
    'members': Kind(
        RepeatedSettings, stages=lambda s, _, k: _members(s['steps'], s['restarts'], k)
    ),
    'fab': Kind(RepeatedSettings, stages=lambda s, *_: _fab(s['steps'], s['restarts'])),
    'fab_t': Kind(TargetsSettings, stages=_of_targets('fab_t')),
    'square': Kind(QueriesSettings, stages=lambda s, *_: _square(s['steps'], s['restarts'])),
    'autoattack': Kind(AutoAttackSettings, stages=_autoattack),
    'autoattack_plus': Kind(AutoAttackSettings, stages=_autoattack_plus),
    'autoattack_rand': Kind(AutoAttackRandSettings, stages=_autoattack_rand),
}
# What stages are made of, which no config names.
STAGE_ATTACKS = {
    'apgd': 'ensadv.attacks.apgd:APGD',
    'fab': 'ensadv.attacks.fab:FAB',
    'square': 'ensadv.attacks.square:Square',
}
WITHOUT_SETTINGS = ('clean', 'blackbox')  # evaluations that attack nothing
# Attacks of one step, for training alone. Their settings are the config's group attack.<name>.
ONE_STEP: dict[str, Kind] = {
    'fgsm': Kind(FGSMSettings, 'ensadv.attacks.first_order:IFGSM'),
    'n_fgsm': Kind(NFGSMSettings, 'ensadv.attacks.first_order:NFGSM', norms=('linf',)),
}
FOR_TRAINING = ('ifgsm', 'pgd', *ONE_STEP)


def register(kind: str, attack: type) -> None:
    """Makes an attack known by a name, so that configs can ask for it.

    Args:
      kind: lower-case letters and _, as in eval.attacks before the number of steps.
      attack: see `attacks.attack.Attack`. It is its settings' declaration, too.
    """
    KINDS[kind] = Kind(attack, attack)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of eval.attacks.

    Attributes:
      name: the entry's, under which its results are kept: 'pgd20', 'pgd20_margin'.
      kind: of `KINDS` or `WITHOUT_SETTINGS`.
      steps: 0 where the name has none.
      suffix: of the name, after kind and steps: '_margin'.
      changes: settings that differ from those of the config's group eval.<kind>.
    """

    name: str
    kind: str
    steps: int = 0
    suffix: str = ''
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@functools.lru_cache(maxsize=1000)
def _entry(text: str, kinds: tuple[str, ...]) -> Entry | None:
    # The longest first, so that a kind that begins with another's name is found.
    known = '|'.join(sorted((*kinds, *WITHOUT_SETTINGS), key=len, reverse=True))
    match = re.fullmatch(rf'(({known})(\d{{0,10}})((?:_[a-z0-9_]+)?))(?:\((.*)\))?', text)
    if not match:
        return None
    name, kind, digits, suffix, changes = match.groups()
    steps = int(digits) if digits else 0
    if kind in WITHOUT_SETTINGS:
        return Entry(name, kind) if text == kind else None
    fields = {field.name: field for field in dataclasses.fields(KINDS[kind].settings)}
    if digits and not ('steps' in fields and 1 <= steps <= MAX_STEPS):
        return None
    if not digits and 'steps' in fields and fields['steps'].default is dataclasses.MISSING:
        return None
    return Entry(name, kind, steps, suffix, _changes(text, changes, fields) if changes else {})


def _changes(text: str, changes: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Parses 'loss=margin, restarts=5'."""
    found = {}
    for part in changes.split(','):
        field, equals, value = map(str.strip, part.partition('='))
        if not equals or field not in fields or field == 'steps':
            known = [name for name in fields if name != 'steps']
            raise ConfigError(
                f"'{text}': unknown setting '{field}'{values.nearest(field, known)}; allowed: "
                f'{", ".join(known)}, as in pgd20_margin(loss=margin)'
            )
        found[field] = _value(value)
    return found


def _value(text: str) -> Any:
    """Returns a setting's value as it is written: a whole number, a number, 2/255, or a word."""
    numerator, slash, denominator = text.partition('/')
    try:
        if slash:
            return float(numerator) / float(denominator)
        return int(text) if re.fullmatch(r'[+-]?\d+', text) else float(text)
    except (ValueError, ZeroDivisionError):
        return text


def entry(text: str, field: str = 'eval.attacks') -> Entry:
    """Parses an entry of eval.attacks, or the name of a result.

    'pgd20' is PGD with 20 steps and the settings of the config's group eval.pgd, and
    'pgd20_margin(loss=margin)' one with a setting of its own, whose results are 'pgd20_margin'.

    Args:
      text: the entry.
      field: where it stands, for errors.

    Raises:
      ConfigError: for any other text.
    """
    try:
        # The whole text, of which a message may show less; what is no text is no entry either.
        found = _entry(text, tuple(KINDS)) if isinstance(text, str) else None
    except ConfigError as error:
        raise ConfigError(f'{field}: {error}') from error
    if found is None:
        kinds = tuple(KINDS)
        examples = (*WITHOUT_SETTINGS, *(f'{kind}{n}' for kind in kinds for n in (5, 7, 20, 500)))
        hint = values.nearest(values.shown(text).lower(), examples)
        raise ConfigError(
            f"{field}: unknown attack '{values.shown(text)}'{hint}; allowed: "
            f'{", ".join(WITHOUT_SETTINGS)}, or one of {", ".join(kinds)}. A number of steps '
            f'up to {MAX_STEPS} follows ifgsm and pgd, as in pgd20, and may follow the parts of '
            'autoattack'
        )
    return found


def entries(group: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns the entries of a config's group eval, by name: those of every snapshot first."""
    texts = (*group['attacks'], *group.get('long_attacks', ()))
    return {found.name: found for found in map(entry, texts)}


def names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the attacks that a run makes on every snapshot.

    With a transfer set blackbox is one of them.

    Args:
      group: the group eval of a config, or of a config.json.
    """
    found = tuple(entry(text).name for text in group['attacks'])
    return (*found, 'blackbox') if group['blackbox_path'] and 'blackbox' not in found else found


def defaults(kind: str, epsilon: Any) -> dict[str, Any]:
    """Returns the fields of a config's group eval.<kind> or attack.<kind>, with their defaults.

    Args:
      kind: of `KINDS` or `ONE_STEP`.
      epsilon: a number, or a reference to the config's.
    """
    return {
        field.name: epsilon * field.metadata['share']
        if 'share' in field.metadata
        else field.default
        for field in dataclasses.fields(_kind(kind).settings)
        if 'share' in field.metadata or field.default is not dataclasses.MISSING
    }


def _kind(name: str) -> Kind:
    return KINDS.get(name) or ONE_STEP[name]


def training_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings of the attack in training, as `make` takes them.

    Args:
      group: the group attack of a config.
    """
    name = group['name']
    if name in ONE_STEP:
        found = {'steps': 1, **group[name]}
    else:
        found = {field: group[field] for field in ('steps', 'step_size', 'start', 'sigma')}
    return {'attack': name, **found, 'loss': group['loss']}


def settings(group: Mapping[str, Any], found: Entry, epsilon: float) -> dict[str, Any]:
    """Returns all settings of an entry, as JSON has them.

    Args:
      group: the group eval of a config.
      found: the entry.
      epsilon: the threat model's, for what the config says nothing of.
    """
    fields = {field.name: field for field in dataclasses.fields(KINDS[found.kind].settings)}
    known = defaults(found.kind, epsilon) | dict(group.get(found.kind, {})) | found.changes
    if 'steps' in fields and found.steps:
        known['steps'] = found.steps
    unset = {n for n, f in fields.items() if f.metadata.get('optional') and known[n] is None}
    return {name: known[name] for name in fields if name in known and name not in unset}


def check(
    kind: str, prefix: str, found: Mapping[str, Any], norm: str, epsilon: float | None = None
) -> None:
    """Raises ConfigError unless settings are what their declaration allows.

    Args:
      kind: the attack's. Nothing is checked for a kind without settings.
      prefix: what messages put before a setting's name, as 'eval.pgd.'.
      found: values by setting; what the kind does not declare is passed over.
      norm, epsilon: the threat model's.
    """
    if kind in WITHOUT_SETTINGS:
        return
    of_kind = _kind(kind).settings
    declared = {field.name: field for field in dataclasses.fields(of_kind)}
    known = {name: value for name, value in found.items() if name in declared}
    for name, value in known.items():
        if check_value := declared[name].metadata.get('check'):
            check_value(f'{prefix}{name}', value, norm)
    if epsilon and known.get('step_size') == 0:
        raise ConfigError(f'{prefix}step_size: 0 would be no attack; expected a number > 0')
    if hasattr(of_kind, 'check'):
        of_kind.check(prefix, known)


def is_staged(name: str) -> bool:
    """Returns whether an entry's attack is one in stages."""
    found = entry(name)
    return found.kind in KINDS and KINDS[found.kind].stages is not None


def examples(found: Mapping[str, Any], n: int) -> int:
    """Returns how many of n examples, the first ones, an attack's settings have it made on."""
    asked = found.get('examples')
    return min(asked, n) if isinstance(asked, int) else n


def stages(found: Mapping[str, Any], classes: int, members: int = 1) -> tuple[Stage, ...]:
    """Returns the stages of an attack in stages.

    Args:
      found: its settings as JSON has them.
      classes: of the data.
      members: of the ensemble.
    """
    return tuple(KINDS[found['attack']].stages(found, classes, members))


def only_stage(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the settings of the stage of an attack that has one, for all ensembles and data.

    Args:
      found: as in `stages`.
    """
    several = stages(found, classes=3, members=2)
    return several[0].settings if len(several) == 1 else None


def make(found: Mapping[str, Any], **changes: Any) -> Any:
    """Returns the attack of settings as JSON has them, for which JAX is imported.

    Args:
      found: 'attack', its kind, and its settings; whatever else is there is passed over.
      **changes: settings that are to be others, as a function for the loss's name.
    """
    # 'fab' is a kind in stages, and what its stages are made of.
    attack = STAGE_ATTACKS.get(found['attack']) or _kind(found['attack']).attack
    if isinstance(attack, str):
        module, _, code = attack.partition(':')
        attack = getattr(importlib.import_module(module), code)
    fields = {field.name for field in dataclasses.fields(attack)}
    known = {name: value for name, value in (found | changes).items() if name in fields}
    return attack(**known)


def threat_model_words(norm: str, epsilon: float) -> str:
    """Returns a threat model in words: 'L-infinity, epsilon 0.03137 (8/255)'."""
    return f'{NORMS[norm]}, epsilon {epsilon:.4g} ({255 * epsilon:.3g}/255)'
