"""Checks a config before anything is compiled: plain Python, no JAX."""

import re
from typing import Any

from ml_collections import ConfigDict

from ensadv import architectures, values
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.errors import ConfigError
from ensadv.values import is_integer, shown

DEVICES = ('auto', 'cpu', 'gpu', 'tpu')
DATASETS = ('cifar10', 'cifar100', 'svhn_cropped', 'mnist', 'digits', 'npz')
ON_DEVICE = ('auto', 'yes', 'no')
COMBINES = ('probs', 'logits', 'gating')
TRAININGS = ('joint', 'separate')
OBJECTIVES = ('paper', 'trades', 'mart')
CROSS_ENTROPIES = ('ensemble', 'members')
DIVERSITIES = ('none', 'adp', 'gal', 'trs', 'dverge')
SCHEDULES = ('steps', 'cosine', 'one_cycle', 'linear')
# Far beyond what anyone trains. What is made for each of so many would take all memory, or hours.
MAX_WIDTH = 1000
MAX_MEMBERS = 1000
MAX_ROUNDS = 20
MAX_RESOLUTION = 10_000
MAX_WINDOW = 1000
MAX_DIRECTIONS = 1000
MAX_RADIUS = 1000
SPLITS = ('test', 'validation')
LONG_ATTACKS_ON = ('best_and_last', 'last')
WEIGHTS = ('trained', 'averaged')
DTYPES = ('float32', 'bfloat16')


def validate(config: ConfigDict) -> None:
    """Raises ConfigError, which names the field, for the first value that is not allowed."""
    for group in (_validate_data, _validate_network, _validate_train, _validate_attacks,
                  _validate_evaluation, _validate_blackbox, _validate_planes,
                  _validate_members, _validate_study):  # fmt: skip
        group(config)
    _one_of(config, 'device', DEVICES)
    _boolean(config, 'debug.nans')
    system = config.system
    if not isinstance(system, str) or not system.isprintable() or not 1 <= len(system) <= 100:
        raise ConfigError(
            f'system: expected a name of 1 to 100 printable characters, found {shown(system)!r}'
        )


def _validate_study(config: ConfigDict) -> None:
    _integer(config, 'audit.examples', 1)
    _boolean(config, 'study.audit')
    _boolean(config, 'study.members')
    _files(config, 'study.systems')
    seeds = tuple(config.study.seeds)
    if not seeds or not all(is_integer(seed, 0) for seed in seeds) or len(set(seeds)) != len(seeds):
        raise ConfigError(
            f'study.seeds: expected whole numbers >= 0 and <= {values.MAX_INTEGER}, each only '
            f'once, found {shown(seeds)}'
        )
    _files(config, 'study.responses')
    pair = _files(config, 'study.planes')
    if len(pair) not in (0, 2):
        raise ConfigError(
            'study.planes: expected none or two different systems of study.systems, found '
            f'{shown(pair)}'
        )


def _validate_data(config: ConfigDict) -> None:
    name = config.data.name
    if not (isinstance(name, str) and re.fullmatch(r'tfds:[\w/:.]+', name)):
        _one_of(config, 'data.name', (*DATASETS, 'tfds:NAME'))
    _integer(config, 'data.pad', 0)
    _integer(config, 'data.validation_examples', 0)
    if config.data.name == 'npz' and not config.data.path:
        raise ConfigError('data.path: needed for data.name=npz, as in --config.data.path=my.npz')
    if config.data.name != 'npz' and config.data.path:
        raise ConfigError(f'data.path: only for data.name=npz, found data.name={config.data.name}')
    _one_of(config, 'data.on_device', ON_DEVICE)
    _integer(config, 'data.cutout', 0)
    _validate_cutmix(config)
    extra, fraction = tuple(config.data.extra), config.data.extra_fraction
    if not all(isinstance(path, str) and path for path in extra):
        raise ConfigError(f'data.extra: expected names of files, found {shown(extra)}')
    _number(config, 'data.extra_fraction', 0, 1, below=True)
    if bool(extra) != bool(fraction):
        raise ConfigError(
            'data.extra, data.extra_fraction: expected both or none of them, found '
            f'{shown(extra)} and {fraction}'
        )


