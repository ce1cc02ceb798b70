"""What the report's numbers rest on: data, attacks' settings, machines."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ensadv import architectures
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.report import paper
from ensadv.report.collect import Collection
from ensadv.report.run import Run
from ensadv.report.table1 import attack_name

TITLE, APART_TITLE = 'How these numbers were made', 'Not in this report'


def class_names(run: Run) -> Sequence[str]:
    """Returns what to call the classes of a run's data."""
    dataset = run.record['dataset']
    return dataset.get('class_names') or [str(i) for i in range(dataset['num_classes'])]


def all_of_it(collection: Collection) -> list[str]:
    """Returns how the numbers were made, a sentence each."""
    return [
        *training(collection),
        *imported(collection),
        *models(collection),
        *settings(collection),
        *machines(collection),
        *paper.left_out(collection.systems),
    ]


_TOLD_ELSEWHERE = ('attack', 'steps', 'combine', 'iterate_examples', 'examples')


def settings(collection: Collection) -> list[str]:
    """Returns the settings of each attack, which are the same for all runs."""
    found = {}
    for run in collection.runs:
        for step in run.judged_steps:
            for name, result in run.attacks(step).items():
                found.setdefault(name, result)
    lines = []
    for name in collection.attacks:
        settings = {k: v for k, v in found[name]['settings'].items() if k not in _TOLD_ELSEWHERE}
        if settings:
            text = ', '.join(f'{key} {_short(value)}' for key, value in settings.items())
            lines.append(f'{attack_name(name)}: {text}, n {found[name]["n"]:,}.')
    return lines


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.4g}'
    return f'{value[:12]}...' if isinstance(value, str) and len(value) > 20 else str(value)


def training(collection: Collection) -> list[str]:
    """Returns how the systems were trained; `Collection.notes` has what differs among them."""
    runs = [run for run in collection.runs if run.is_trained_here and not run.members]
    if not runs:
        return []
    # An adversarially trained one tells more.
    run = next((run for run in runs if run.config['train']['adversarial_weight']), runs[0])
    settings = config_lib.settings(run.config)
    train = {field.removeprefix('train.'): value for field, value in settings.items()}
    on = ' on kernels' if train['weight_decay_on'] == 'kernels' else ''
    lines = [
        f'Trained for {run.steps:,} steps of {train["batch_size"]} examples, '
        f'{_learning_rate(train)}, momentum {train["momentum"]:.4g}, weight decay '
        f'{train["weight_decay"]:.4g}{on}, {settings["model.dtype"]}. {run.system}: '
        f'{_network(settings)}.'
    ]
    objective = _objective(train)
    if train['adversarial_weight']:
        lines.append(f'Attack in training: {_attack(run.config["attack"])}; {objective}.')
    elif objective:
        lines.append(f'Trained with {objective}.')
    systems = {run.system: run for run in runs}.values()
    for describe in (_weights, _mixed):
        lines += filter(None, map(describe, systems))
    return lines


def _weights(run: Run) -> str:
    """Returns which weights a run's results are of, if it keeps averages; '' if not."""
    decay = config_lib.settings(run.config)['train.ema_decay']
    if not decay:
        return ''
    averages = f'weights averaged over the steps (decay {decay:.4g})'
    if run.config['eval']['weights'] == 'trained':
        return f'{run.system}: results of the weights of each step, not of {averages}.'
    return f'{run.system}: results of {averages}.'


def _network(settings: Mapping[str, Any]) -> str:
    names = ('name', 'depth', 'width', 'activation')
    return architectures.words(*(settings[f'model.{name}'] for name in names))


def _attack(group: Mapping[str, Any]) -> str:
    """Returns what attacks in training, of a config's group `attack`."""
    found = registry.training_settings(group)
    name, steps, _ = (found.pop(key) for key in ('attack', 'steps', 'loss'))
    name = name if name in registry.ONE_STEP else f'{name}{steps}'
    shown = (v if isinstance(v, str) else f'{v:.4g}' for v in found.values())
    return ', '.join([name.upper(), *map(' '.join, zip(found, shown, strict=True))])


def _mixed(run: Run) -> str:
    """Returns what a run's batches were mixed of; '' if of its training split's images alone."""
    settings, texts = config_lib.settings(run.config), []
    if fraction := settings['data.extra_fraction']:
        extra = run.record['dataset']['extra']
        texts.append(
            f'{100 * fraction:.4g} % of each batch from {extra["num"]:,} extra images (fingerprint '
            f'{extra["fingerprint"]:.8}...)'
        )
    if side := settings['data.cutout']:
        texts.append(f'Cutout of {side} pixels')
    if alpha := settings['data.cutmix']:
        texts.append(f'CutMix with Beta({alpha:.4g}, {alpha:.4g})')
    return f'{run.system}: {", ".join(texts)}.' if texts else ''


