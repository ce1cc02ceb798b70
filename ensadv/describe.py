"""The describe job: what a config amounts to, without training."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from ensadv import architectures, build, prng, study
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.data import datasets
from ensadv.evaluation import attack_settings, blackbox
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.storage import workdir
from ensadv.training import costs, diversity, feeds, from_config, streams, train
from ensadv.training.objectives import Predict


def run(config: ConfigDict, path: epath.Path | None, systems_dir: epath.Path) -> str:
    """Returns what a config amounts to, as a text.

    Args:
      config: validated, with its references unresolved.
      path: the workdir of a run, whose data need then not be there; or None.
      systems_dir: configs/.

    Raises:
      UserError: for what training, or the study, would refuse.
    """
    distributed.take_device(config.device)
    record = workdir.read_record(path) if path is not None else None
    if record is not None and record['config']['data']['name'] == config.data.name:
        dataset = record['dataset']
        held_out = dataset.get('num_validation', 0)
        dataset = dataset | {'num_train': dataset['num_train'] + held_out}
    else:
        name, group = config.data.name, config.data
        shape, classes = datasets.spec(name, data_dir=group.data_dir, path=group.path)
        num_train, num_test = datasets.sizes(name, data_dir=group.data_dir, path=group.path)
        # Sizes do not depend on the pixels' mean and deviation.
        dataset = {'name': name, 'image_shape': shape, 'num_classes': classes}
        dataset |= {'mean': [0.0], 'std': [1.0], 'num_train': num_train, 'num_test': num_test}
        if extra := build.extra(config, shape, classes):
            dataset['extra'] = extra.describe()
    check(config, dataset, systems_dir)
    dataset['num_train'] -= config.data.validation_examples
    return describe(config, dataset)


def check(config: ConfigDict, dataset: Mapping[str, Any], systems_dir: epath.Path) -> None:
    """Refuses what training, or the study, would refuse, but for what its devices decide.

    Args:
      config: validated, with its references unresolved.
      dataset: 'num_test', and 'num_train', with nothing held out.
      systems_dir: configs/.

    Raises:
      UserError: as training would.
    """
    build.test_places(config, dataset['num_test'])
    datasets.check_held_out(dataset['name'], dataset['num_train'], config.data.validation_examples)
    if config.study.systems:
        for _ in study.runs(config, systems_dir):
            pass
        if 'blackbox' in config.eval.attacks and not config.eval.blackbox_path:
            blackbox.source_configs(config, systems_dir)
            return
    for name in registry.names(config.eval):
        attack_settings.evaluation_settings(config, name)


def describe(config: ConfigDict, dataset: Mapping[str, Any]) -> str:
    """Returns a text of sizes and settings.

    Args:
      config: validated.
      dataset: 'name', 'image_shape', 'num_classes', 'num_train', 'mean' and 'std', as
        `data.Dataset.describe` gives them, and 'extra', see `train.check_fits`.

    Raises:
      ConfigError: if the batch does not fit the data or the devices.
      UserError: if config.device is not there.
    """
    distributed.check_device(config.device)
    config = build.resolve(config)
    train.check_fits(config, dataset)
    sections = {
        f'{config.system}': _system(config, dataset),
        'on this machine': _computation(config),
        'parameters': _parameters(config, dataset),
        'operations per example (a multiply-add counts as 2)': _flops(config, dataset),
        f'memory of training, batch of {config.train.batch_size}, estimated': _memory(
            config, dataset
        ),
        'learning rate': _learning_rate(config),
        'attack in training': _training_attack(config),
        'attacks in evaluation': _evaluation_attacks(config),
        'operations of evaluation, of an image that stands to the end': _evaluation_flops(
            config, dataset
        ),
    }
    lines = []
    for title, rows in sections.items():
        width = max(map(len, rows))
        lines += [title, *(f'  {name.ljust(width)}  {value}' for name, value in rows.items()), '']
    return '\n'.join(lines)


def _shapes(config: ConfigDict, dataset: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the network, and the shapes of all members' variables."""
    model = costs.one_device(config, dataset)
    shape, k = tuple(dataset['image_shape']), config.ensemble.size
    return model, jax.eval_shape(lambda: ensemble.init(model, prng.key(0), k, shape))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parameters(config: ConfigDict, dataset: Mapping[str, Any]) -> int:
    """Returns the number of weights of all members."""
    return costs.size(_shapes(config, dataset)[1]['params'])


_COMBINES = {
    'probs': 'the mean of their probs',
    'logits': 'the mean of their logits',
    'gating': 'gating: a weighted mean of their probs',
}


def _network(config: ConfigDict) -> str:
    group = config.model
    return architectures.words(group.name, group.depth, group.width, group.activation)