def _validate_cutmix(config: ConfigDict) -> None:
    """Refuses what needs one label for each image, where CutMix gives shares of two."""
    _number(config, 'data.cutmix', 0)
    for field, found in (
        ('attack.loss=margin', config.attack.loss == 'margin' and config.train.adversarial_weight),
        ('train.objective=mart', config.train.objective == 'mart'),
        ('train.diversity=adp', config.train.diversity == 'adp'),
    ):
        if config.data.cutmix and found:
            raise ConfigError(
                f'data.cutmix: expected 0 with {field}, which needs one label for each image, '
                f'found {config.data.cutmix:g}'
            )


def _validate_network(config: ConfigDict) -> None:
    name, depth = config.model.name, config.model.depth
    if not architectures.own(name):
        _one_of(config, 'model.name', (*architectures.ARCHITECTURES, 'FILE.py:Class'))
        if mistake := architectures.depth_mistake(name, depth):
            raise ConfigError(f'model.depth: {mistake}')
    _integer(config, 'model.width', 1, MAX_WIDTH)
    _one_of(config, 'model.dtype', ('auto', *DTYPES))
    _one_of(config, 'model.conv', ('auto', 'grouped', 'onednn', 'separate'))
    _one_of(config, 'model.activation', architectures.ACTIVATIONS)
    _one_of(config, 'model.padding', architectures.PADDINGS)
    if config.model.padding != 'symmetric' and name != 'wide_resnet':
        raise ConfigError(f'model.padding: only of wide_resnet, found model.name={shown(name)}')
    _validate_standardisation(config)
    _number(config, 'batch_norm.momentum', 0, 1, below=True)
    _number(config, 'batch_norm.epsilon', 0, above=True)
    _integer(config, 'ensemble.size', 1, MAX_MEMBERS)
    _one_of(config, 'ensemble.combine', COMBINES)
    _one_of(config, 'ensemble.training', TRAININGS)
    _integer(config, 'ensemble.gate_width', 1, MAX_WIDTH)
    _one_of(config, 'ensemble.members_snapshot', ('last', 'best'))
    if config.ensemble.combine == 'gating' and (
        config.ensemble.training == 'separate' or config.ensemble.members_from
    ):
        raise ConfigError(
            'ensemble.combine: gating is trained with the members, so it goes only with '
            'ensemble.training=joint and without ensemble.members_from'
        )
    members_from = config.ensemble.members_from
    if members_from is not None and not all(map(str.strip, members_from.split(','))):
        raise ConfigError(
            "ensemble.members_from: expected workdirs with a comma between them, as in 'W1,W2', "
            f"found '{shown(members_from)}'"
        )
    if members_from and config.eval.follow:
        raise ConfigError('eval.follow: not with ensemble.members_from, whose runs are finished')
    # Members trained separately have the seeds size * seed + i.
    _integer(config, 'seed', 0, 2**31 // config.ensemble.size - 1)


def _validate_standardisation(config: ConfigDict) -> None:
    mean, std = config.model.mean, config.model.std
    if mean is None and std is None:
        return
    if architectures.own(config.model.name):
        raise ConfigError('model.mean, model.std: not of a network of your own, which has its own')
    for field, found in (('model.mean', mean), ('model.std', std)):
        for value in found or (None,):
            values.check_number(field, value, -values.MAX_NUMBER)
    if len(mean) != len(std):
        raise ConfigError(
            'model.mean, model.std: expected as many of both, one for each channel, or one for '
            f'all, found {shown(mean)} and {shown(std)}'
        )
    for value in std:
        values.check_number('model.std', value, 0, above=True)


def _validate_train(config: ConfigDict) -> None:
    for field in ('steps', 'batch_size', 'steps_per_call', 'log_every', 'checkpoint_every',
                  'checkpoints_to_keep', 'snapshot_every', 'profile_steps'):  # fmt: skip
        _integer(config, f'train.{field}', 1)
    _integer(config, 'train.profile_step', 0)
    _number(config, 'train.adversarial_weight', 0)
    _number(config, 'train.learning_rate', 0, above=True)
    _number(config, 'train.learning_rate_factor', 0, above=True)
    _number(config, 'train.momentum', 0, 1, below=True)
    _number(config, 'train.weight_decay', 0)
    _number(config, 'train.ema_decay', 0, 1, below=True)
    _number(config, 'train.overfitting_gap', 0, 1, above=True)
    _boolean(config, 'train.stop_on_overfitting')
    _one_of(config, 'train.weight_decay_on', ('all', 'kernels'))
    _validate_schedule(config)
    _validate_objective(config)
    _validate_diversity(config)


def _validate_schedule(config: ConfigDict) -> None:
    train = config.train
    steps = tuple(train.learning_rate_steps)
    if not all(is_integer(s, 1) for s in steps) or list(steps) != sorted(set(steps)):
        raise ConfigError(
            f'train.learning_rate_steps: expected increasing steps >= 1 and '
            f'<= {values.MAX_INTEGER}, found {shown(steps)}'
        )
    _one_of(config, 'train.schedule', SCHEDULES)
    _integer(config, 'train.warmup_steps', 0)
    by_steps = train.schedule == 'steps'
    first, of_what = (
        (min(steps, default=train.warmup_steps + 1), 'the first of train.learning_rate_steps')
        if by_steps
        else (train.steps, 'train.steps')
    )
    if train.warmup_steps >= first:
        raise ConfigError(
            f'train.warmup_steps: expected fewer than {of_what}, {first}, found '
            f'{train.warmup_steps}'
        )


def _validate_objective(config: ConfigDict) -> None:
    train, attack = config.train, config.attack
    _one_of(config, 'train.objective', OBJECTIVES)
    _number(config, 'train.beta', 0)
    _number(config, 'train.label_smoothing', 0, 1, below=True)
    _number(config, 'train.awp_gamma', 0)
    _integer(config, 'train.awp_start', 0)
    if train.objective == 'paper' or not train.adversarial_weight:
        return
    if train.adversarial_weight != 1:
        raise ConfigError(
            f'train.adversarial_weight: expected 1 with train.objective={train.objective}, which '
            f'train.beta weighs, or 0 for clean training, found {train.adversarial_weight}'
        )
    if train.objective == 'mart' and train.label_smoothing:
        raise ConfigError(
            'train.label_smoothing: expected 0 with train.objective=mart, whose loss needs labels, '
            f'found {train.label_smoothing}'
        )
    if train.objective == 'trades':
        if attack.loss != 'cross_entropy':
            raise ConfigError(
                'attack.loss: expected cross_entropy with train.objective=trades, whose attack '
                f'climbs the divergence from the clean prediction, found {shown(attack.loss)}'
            )
        made = registry.training_settings(attack)
        if not registry.starts_differ(made.get('start'), made.get('sigma')):
            own = attack.name in registry.ONE_STEP
            field = f'attack.{attack.name}.start' if own else 'attack.start, attack.sigma'
            raise ConfigError(
                f'{field}: expected uniform, or gaussian with sigma > 0, with '
                'train.objective=trades: at the image itself its attack has no gradient'
            )


def _validate_diversity(config: ConfigDict) -> None:
    train, method = config.train, config.train.diversity
    _one_of(config, 'train.cross_entropy_of', ('auto', *CROSS_ENTROPIES))
    _one_of(config, 'train.diversity', DIVERSITIES)
    for name in ('adp_alpha', 'adp_beta', 'gal_weight', 'trs_similarity', 'trs_smoothness'):
        _number(config, f'train.{name}', 0)
    for name in ('trs_radius', 'dverge_epsilon'):
        _number(config, f'train.{name}', 0, 1)
    _integer(config, 'train.dverge_steps', 1)
    _integer(config, 'train.dverge_start', 0)
    if method == 'dverge' and train.dverge_start >= train.steps:
        raise ConfigError(
            f'train.dverge_start: expected fewer than train.steps, {train.steps}, or nothing would '
            f'be distilled, found {train.dverge_start}'
        )
    of_members = config_lib.cross_entropy_of(train.cross_entropy_of, method) == 'members'
    attacked_objective = train.objective if train.adversarial_weight else 'paper'
    size, training = config.ensemble.size, config.ensemble.training
    if method != 'none' and (size == 1 or training == 'separate'):
        raise ConfigError(
            f'train.diversity: {method} needs two members or more that are trained jointly, found '
            f'ensemble.size={size}, ensemble.training={training}'
        )
    if of_members and config.ensemble.combine == 'gating':
        raise ConfigError(
            "ensemble.combine: expected probs or logits where training's cross-entropy is of the "
            'members (train.cross_entropy_of, train.diversity), from which gates learn nothing, '
            'found gating'
        )
    if attacked_objective == 'mart' and train.cross_entropy_of == 'members':
        raise ConfigError(
            'train.cross_entropy_of: expected auto or ensemble with train.objective=mart, whose '
            'loss is no cross-entropy, found members'
        )
    allowed = ('paper',) if method == 'dverge' else ('paper', 'trades')
    if method != 'none' and attacked_objective not in allowed:
        raise ConfigError(
            f'train.objective: expected {" or ".join(allowed)} with train.diversity={method}, or '
            f'train.adversarial_weight=0, found {attacked_objective}'
        )


def _validate_attacks(config: ConfigDict) -> None:
    _one_of(config, 'norm', registry.NORMS)
    _number(config, 'epsilon', 0, registry.longest(config.norm))
    _one_of(config, 'attack.name', registry.FOR_TRAINING)
    _one_of(config, 'attack.batch_norm', ('running', 'batch'))
    if (name := config.attack.name) in registry.ONE_STEP:
        norms = registry.ONE_STEP[name].norms
        if config.norm not in norms:
            allowed = ', '.join(norms)
            raise ConfigError(f'attack.name: {name} needs norm={allowed}, found {config.norm}')
        _one_of(config, 'attack.loss', registry.LOSSES)
        _attack_group(config, f'attack.{name}', name)
    else:
        _attack_group(config, 'attack', name)


def _attack_group(config: ConfigDict, group: str, kind: str) -> None:
    """Checks the settings that a group has of a kind of attack."""
    found = _get(config, group).to_dict()
    registry.check(kind, f'{group}.', found, config.norm, config.epsilon)


def checked_entry(config: ConfigDict, field: str, text: str) -> registry.Entry:
    """Returns an entry of a field, whose name and settings are checked."""
    entry = registry.entry(text, field)
    # Under a name that does not tell, the report would show one attack's numbers as another's. The
    # number of examples stands beside every result.
    tells = set(entry.changes) <= {'examples'} if not entry.suffix else bool(entry.changes)
    if not tells:
        raise ConfigError(
            f"{field}: '{shown(text)}': an attack with settings of its own has a name of its own, "
            'and the other way round, as in pgd20_margin(loss=margin)'
        )
    found = dict(config.eval.get(entry.kind, {})) | entry.changes
    registry.check(entry.kind, f'{field}: {entry.name}: ', found, config.norm, config.epsilon)
    return entry


def _validate_evaluation(config: ConfigDict) -> None:
    group = config.eval
    for kind in (kind for kind in registry.KINDS if kind in group):
        _attack_group(config, f'eval.{kind}', kind)
    attacks, long_attacks = tuple(group.attacks), tuple(group.long_attacks)
    if not attacks:
        raise ConfigError(f'eval.attacks: expected at least one attack, found {attacks}')
    named = []
    for field, found in (('eval.attacks', attacks), ('eval.long_attacks', long_attacks)):
        for text in found:
            entry = checked_entry(config, field, text)
            if field == 'eval.long_attacks' and entry.kind in registry.WITHOUT_SETTINGS:
                raise ConfigError(f'{field}: {entry.name} has no steps; it belongs to eval.attacks')
            named.append(entry.name)
    if len(set(named)) != len(named):
        raise ConfigError(
            'eval.attacks, eval.long_attacks: expected attacks, each named once, found '
            f'{shown(attacks)} and {shown(long_attacks)}'
        )
    _one_of(config, 'eval.long_attacks_on', LONG_ATTACKS_ON)
    _integer(config, 'eval.seed', 0)
    _integer(config, 'eval.batch_size', 1)
    if group.num_examples is not None:
        _integer(config, 'eval.num_examples', 1)
    if group.indices is not None and group.num_examples is not None:
        raise ConfigError(
            'eval.indices, eval.num_examples: expected at most one of them, found '
            f'{shown(group.indices)} and {group.num_examples}'
        )
    _integer(config, 'eval.iterate_examples', 0)
    _integer(config, 'eval.examples', 0)
    _one_of(config, 'eval.select_on', SPLITS)
    if group.select_on == 'validation' and not config.data.validation_examples:
        raise ConfigError(
            'eval.select_on: validation needs held-out examples, as in '
            '--config.data.validation_examples=5000, from the start of training'
        )
    if group.select_on == 'validation' and set(named) == {'blackbox'}:
        raise ConfigError(
            'eval.select_on: validation needs an attack that can be made on held-out examples; '
            'eval.attacks names only blackbox'
        )
    _one_of(config, 'eval.dtype', DTYPES)
    _one_of(config, 'eval.weights', ('auto', *WEIGHTS))
    if group.weights == 'averaged' and not config.train.ema_decay:
        raise ConfigError(
            'eval.weights: averaged weights need an average, as in --config.train.ema_decay=0.995, '
            'from the start of training'
        )
    _number(config, 'eval.follow_timeout', 0, above=True)


def _validate_blackbox(config: ConfigDict) -> None:
    _attack_group(config, 'blackbox', 'pgd')
    _integer(config, 'blackbox.rounds', 1, MAX_ROUNDS)
    steps, rounds = config.blackbox.steps, config.blackbox.rounds
    if (last := steps * 2 ** (rounds - 1)) > registry.MAX_STEPS:
        raise ConfigError(
            f'blackbox.steps, blackbox.rounds: expected at most {registry.MAX_STEPS} steps in the '
            f'last round, which has {last}'
        )
    _integer(config, 'blackbox.seed', 0, 2**30)
    if not _files(config, 'blackbox.sources'):
        raise ConfigError('blackbox.sources: expected at least one name, found ()')


def _validate_planes(config: ConfigDict) -> None:
    group = config.planes
    places = tuple(group.images)
    if not all(is_integer(p, 0) for p in places) or len(set(places)) != len(places):
        raise ConfigError(
            'planes.images: expected places in the test split, whole numbers >= 0, each once, as '
            'in --config.planes.images="(0, 1, 2)", or () to have them chosen, found '
            f'{shown(places)}'
        )
    listed = registry.entries(config.eval).get(group.attack)
    found = listed or checked_entry(config, 'planes.attack', group.attack)
    if not found.steps or registry.is_staged(found.name):
        allowed = [kind for kind, known in registry.KINDS.items() if not known.stages]
        why = 'is one in stages' if found.steps else 'has no steps'
        raise ConfigError(
            f'planes.attack: {group.attack} {why}; '
            f'expected one of {", ".join(allowed)} with a number of steps, as in '
            '--config.planes.attack=pgd20'
        )
    _number(config, 'planes.window', 2, MAX_WINDOW)  # 2 holds all that an attack may do
    _integer(config, 'planes.resolution', 2, MAX_RESOLUTION)


def _validate_members(config: ConfigDict) -> None:
    group = config.members
    _integer(config, 'members.examples', 1)
    _integer(config, 'members.directions', 1, MAX_DIRECTIONS)
    _number(config, 'members.radius', 0, MAX_RADIUS, above=True)
    listed, names = registry.entries(config.eval), []
    for text in group.attacks:
        found = listed.get(text) or checked_entry(config, 'members.attacks', text)
        names.append(found.name)
        if found.kind in registry.WITHOUT_SETTINGS:
            raise ConfigError(f'members.attacks: {found.name} attacks nothing')
        settings = registry.settings(config.eval, found, config.epsilon) | {'attack': found.kind}
        if registry.is_staged(found.name) and not registry.only_stage(settings):
            raise ConfigError(
                f'members.attacks: {found.name} is made of several stages; expected attacks of '
                'one, as pgd20, apgd_ce or square'
            )
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            f'members.attacks: expected attacks, each once, found {shown(tuple(group.attacks))}'
        )


def _files(config: ConfigDict, field: str) -> tuple[str, ...]:
    """Returns names of files in configs/, each of which may stand there only once."""
    names = tuple(_get(config, field))
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f'{field}: {shown(name)!r} is not the name of a file in configs/')
    if len(set(names)) != len(names):
        raise ConfigError(f'{field}: expected names, each only once, found {shown(names)}')
    return names


def _get(config: ConfigDict, field: str) -> Any:
    for part in field.split('.'):
        config = config[part]
    return config


def _one_of(config: ConfigDict, field: str, allowed: tuple[str, ...]) -> None:
    values.check_choice(field, _get(config, field), allowed)


def _boolean(config: ConfigDict, field: str) -> None:
    if not isinstance(found := _get(config, field), bool):
        raise ConfigError(f'{field}: expected True or False, found {shown(found)!r}')


def _integer(config: ConfigDict, field: str, low: int, high: int = values.MAX_INTEGER) -> None:
    values.check_integer(field, _get(config, field), low, high)


def _number(
    config: ConfigDict, field: str, low: float, high: float = values.MAX_NUMBER, **ends: bool
) -> None:
    values.check_number(field, _get(config, field), low, high, **ends)