def _learning_rate(train: Mapping[str, Any]) -> str:
    """Returns a run's schedule, by its settings of training."""
    text = f'learning rate {train["learning_rate"]:.4g}'
    if train['schedule'] == 'steps':
        steps = ', '.join(f'{step:,}' for step in train['learning_rate_steps'])
        text += f' times {train["learning_rate_factor"]:.4g} at {steps}'
    else:
        text += f' ({train["schedule"]})'
    if train['warmup_steps']:
        text += f' after {train["warmup_steps"]:,} steps of warm-up'
    return text


def _objective(train: Mapping[str, Any]) -> str:
    """Returns what a run descended, by its settings of training; '' is the clean loss alone."""
    texts = []
    if train['adversarial_weight'] and train['objective'] == 'paper':
        texts.append(f'rho {train["adversarial_weight"]:.4g}')
    elif train['adversarial_weight']:
        texts.append(f'{train["objective"].upper()}, beta {train["beta"]:.4g}')
    if train['cross_entropy_of'] == 'members':
        texts.append('cross-entropy of each member')
    if train['diversity'] != 'none':
        texts.append(config_lib.diversity_words(train))
    if train['label_smoothing']:
        texts.append(f'label smoothing {train["label_smoothing"]:.4g}')
    if train['awp_gamma']:
        texts.append(f'AWP with gamma {train["awp_gamma"]:.4g}')
    return ', '.join(texts)


def models(collection: Collection) -> list[str]:
    """Returns which systems are models that were given."""
    given = {run.system: run.model for run in collection.runs if run.model}
    return [
        f'{system}: a model that was given, {model["function"]} of '
        f'{epath.Path(model["file"]).name if model["file"] else "a program"}; how it was trained '
        'is not known here.'
        for system, model in given.items()
    ]


def imported(collection: Collection) -> list[str]:
    """Returns which systems have, or began with, weights that were imported."""
    lines = []
    for system, run in {run.system: run for run in collection.runs if run.imported}.items():
        facts = run.imported
        text = f'{system}: weights imported from {facts["file"]} (SHA-256 {facts["digest"]:.8}...)'
        if not run.is_trained_here:
            text += '; how they were trained is not known here'
        elif run.steps > facts['step']:
            text += f', and trained on from step {facts["step"]:,}'
        lines.append(f'{text}.')
    return lines


def machines(collection: Collection) -> list[str]:
    """Returns on what the runs were trained and evaluated."""
    runs = collection.runs
    trained = [run for run in runs if run.is_trained_here and not run.members]
    trained = [session for run in trained for session in run.record['sessions']]
    evaluated = [r for run in runs for r in run.results(run.steps)]
    return [
        f'{done} on {_environments(sessions)}.'
        for done, sessions in (('Trained', trained), ('Evaluated', evaluated))
        if sessions
    ]


def _environments(sessions: Sequence[Mapping[str, Any]]) -> str:
    return ' and '.join(
        dict.fromkeys(
            f'{s["devices"]["count"]} x {s["devices"]["kind"]} with jax {s["versions"]["jax"]}, '
            f'ensadv {s["versions"]["ensadv"]}'
            for s in sessions
        )
    )


def apart(collection: Collection) -> list[str]:
    """Returns which runs are not in the report, and why."""
    return [f'{name}: {reason}.' for name, reason in collection.apart]


def facts(collection: Collection) -> list[tuple[str, str]]:
    """Returns what stands at the top of the page."""
    runs = collection.runs
    facts = [('Runs', f'{len(runs)}, of {len(collection.systems)} systems')]
    if runs:
        dataset, n = runs[0].record['dataset'], runs[0].n
        seeds = dict.fromkeys(run.seed for run in runs)
        facts += [
            (
                'Data',
                f'{dataset["name"]}, {n:,} of {dataset["num_test"]:,} test images; fingerprint '
                f'{dataset["fingerprint"][:16]}...',
            ),
            ('Threat model', _threat_model(runs[0].config)),
            ('Seeds', ', '.join(seeds)),
        ]
    if steps := sorted({run.steps for run in runs if run.is_trained_here}):
        facts.append(('Training steps', ', '.join(f'{s:,}' for s in steps)))
    if collection.apart:
        facts.append(('Not in this report', f'{len(collection.apart)} runs, listed at the end'))
    return [*facts, ('Made by', ' '.join([epath.Path(sys.argv[0]).name, *sys.argv[1:]]))]


def _threat_model(config: Mapping[str, Any]) -> str:
    return registry.threat_model_words(config.get('norm', 'linf'), config['epsilon'])
