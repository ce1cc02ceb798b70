"""Which runs can stand side by side, and what readers should know of those that do."""

import collections
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ensadv import architectures
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.report.run import Run, made, name_of
from ensadv.storage import environments, selection

# What makes a system what it is; all else should be the same for all systems that are compared.
_OF_A_SYSTEM = ('system', 'seed', 'model.width', 'ensemble', 'train.adversarial_weight', 'eval')
# Of two seeds of a system these may differ, beside what `config.MUTABLE_FIELDS` names.
_OF_A_SEED = ('seed', 'ensemble.members_from')
_DIFFERENCES_TOLD = 3
# Of a long attack: how many examples stay to its end. It decides no verdict.
_STAYING = 'iterate_examples'
_OF = 'examples'  # how many an attack was made on


def _apart(runs: Sequence[Run], facts: Mapping[str, Callable[[Run], Any]]) -> dict[Run, str]:
    """Returns the runs in which one of the facts is not as in most of them, and what it is."""
    reasons: dict[Run, str] = {}
    for what, fact in facts.items():
        rest = [run for run in runs if run not in reasons]
        usual = most_frequent(map(fact, rest))
        reasons |= {run: f'{what} {fact(run)}, not {usual}' for run in rest if fact(run) != usual}
    return reasons


def most_frequent(values: Iterable[Any]) -> Any:
    """Returns the most frequent value, of equally frequent ones the first; None of none."""
    return next((value for value, _ in collections.Counter(values).most_common(1)), None)


def other_threat_model(runs: Sequence[Run]) -> dict[Run, str]:
    """Returns the runs on other data, of another epsilon, or selected in another way."""

    def data(run: Run) -> str:
        dataset = run.record['dataset']
        return f'{dataset["name"]} (fingerprint {dataset["fingerprint"][:8]}...)'

    reasons = _apart(
        runs,
        {
            'data:': data,
            'norm:': lambda run: run.config.get('norm', 'linf'),
            'epsilon:': lambda run: run.config['epsilon'],
        },
    )
    return reasons | _apart(
        [run for run in runs if not run.model and run not in reasons],
        {
            'training examples:': lambda run: run.record['dataset']['num_train'],
            'snapshots selected on:': lambda run: run.config['eval']['select_on'],
            'snapshots selected by:': lambda run: run.judge,
        },
    )


def other_attacks(runs: Sequence[Run]) -> dict[Run, str]:
    """Returns the runs one of whose attacks was made only otherwise, or on other examples.

    What was made with other settings beside the usual ones is of use to nobody less.
    """
    reasons: dict[Run, str] = {}
    found = {run: _made(run) for run in runs}
    for name in dict.fromkeys(name for run in runs for name, _ in found[run]):
        settings = {
            run: [settings for other, settings in found[run] if other == name]
            for run in runs
            if run not in reasons
        }
        usual = most_frequent(one for mine in settings.values() for one in mine)
        for run, mine in settings.items():
            if mine and usual not in mine:
                reasons[run] = f'{name} {_difference(json.loads(mine[0]), json.loads(usual))}'
    return reasons


def _made(run: Run) -> list[tuple[str, str]]:
    """Returns how the attacks at a run's last and best step were made, each once."""
    results = [result for step in run.judged_steps for result in run.results(step)]
    return list(dict.fromkeys(map(made, results)))


def labels(runs: Sequence[Run]) -> dict[tuple[str, str], str]:
    """Returns what to call each attack of the runs' last and best steps, by `made`.

    That is its name; where it was made with several settings, or with others than the runs' own
    configs have for it, the name and what differs, as in 'pgd20 loss=margin'. Of a name the one as
    configured comes first. An attack on fewer examples, or a long one on which fewer stay, has no
    label where all else is the same: it tells nothing more.
    """
    having: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        for name, settings in _made(run):
            having.setdefault(name, {}).setdefault(settings, []).append(run)
    found = {}
    for name, by_settings in having.items():
        settings = {text: json.loads(text) for text in by_settings}
        shown = [text for text in settings if not _tells_nothing_more(text, settings, by_settings)]
        own = {
            text: [_as_configured(name, settings[text], run) for run in by_settings[text]]
            for text in shown
        }
        others = [settings[text] for text in shown]
        for text in sorted(shown, key=lambda text: settings[text] not in own[text]):
            differences = selection.differences(settings[text], [*others, *own[text]])
            found[name, text] = ' '.join([name, ', '.join(differences)]).strip()
    return found


