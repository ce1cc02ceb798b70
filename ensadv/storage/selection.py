"""Which snapshot of a run is its best, by which attack, and made how: no JAX."""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ensadv.attacks import registry

_LONGEST_VALUE = 20  # characters of a setting that are told: a number's, and of a digest enough


def identity(settings: Mapping[str, Any]) -> str:
    """Returns an attack's settings as a text, which is the same for equal settings alone."""
    # 1 and 1.0 are the same: one of them may come from a file, and the other from Python.
    numbers = {name: float(value) for name, value in settings.items() if type(value) is int}
    return json.dumps({**settings, **numbers}, sort_keys=True)


def ledger_key(result: Mapping[str, Any]) -> str:
    """Returns what the names of a result's arrays in the ledger begin with."""
    # Older results have no key: there was one of a name.
    prefix = '' if result.get('split', 'test') == 'test' else f'{result["split"]}_'
    return result.get('key', f'{prefix}{result["name"]}')


def as_configured(
    name: str, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns an attack's settings with what a config says of it; what it does not say stays.

    Args:
      name: the attack's.
      settings: with which it was made.
      config: a run's, as config.json has it; older ones lack some fields.
    """
    group, asked = config['eval'], registry.entries(config['eval'])
    entry = asked.get(name) or registry.entry(name)
    if entry.kind in registry.WITHOUT_SETTINGS:
        return dict(settings)
    seed = {'seed': group.get('seed', settings.get('seed'))}
    wanted = seed | group.get(entry.kind, {}) | entry.changes
    if entry.steps:
        wanted['steps'] = entry.steps
    changed = {field: wanted.get(field, value) for field, value in settings.items()}
    if registry.is_staged(name):
        changed.pop('examples', None)
        if examples := wanted.get('examples'):
            changed['examples'] = examples
    if name in asked:  # only long attacks have iterate_examples
        changed.pop('iterate_examples', None)
    long = [registry.entry(text).name for text in group.get('long_attacks', ())]
    if name in long and not registry.is_staged(name):
        changed['iterate_examples'] = group['iterate_examples']
    return changed


def is_configured(name: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Returns whether an attack was made with the settings that a run's config has for it."""
    return identity(as_configured(name, settings, config)) == identity(settings)


def differences(settings: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns 'loss=margin', ...: what an attack has for each setting that others have not so.

    Beside a transfer set's digest, its share of fooling examples tells nothing more.
    """
    fields = {
        field
        for other in others
        for field in {*settings, *other} - {'share_fooled'}
        if settings.get(field) != other.get(field)
    }
    return [f'{field}={str(settings.get(field))[:_LONGEST_VALUE]}' for field in sorted(fields)]


def made_alike(
    evaluations: Mapping[int, Mapping[str, Any]],
    attack: str,
    config: Mapping[str, Any],
    split: str = 'test',
) -> dict[int, Mapping[str, Any]]:
    """Returns the results of an attack over a run's steps, all made with the same settings.

    They are the settings that the config has for it; where no step has a result with these, those
    that most steps have.

    Args:
      evaluations: the content of eval/<step>.json by step.
      attack: its name.
      config: the run's own, as config.json has it.
      split: 'test' or 'validation'.

    Returns:
      The results by step, ascending.
    """
    key = 'validation' if split == 'validation' else 'attacks'
    found: dict[str, dict[int, Mapping[str, Any]]] = collections.defaultdict(dict)
    for step in sorted(evaluations):
        for result in evaluations[step][key]:
            if result['name'] == attack:
                found[identity(result['settings'])][step] = result

    def rank(results: Mapping[int, Mapping[str, Any]]) -> tuple[bool, int, int]:
        settings = next(iter(results.values()))['settings']
        return is_configured(attack, settings, config), len(results), max(results)

    return max(found.values(), key=rank, default={})


def best_step(
    evaluations: Mapping[int, Mapping[str, Any]], attack: str, config: Mapping[str, Any]
) -> int | None:
    """Returns the step with the best accuracy under an attack; the earliest of equals.

    Args:
      evaluations: the content of eval/<step>.json by step.
      attack: its name.
      config: the run's own, as config.json has it. It says which split decides, and with which
        settings, see `made_alike`: accuracies under others are not to be compared with these.

    Returns:
      The step, or None where that was never evaluated.
    """
    results = made_alike(evaluations, attack, config, config['eval']['select_on'])
    return max(results, key=lambda step: results[step]['accuracy'], default=None)


def selection_attack(names: Sequence[str]) -> str:
    """Returns which of a config's attacks decides which snapshot is the best.

    IFGSM5, as in the paper; where it is not there the first attack that is, or clean. blackbox can
    be made on the test split alone, and decides only where nothing else is there.
    """
    if 'ifgsm5' in names:
        return 'ifgsm5'
    attacked = [name for name in names if name not in registry.WITHOUT_SETTINGS]
    return (attacked or [name for name in names if name != 'blackbox'] or list(names))[0]


# The rest are judged by their steps.
_STRONGEST_FIRST = (
    'autoattack_plus', 'autoattack', 'mora', 'apgd_t', 'apgd_nce', 'apgd_ce', 'apgd_dlr', 'members',
    'fab_t', 'fab',
)  # fmt: skip


def strongest(names: Sequence[str]) -> str | None:
    """Returns the attack by which robustness is judged; None if all attack nothing.

    AutoAttack before its parts, and these before the one with the most gradient steps.
    """
    staged = [name for name in names if registry.is_staged(name)]

    def place(name: str) -> int:
        kind = registry.entry(name).kind
        return _STRONGEST_FIRST.index(kind) if kind in _STRONGEST_FIRST else len(_STRONGEST_FIRST)

    first = min(staged, key=place, default=None)
    if first is not None and place(first) < len(_STRONGEST_FIRST):
        return first
    return most_steps(names) or first


def most_steps(names: Sequence[str]) -> str | None:
    """Returns the attack with the most gradient steps, PGD of equals; None if none has any.

    Of those in one stage, whose points are kept to be looked at.
    """
    attacked = [n for n in names if registry.entry(n).steps and not registry.is_staged(n)]

    def strength(name: str) -> tuple[int, bool]:
        entry = registry.entry(name)
        return entry.steps, entry.kind == 'pgd'

    return max(attacked, key=strength, default=None)