def _system(config: ConfigDict, dataset: Mapping[str, Any]) -> dict[str, str]:
    k = config.ensemble.size
    train = config.train
    if config.ensemble.training == 'separate':
        training = 'each member by itself'
    elif config_lib.cross_entropy_of(train.cross_entropy_of, train.diversity) == 'members':
        training = "one loss, the sum of its members'"
    else:
        training = 'one loss, of the ensemble'
    return {
        'network': _network(config),
        'members': f'{k}, combined by {_COMBINES[config.ensemble.combine]}',
        'training': f'{training}, {_objective(config)}',
        'data': f'{dataset["name"]}, images {tuple(dataset["image_shape"])}, '
        f'{dataset["num_classes"]} classes{_extra(config, dataset)}',
        'threat model': registry.threat_model_words(config.norm, config.epsilon),
        'steps': f'{config.train.steps:,} of {config.train.batch_size} examples',
    }


def _extra(config: ConfigDict, dataset: Mapping[str, Any]) -> str:
    if not dataset.get('extra'):
        return ''
    num, size = streams.num_extra(config), config.train.batch_size
    return f'; {num} of {size} examples from {dataset["extra"]["num"]:,} extra images'


def _objective(config: ConfigDict) -> str:
    """Returns what each of training's losses is."""
    train = config.train
    if not from_config.objective(config).attacks:
        text = 'clean'
    elif train.objective == 'paper':
        text = f'adversarial weight {train.adversarial_weight:g}'
    else:
        text = f'{train.objective.upper()} with beta {train.beta:g}'
    if train.diversity != 'none':
        text += f', {config_lib.diversity_words(train)}'
    if train.label_smoothing:
        text += f', label smoothing {train.label_smoothing:g}'
    if train.awp_gamma:
        text += f', AWP with gamma {train.awp_gamma:g} from step {train.awp_start:,}'
    if train.ema_decay:
        text += f', averaged weights (decay {train.ema_decay:g})'
    return text


def _computation(config: ConfigDict) -> dict[str, str]:
    return {
        'training': build.computation(config, config.model.dtype),
        'evaluation': build.computation(config, config.eval.dtype),
    }


def _parameters(config: ConfigDict, dataset: Mapping[str, Any]) -> dict[str, str]:
    total = parameters(config, dataset)
    return {'per member': f'{total // config.ensemble.size:,}', 'in all': f'{total:,}'}


def _flops(config: ConfigDict, dataset: Mapping[str, Any]) -> dict[str, str]:
    operations = costs.operations(config, dataset)
    rows = {'forward': _giga(operations.forward)}
    made = costs.passes(config)
    parts = []
    if made.predictions:
        parts.append(f'a prediction of {_giga(operations.forward)}')
    if made.attack_steps:
        steps = f'{made.attack_steps} attack step{"s" * (made.attack_steps > 1)}'
        parts.append(f'{steps} of {_giga(operations.attack_step)}')
    if made.attack_steps or made.perturbed_share or made.updates > 1:
        number = (1 + made.perturbed_share) * made.updates
        mean = ' on average' * (0 < made.perturbed_share < 1)
        parts.append(f'{number:.3g} passes of {_giga(operations.update)}{mean}')
    times = 1 + made.perturbed_share
    for number, what in (
        (made.distillation_steps, 'steps that distil'),
        (made.gradient_updates, 'backward passes through input gradients'),
        (made.gradient_steps, 'steps that climb input gradients'),
    ):
        if number:
            parts.append(f'{times * number:.3g} {what}')
    kind = 'adversarial' if made.attack_steps else 'clean'
    rows[f'{kind} step'] = _giga(operations.train_step) + f' ({", ".join(parts)})' * bool(parts)
    total = operations.train_step * config.train.batch_size * config.train.steps
    rows['whole training'] = f'{total:.3g}'
    return rows


def _memory(config: ConfigDict, dataset: Mapping[str, Any]) -> dict[str, str]:
    """Adds up weights, optimizer, gradients, and what the backward pass keeps of the forward."""
    batch = config.train.batch_size
    model, variables = _shapes(config, dataset)
    x = jax.ShapeDtypeStruct((batch, *dataset['image_shape']), jnp.float32)
    params = variables['params']

    def kept(params, stats, x):
        f = lambda params: ensemble.apply_train(model, {'params': params, 'batch_stats': stats}, x)
        return jax.vjp(f, params)[1]

    def kept_of_gradients(params, stats, x):
        y = jnp.zeros(batch, jnp.int32)
        predict = functools.partial(Predict, model, 'probs', batch_stats=stats)
        f = lambda params: diversity.input_gradients(predict(params=params), x, y)
        return jax.vjp(f, params)[1]

    made = costs.passes(config)

    def activations_of(f):
        # The weights are among what is kept, and counted already.
        return _bytes(jax.eval_shape(f, params, variables['batch_stats'], x)) - _bytes(params)

    activations, passes = activations_of(kept), made.updates
    perturbed = bool(config.train.awp_gamma)
    state = (3 + perturbed) * _bytes(params) + _bytes(variables['batch_stats'])
    weights = 'weights, perturbed weights' if perturbed else 'weights'
    nums = dataset['num_train'], (dataset.get('extra') or {'num': 0})['num']
    images = sum(nums) * math.prod(dataset['image_shape'])
    fits = feeds.fits_devices(config, images, max(nums))
    rows = {
        'images': f'{_mebi(images)}, {"on every device" if fits else "streamed from the host"}',
        'on every device': f'{_mebi(state)} ({weights}, momentum and gradients, float32)',
        'over all devices': f'{_mebi(passes * activations)} (activations for the backward pass, '
        f'{passes} x {_mebi(activations)})',
    }
    if made.gradient_updates:
        rows['instead, for input gradients'] = (
            f'{_mebi(activations_of(kept_of_gradients))} (for a backward pass through them)'
        )
    return rows


