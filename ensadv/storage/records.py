"""What the program's own JSON files have to hold, checked before anything is made of them.

They may have been damaged or edited, or be another program's: config.json is a common name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# A schema is str; float, for any number; a range, for whole numbers in it; None; a list with the
# schema of its elements, however many, or with one for each of them; a dict with those of its
# entries ('name?' need not be there); or a tuple of schemas, one of which is enough.
_COUNT = range(1, 2**31)
_NUMBER = range(2**31)  # from 0
_LARGE = range(2**63)
_LARGEST = 2**63  # beyond it a whole number is damage, and cannot always become a float

_CONFIG = {
    'system': str,
    'seed': _NUMBER,
    'epsilon': float,
    'data': {'name': str},
    'model': {'name': str, 'depth': _COUNT, 'width': _COUNT, 'dtype': str},
    'ensemble': {
        'size': _COUNT,
        'combine': str,
        'training': str,
        'members_snapshot?': str,
        'members_from?': (str, None),
    },
    'train': {
        'steps': _COUNT,
        'batch_size': _COUNT,
        'adversarial_weight': float,
        'learning_rate': float,
        'learning_rate_steps': [_COUNT],
        'learning_rate_factor': float,
        'momentum': float,
        'weight_decay': float,
        # Older runs have none of these.
        'objective?': str,
        'beta?': float,
        'label_smoothing?': float,
        'awp_gamma?': float,
        'schedule?': str,
        'warmup_steps?': _NUMBER,
        'weight_decay_on?': str,
    },
    'attack': {'name': str, 'steps': _COUNT, 'step_size': float, 'start': str, 'sigma': float},
    'eval': {'attacks': [str], 'blackbox_path': (str, None), 'select_on': str},
}
_OPERATIONS = (None, {'forward': float, 'train_step': float})  # older runs have none
_ENVIRONMENT = {
    'devices': {'count': _COUNT, 'kind': str},
    'versions': {'ensadv': str, 'jax': str},
    # Older runs have no switches.
    'xla_flags?': str,
    'switches?': {},
}

# What a transfer set tells of a run that it was made from.
SOURCE = {'system': str, 'seed': _NUMBER, 'config': {}}

# What is known of weights that were imported: the step that they stand for, and how the file's
# weights are called.
IMPORTED = {'file': str, 'digest': str, 'naming': str, 'step': _COUNT}
EXPORTED = 'ensadv'  # the naming of what --mode=export wrote, with the config of its training

# What an ensemble of runs tells of a member.
_MEMBER = {
    'workdir': str,
    'system': str,
    'seed': _NUMBER,
    'step': _COUNT,
    'parameters': _LARGE,
    'operations?': _OPERATIONS,
    'config': _CONFIG,
}

# config.json, see `workdir.write_record`.
_RUN = {
    'config': _CONFIG,
    'dataset': {
        'name': str,
        'fingerprint': str,
        'num_classes': _COUNT,
        'class_names?': (None, [str]),
        'image_shape': [_COUNT, _COUNT, _COUNT],
        'mean': [float],
        'std': [float],
        'num_train': _COUNT,
        'num_test': _COUNT,
        'indices?': (None, str),
        'extra?': {'num': _COUNT, 'fingerprint': str},
    },
    'parameters': _LARGE,
    'operations?': _OPERATIONS,
    'members?': [_MEMBER],
    'imported?': IMPORTED,
    'sessions': [_ENVIRONMENT | {'seconds_per_step?': float, 'workdir?': str}],
}

# config.json of a model that is given, see `any_model`: nobody knows how it was trained.
_TRAINING = ('model', 'train', 'attack', 'ensemble')
_OF_MODEL = {
    **{key: value for key, value in _RUN.items() if key not in ('parameters', 'members?')},
    'config': {
        **{key: value for key, value in _CONFIG.items() if key not in _TRAINING},
        'ensemble': {'combine': str},
    },
    'dataset': _RUN['dataset'] | {'num_train': _NUMBER},
    'model': {'function': str, 'file': (str, None), 'digest': (str, None), 'margins': [float]},
}

# eval/<step>.json, see `results.Results`.
_RESULT = _ENVIRONMENT | {
    'name': str,
    'key?': str,
    'n': _COUNT,
    'correct': _NUMBER,
    'accuracy': float,
    'last_iterate_accuracy': (float, None),
    'last_iterate_n?': _NUMBER,
    'no_gradient': _NUMBER,
    'settings': {},
    'stages?': [{'name': str, 'attacked': _NUMBER, 'felled': _NUMBER, 'accuracy': float}],
    'curve?': {
        'steps': [_COUNT],
        'accuracy': [float],
        'iterate_accuracy': [float],
        'iterate_n': _NUMBER,
    },
}
# What decides an attack that has steps, as far as it is read.
ATTACK_SETTINGS = {'attack': str, 'steps': _COUNT, 'restarts': _COUNT, 'epsilon': float}

EVALUATION = {
    'system': str,
    'seed': _NUMBER,
    'step': _NUMBER,
    'fingerprint': str,
    'robust?': {
        'n': _COUNT,
        'correct': _NUMBER,
        'accuracy': float,
        'no_gradient': _NUMBER,
        'attacks': [str],
    },
    'attacks': [_RESULT],
    'validation': [_RESULT],
}

# eval/<step>_audit.json, see `audits`.
AUDIT = {
    'step': _NUMBER,
    'n': _COUNT,
    'attacks': [str],
    'reported': float,
    'found': float,
    'checks': [{'name': str, 'verdict': str, 'evidence': str, 'n': _NUMBER, 'remedy': str}],
}


# eval/<step>_members.json, see `member_files`: as far as it is read.
_ESTIMATE = {'value': (float, None), 'low': (float, None), 'high': (float, None), 'n': _NUMBER}
_CONDITION = {
    'accuracy': [_ESTIMATE],
    'accuracy_of_members': _ESTIMATE,
    'erring': {'observed': [_ESTIMATE], 'independent': [_ESTIMATE]},
    'disagreement': _ESTIMATE,
    'kl': _ESTIMATE,
    'margin': [_ESTIMATE],
    'margin_of_members': _ESTIMATE,
    'below_whole_of_members': _ESTIMATE,
}
_DISTANCES = {
    'distance': [_ESTIMATE],
    'distance_of_members': _ESTIMATE,
    'reached': [_ESTIMATE],
    'reached_of_members': _ESTIMATE,
}
MEMBERS = {
    'system': str,
    'step': _NUMBER,
    'k': _COUNT,
    'n': _COUNT,
    'settings': {'attacks': {}, 'radius': float},
    'clean': _CONDITION,
    'attacks': {},  # by name, each as MEMBERS_ATTACK has it
    'gradients': {},  # by place, each as MEMBERS_GRADIENTS has it
    'distances': {'adversarial': _DISTANCES, 'random': _DISTANCES},
}
MEMBERS_ATTACK = {
    'transfer': [[_ESTIMATE]],
    'no_gradient': [_NUMBER],
    'without_a_member': _ESTIMATE,
    'member_itself': _ESTIMATE,
    'another_member': _ESTIMATE,
    'whole_by_member': _ESTIMATE,
    'on_whole': _CONDITION,
}
MEMBERS_GRADIENTS = {'cosine': _ESTIMATE, 'sign': _ESTIMATE, 'undefined': [_NUMBER]}


def members_mismatch(content: Any) -> str | None:
    """Returns why JSON is not the content of an eval/<step>_members.json; None if it is."""
    if reason := mismatch(content, MEMBERS):
        return reason
    for group, schema in (('attacks', MEMBERS_ATTACK), ('gradients', MEMBERS_GRADIENTS)):
        if not content[group]:
            return f'nothing in {group}'
        for name, found in content[group].items():
            if reason := mismatch(found, schema, f'{group}.{name}'):
                return reason
    return None


def run_mismatch(record: Any) -> str | None:
    """Returns why JSON is not the content of a run's config.json; None if it is."""
    is_model = isinstance(record, Mapping) and 'model' in record
    if reason := mismatch(record, _OF_MODEL if is_model else _RUN):
        return reason
    dataset = record['dataset']
    channels = dataset['image_shape'][-1]
    if not len(dataset['mean']) == len(dataset['std']) == channels:
        return f'dataset: expected mean and std of {channels} channels'
    if record.get('members') and 'members_snapshot' not in record['config']['ensemble']:
        return 'no config.ensemble.members_snapshot'
    names = dataset.get('class_names')
    if names is not None and len(names) != dataset['num_classes']:
        return f'dataset: expected names of {dataset["num_classes"]} classes, found {len(names)}'
    return None


