"""Configs: their fields, as JSON, and what of them may change: plain Python, no JAX."""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from ensadv import architectures, python_files
from ensadv.attacks import registry
from ensadv.errors import ConfigError, UserError
from ensadv.values import nearest

# Fields that may change when a run goes on in its workdir: no step computes with them.
MUTABLE_FIELDS = (
    'data.data_dir',
    'data.path',  # the data's fingerprint is compared instead
    'data.download',
    'data.extra',  # so here
    'data.on_device',
    'audit',
    'blackbox',
    'debug',
    'device',
    'eval.attacks',
    'eval.batch_size',
    'eval.examples',
    'eval.blackbox_path',
    'eval.follow',
    'eval.follow_timeout',
    'eval.indices',  # what the file holds is compared instead
    'eval.inline',
    'eval.iterate_examples',
    'eval.long_attacks',
    'eval.long_attacks_on',
    'eval.seed',
    'eval.weights',  # those of a run that are not its usual ones have a folder of their own
    'members',
    'model.conv',
    'model.remat',
    'planes',
    'study',
    'train.checkpoint_every',
    'train.checkpoints_to_keep',
    'train.log_every',
    'train.overfitting_gap',
    'train.profile_step',
    'train.profile_steps',
    'train.snapshot_every',
    'train.steps',
    'train.steps_per_call',
    'train.stop_on_overfitting',
)

# What runs of older versions had, which did not say so.
_OF_OLDER_RUNS = {
    'norm': 'linf',
    'data.cutout': 0,
    'data.cutmix': 0.0,
    'data.extra_fraction': 0.0,
    'model.activation': 'relu',
    'model.padding': 'symmetric',
    'model.mean': None,
    'model.std': None,
    'model.source': None,
    'train.objective': 'paper',
    'train.beta': 6.0,
    'train.cross_entropy_of': 'ensemble',
    'train.label_smoothing': 0.0,
    'train.diversity': 'none',
    'train.adp_alpha': 2.0,
    'train.adp_beta': 0.5,
    'train.gal_weight': 0.5,
    'train.trs_similarity': 40.0,
    'train.trs_smoothness': 2 * 2.5 / 128**2,
    'train.trs_radius': 0.03,
    'train.dverge_epsilon': 0.07,
    'train.dverge_steps': 10,
    'train.dverge_layer': 'random',
    'train.dverge_start': 0,
    'train.awp_gamma': 0.0,
    'train.awp_start': 0,
    'train.schedule': 'steps',
    'train.warmup_steps': 0,
    'train.weight_decay_on': 'all',
    'train.ema_decay': 0.0,
}


def weights(config: ConfigDict) -> str:
    """Returns which weights of a run's snapshots are evaluated: 'trained' or 'averaged'."""
    found = config.eval.weights
    return ('averaged' if config.train.ema_decay else 'trained') if found == 'auto' else found


def cross_entropy_of(found: str, diversity: str) -> str:
    """Returns of what training's cross-entropy is: 'ensemble' or 'members'.

    Args:
      found, diversity: of a config, `train.cross_entropy_of` and `train.diversity`.
    """
    return ('ensemble' if diversity == 'none' else 'members') if found == 'auto' else found


# What each method of `train.diversity` is called, and its fields in `train` with their words.
_DIVERSITY_WORDS = {
    'adp': ('alpha', 'beta'),
    'gal': ('weight',),
    'trs': ('similarity', 'smoothness', 'radius'),
    'dverge': ('epsilon', 'steps', 'layer', 'start'),
}


def diversity_words(train: Mapping[str, Any]) -> str:
    """Returns how members are made to differ, as 'ADP with alpha 2, beta 0.5'.

    Args:
      train: a config's group `train`, whose `diversity` is not 'none'.
    """
    method = train['diversity']
    found = {name: train[f'{method}_{name}'] for name in _DIVERSITY_WORDS[method]}
    texts = (
        f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}'
        for name, value in found.items()
    )
    return f'{method.upper()} with {", ".join(texts)}'


def nearest_field(found: str, fields: Iterable[str], prefix: str = '') -> str:
    """Returns as `nearest` does which field a name may mean: 'steps' or 'train.lr', say.

    Args:
      found: the name.
      fields: all there are, as `field_types` names them.
      prefix: of the names in the answer.
    """
    found = found.replace('-', '_')
    last = found.rpartition('.')[2]
    # Of fields with one name a newcomer mostly means training's.
    fields = sorted(fields, key=lambda field: not field.startswith('train.'))

    def has_name(field: str) -> bool:
        name = field.rpartition('.')[2]
        return last in (name, ''.join(word[0] for word in name.split('_')))  # lr: learning_rate

    named = list(filter(has_name, fields))
    near = [field for field in named if f'.{found}'.endswith(f'.{field}')]
    near += difflib.get_close_matches(found, named, n=1, cutoff=0) if '.' in found else named
    near += difflib.get_close_matches(found, fields, n=1, cutoff=0.75)
    return f" (did you mean '{prefix}{near[0]}'?)" if near else ''