def _learning_rate(config: ConfigDict) -> dict[str, str]:
    train, schedule = config.train, from_config.schedule(config)
    last = train.steps - 1
    if train.schedule == 'steps' and not train.warmup_steps:
        from_on = [0, *(s for s in train.learning_rate_steps if s <= last)]
        return {f'from step {step:,}': f'{float(schedule(step)):g}' for step in from_on}
    at = {train.warmup_steps, *(quarter * last // 4 for quarter in range(5))}
    if train.schedule == 'steps':
        at |= {*train.learning_rate_steps}
    rates = {f'at step {s:,}': f'{float(schedule(s)):g}' for s in sorted(at) if s <= last}
    return {'schedule': train.schedule} | rates


def _training_attack(config: ConfigDict) -> dict[str, str]:
    objective = from_config.objective(config)
    if not objective.attacks:
        return {'none': 'clean training'}
    settings = registry.training_settings(config.attack)
    name, steps = settings.pop('attack'), settings.pop('steps')
    if objective.attack_target:
        settings['loss'] = 'divergence from the clean prediction'
    return {
        name if name in registry.ONE_STEP else f'{name}{steps}': _settings(settings),
        'batch norm': f'{config.attack.batch_norm} statistics',
    }


def _evaluation_attacks(config: ConfigDict) -> dict[str, str]:
    rows = {}
    for name in _evaluation_names(config):
        if name == 'blackbox':
            rows[name] = (
                f'the examples of {config.eval.blackbox_path or "a set made for the study"}'
            )
            continue
        settings = attack_settings.evaluation_settings(config, name)
        rows[name] = _settings({key: settings[key] for key in _SHOWN if key in settings}) or '-'
    return rows


_SHOWN = (
    'step_size', 'schedule', 'start', 'sigma', 'restarts', 'loss', 'iterate_examples',
    'gradient_steps', 'targets', 'queries', 'examples',
)  # fmt: skip


def _evaluation_names(config: ConfigDict) -> list[str]:
    """Returns the attacks on every snapshot, and then the long ones."""
    long = (registry.entry(text).name for text in config.eval.long_attacks)
    return [*registry.names(config.eval), *long]


# Of a step of an attack: gradient steps and predictions.
_PASSES = {'fab': (1, 1), 'square': (0, 1)}


def _evaluation_flops(config: ConfigDict, dataset: Mapping[str, Any]) -> dict[str, str]:
    """Counts an attack's steps, and leaves its start out; whatever falls costs less."""
    operations = costs.operations(config, dataset)
    rows = {}
    for name in _evaluation_names(config):
        if name in registry.WITHOUT_SETTINGS:
            rows[name] = _giga(operations.forward)
            continue
        settings = attack_settings.evaluation_settings(config, name)
        stages = [settings]
        if registry.is_staged(name):
            sizes = dataset['num_classes'], config.ensemble.size
            stages = [stage.settings for stage in registry.stages(settings, *sizes)]
        total = 0.0
        for stage in stages:
            gradients, predictions = _PASSES.get(stage['attack'], (1, 0))
            step = gradients * operations.attack_step + predictions * operations.forward
            total += stage['steps'] * stage.get('restarts', 1) * step
        rows[name] = _giga(total)
    return rows


def _settings(settings: Mapping[str, Any]) -> str:
    if settings.get('start') != 'gaussian':
        settings = {name: value for name, value in settings.items() if name != 'sigma'}
    in_pixels = ('step_size', 'sigma', 'noise')
    return ', '.join(
        f'{name} {_pixels(value) if name in in_pixels else value}'
        for name, value in settings.items()
    )


def _pixels(value: float) -> str:
    return f'{value:.4g} ({255 * value:.3g}/255)'


def _giga(flops: float) -> str:
    return f'{flops / 1e9:.4g} G'


def _mebi(size: float) -> str:
    return f'{size / 2**20:,.0f} MiB'