def _as_configured(name: str, settings: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Returns an attack's settings as the run's config has them, but for how many examples stay."""
    wanted = selection.as_configured(name, settings, run.config)
    wanted[_STAYING] = settings.get(_STAYING)
    wanted[_OF] = min(wanted.get(_OF, run.n), run.n)
    return {field: wanted[field] for field in settings}


def _tells_nothing_more(
    text: str,
    settings: Mapping[str, Mapping[str, Any]],
    by_settings: Mapping[str, Sequence[Run]],
) -> bool:
    """Returns whether all its runs have the attack with more examples, or more that stay, too."""
    mine = settings[text]
    return any(
        other.get(field, 0) > mine[field]
        and {**other, field: mine[field]} == mine
        and set(by_settings[text]) <= set(by_settings[place])
        for field in {_STAYING, _OF} & set(mine)
        for place, other in settings.items()
    )


def _difference(found: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    names = [key for key in sorted({*found, *usual}) if found.get(key) != usual.get(key)]
    told = names[:_DIFFERENCES_TOLD]
    texts = [f'with {name} {found.get(name)}, not {usual.get(name)}' for name in told]
    if more := len(names) - len(told):
        texts.append(f'and {more} more')
    return ', '.join(texts)


def other_system(runs: Sequence[Run]) -> dict[Run, str]:
    """Returns the runs that have the name of a system but not its settings, and how they differ."""
    reasons: dict[Run, str] = {}
    for system in dict.fromkeys(run.system for run in runs):
        mine = [run for run in runs if run.system == system]
        settings = {run: json.dumps(_training(run), sort_keys=True) for run in mine}
        usual = most_frequent(settings.values())
        reasons |= {
            run: f'another {system}: {_difference(json.loads(found), json.loads(usual))}'
            for run, found in settings.items()
            if found != usual
        }
    return reasons


def _training(run: Run) -> dict[str, Any]:
    """Returns the settings that two seeds share, flat; those of an ensemble are its members'."""
    if run.model:
        return {'a model that was given': True}
    if not run.is_trained_here:
        return {'imported weights': run.imported['digest']}
    each = trained(run, _OF_A_SEED)
    if not run.members:
        return each[0]
    group = run.config['ensemble']
    settings = {
        'an ensemble of runs': True,
        'ensemble.combine': group['combine'],
        'ensemble.members_snapshot': group['members_snapshot'],
    }
    for i, kept in enumerate(each):
        settings |= {f'member {i}: {field}': value for field, value in kept.items()}
    return settings


def trained(run: Run, ignore: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Returns the settings by which a run, or each of its members, was trained, flat.

    Of a model that was given none is known, nor of imported weights.
    """
    if not run.is_trained_here:
        return []
    if not run.members:
        extra = run.record['dataset'].get('extra')
        images = {'data.extra': f'{extra["fingerprint"]:.8}...'} if extra else {}
        return [_kept(run.config, ignore) | {'train.steps': run.steps} | images]
    # The step of a member's best snapshot is no setting.
    return [
        _kept(member['config'], ignore)
        | {'train.steps': member['config']['train']['steps'] if run.of_selected else member['step']}
        for member in run.members
    ]


def _kept(config: Mapping[str, Any], ignore: tuple[str, ...]) -> dict[str, Any]:
    unused = (f'attack.{name}' for name in registry.ONE_STEP if name != config['attack']['name'])
    ignore = (*config_lib.MUTABLE_FIELDS, *unused, *ignore)
    kept = {
        field: value
        for field, value in config_lib.settings(config).items()
        if not any(field == other or field.startswith(f'{other}.') for other in ignore)
    }
    if text := kept.get('model.source'):  # too long to be told; where the file was does not count
        kept['model.source'] = f'SHA-256 {hashlib.sha256(text.encode()).hexdigest():.8}...'
        kept['model.name'] = architectures.words(kept['model.name'], 0, 0)
    return kept


def twice(runs: Sequence[Run]) -> dict[Run, str]:
    """Returns the runs whose system and seed another run has already."""
    first: dict[tuple[str, str], Run] = {}
    reasons = {}
    for run in runs:
        # The order of an ensemble's members makes no difference.
        seeds = ' '.join(sorted(run.seed.split('+')))
        other = first.setdefault((run.system, seeds), run)
        if other is not run:
            reasons[run] = (
                f'{run.system} with seed {run.seed} is in the report already, as {other.name}'
            )
    return reasons


def notes_on(runs: Sequence[Run], over_training: Sequence[str]) -> list[str]:
    """Returns in what systems differ that should be the same, and what was left out of series."""
    notes = []
    settings = [(run.system, each) for run in runs for each in trained(run, _OF_A_SYSTEM)]
    for field in dict.fromkeys(field for _, found in settings for field in found):
        values = [(system, json.dumps(found.get(field))) for system, found in settings]
        usual = most_frequent(value for _, value in values)
        others = {system: value for system, value in values if value != usual}
        notes += [
            f'{system} was trained with {field} {value}, most others with {usual}.'
            for system, value in others.items()
        ]
    notes += _notes_on_members(runs)
    notes += _notes_on_switches(runs)
    for run in runs:
        for label in (label for label in run.attacks(run.steps) if label in over_training):
            names = [{result['name'] for result in run.results(step)} for step in run.evaluations]
            there = sum(name_of(label) in each for each in names)
            left = there - len(run.series(label)[0])
            if left:
                notes.append(
                    f'{run.name}: {left} of {there} evaluations of {label} were made with other '
                    'settings than the last one. Averages over training leave them out.'
                )
    return notes


def _notes_on_switches(runs: Sequence[Run]) -> list[str]:
    """Returns which runs were trained or evaluated with other switches of XLA and JAX than most."""
    notes = []
    records = {
        'trained': {
            run: run.record['sessions'] if run.is_trained_here and not run.members else []
            for run in runs
        },
        'evaluated': {
            run: [r for step in run.judged_steps for r in run.results(step)] for run in runs
        },
    }
    for done, by_run in records.items():
        found = {run: dict.fromkeys(map(_switches, by_run[run])) for run in runs}
        usual = most_frequent(one for each in found.values() for one in each)
        notes += [
            f'{run.name} was {done} with {" and with ".join(others)}, most others with {usual}. '
            'Its numbers differ at least by rounding.'
            for run, each in found.items()
            if (others := [one for one in each if one != usual])
        ]
    return notes


def _switches(record: Mapping[str, Any]) -> str:
    texts = [f'{name}={value}' for name, value in environments.switches(record).items()]
    return ', '.join(texts) or 'no switch set'


def _notes_on_members(runs: Sequence[Run]) -> list[str]:
    """Returns what readers should know of ensembles of runs."""
    notes, used = {}, set()
    for run in runs:
        if run.of_selected:
            splits = {member['config']['eval']['select_on'] for member in run.members}
            notes[run.system, 'selected'] = (
                f"{run.system} combines its members' best snapshots, selected on the "
                f'{" and ".join(sorted(splits))} split, in every table.'
            )
        mine = {(run.system, member['workdir']) for member in run.members}
        if mine & used:
            notes[run.system, 'shared'] = (
                f'Runs of {run.system} share members: its seeds are not independent. They differ '
                'less than independent ones.'
            )
        used |= mine
    return list(notes.values())