def field_types(config: ConfigDict, prefix: str = '') -> dict[str, type]:
    """Returns {'train.steps': int, ...}: the fields that a config has, and what they take."""
    types: dict[str, type] = {}
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            types |= field_types(value, f'{prefix}{name}.')
        else:
            is_reference = isinstance(value, FieldReference)
            types[f'{prefix}{name}'] = value.get_type() if is_reference else type(value)
    return types


def check_fields(config: ConfigDict, default: ConfigDict) -> None:
    """Raises ConfigError unless a config has the fields of the default one, and of their types."""
    found, known = field_types(config), field_types(default)
    for field in sorted(found.keys() - known.keys()):
        raise ConfigError(f'unknown config field {field}{nearest(field, known)}')
    for field in sorted(known.keys() - found.keys()):
        raise ConfigError(f'{field}: missing; a config is a diff on configs/default.py')
    values = flatten(config.to_dict())
    for field, kind in known.items():
        # With ignore_type() a field can hold what it does not take.
        kinds = [found[field]] + [type(values[field])] * (values[field] is not None)
        for other in kinds:
            if not issubclass(other, kind) and (kind, other) != (float, int):
                raise ConfigError(
                    f'{field}: expected {kind.__name__}, found {other.__name__}; '
                    'a config is a diff on configs/default.py'
                )


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns the resolved config as JSON holds it: dicts, lists, numbers, strings, None."""
    return json.loads(config.to_json())


def from_dict(values: Mapping[str, Any], base: ConfigDict) -> ConfigDict:
    """Sets the fields of `base` to the values that `to_dict` gave, and returns it.

    Fields that `values` lacks keep the value of `base`: a workdir written by an older version
    stays readable.

    Raises:
      ConfigError: if `values` has a field that `base` has not, or one of another type.
    """
    known = flatten(to_dict(base))
    for field, value in flatten(values).items():
        if field not in known:
            raise ConfigError(f'unknown config field {field}{nearest(field, known)}')
        if value is None:
            continue  # and so it can still be given a value on the command line
        try:
            value = tuple(value) if isinstance(value, list) else value
            base.update_from_flattened_dict({field: value})
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f'{field}: {error}') from error
    return base


def flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns {'train.steps': 500000, ...} for a nested dict."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat


def keep_network(config: ConfigDict, *, check_unchanged: bool = False) -> None:
    """Has model.source hold the text of the file that model.name names; of any other name nothing.

    A text that is there stays: it is that of the run, whatever became of the file.

    Args:
      config: validated; is changed.
      check_unchanged: whether a file that is there has to have the text that the config holds.

    Raises:
      ConfigError: if there is no such file, or it has another text.
    """
    own, kept = architectures.own(config.model.name), config.model.source
    if not own:
        config.model.source = None
    elif kept is None:
        config.model.source = _text_of(own)
    elif check_unchanged:
        try:
            now = _text_of(own)
        except ConfigError:
            return
        if now != kept:
            raise ConfigError(
                f'model.name: {own.file} is not what it was when the run began, whose text '
                'config.json has as model.source; put that back, or use another workdir'
            )


def _text_of(own: architectures.Own) -> str:
    try:
        return python_files.read(own.file)
    except UserError as error:
        raise ConfigError(f'model.name: {error}') from error


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's settings, flat, with those that an older version had and did not write."""
    found = _OF_OLDER_RUNS | flatten(config)
    named = found['train.cross_entropy_of'], found['train.diversity']
    return found | {'train.cross_entropy_of': cross_entropy_of(*named)}


def changed_fields(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: tuple[str, ...] = ()
) -> list[str]:
    """Returns 'field: old -> new' for each field in which two resolved configs differ.

    Fields of `MUTABLE_FIELDS` and of `ignore` are passed over; but not `train.steps` where every
    step's learning rate depends on it.
    """
    old, new = settings(old), settings(new)
    mutable = [*MUTABLE_FIELDS, *(f'eval.{kind}' for kind in registry.KINDS), *ignore]
    why = {}
    if (schedule := old['train.schedule']) != 'steps':
        mutable.remove('train.steps')
        why['train.steps'] = f', where train.schedule={schedule} ends'
    return [
        f'{_change(field, old[field], new.get(field))}{why.get(field, "")}'
        for field in old
        if _differs(field, old[field], new.get(field))
        and not any(field == m or field.startswith(f'{m}.') for m in mutable)
    ]


def _differs(field: str, old: Any, new: Any) -> bool:
    if field == 'model.name' and old != new and architectures.own(old) and architectures.own(new):
        # The file may have moved: its text is compared instead.
        return architectures.own(old)[1:] != architectures.own(new)[1:]
    return old != new


def _change(field: str, old: Any, new: Any) -> str:
    if field == 'model.source':
        return f'{field}: the text of the file that model.name names has changed'
    return f'{field}: {old} -> {new}'