def mismatch(value: Any, schema: Any, name: str = '') -> str | None:
    """Returns where a JSON value is not what a schema says, and how; None where it is.

    Args:
      value: as `json.loads` gives it.
      schema: see above.
      name: of the value, as in 'config.train'; '' for the whole file.
    """
    if isinstance(schema, tuple):
        reasons = [mismatch(value, each, name) for each in schema]
        return None if None in reasons else reasons[0]
    if isinstance(schema, Mapping):
        return _entries_mismatch(value, schema, name)
    if isinstance(schema, list):
        return _elements_mismatch(value, schema, name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(schema, range):
        expected = f'a whole number in {schema.start}..{schema.stop - 1}'
        return None if whole and value in schema else _found(value, expected, name)
    if schema is float:
        fits = isinstance(value, float) or (whole and abs(value) <= _LARGEST)
        return None if fits else _found(value, 'a number', name)
    if schema is None:
        return None if value is None else _found(value, 'null', name)
    return None if isinstance(value, str) else _found(value, 'a text', name)


def _elements_mismatch(value: Any, schema: Sequence[Any], name: str) -> str | None:
    if not isinstance(value, list):
        return _found(value, 'a list', name)
    schemas = schema * len(value) if len(schema) == 1 else schema
    if len(value) != len(schemas):
        return _found(value, f'a list of {len(schemas)}', name)
    each = enumerate(zip(value, schemas, strict=True))
    reasons = (mismatch(one, of_one, f'{name}[{i}]') for i, (one, of_one) in each)
    return next(filter(None, reasons), None)


def _entries_mismatch(value: Any, schema: Mapping[str, Any], name: str) -> str | None:
    if not isinstance(value, Mapping):
        return _found(value, 'an object', name)
    for key, of_entry in schema.items():
        entry = key.removesuffix('?')
        path = f'{name}.{entry}' if name else entry
        if entry in value:
            if reason := mismatch(value[entry], of_entry, path):
                return reason
        elif entry == key:
            return f'no {path}'
    return None


def _found(value: Any, expected: str, name: str) -> str:
    text = json.dumps(value)
    text = text if len(text) <= 50 else f'{text[:50]}...'
    return f'{f"{name}: " if name else ""}expected {expected}, found {text}'
