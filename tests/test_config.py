import dataclasses
import importlib
import json
import pathlib
import re

import pytest
from absl import flags
from ml_collections import config_flags

from configs import default, quickstart, table1
from ensadv import config as config_lib
from ensadv import config_checks, flag_values
from ensadv.attacks import registry
from ensadv.errors import ConfigError, UserError

ROOT = pathlib.Path(__file__).parents[1]
SYSTEMS = table1.get_config().study.systems


def flat(config):
    return config_lib.flatten(config_lib.to_dict(config))


def test_the_papers_eight_systems_are_diffs_on_the_default():
    base = flat(default.get_config())
    diffs = {}
    for name in SYSTEMS:
        config = importlib.import_module(f'configs.{name}').get_config()
        config_checks.validate(config)
        diffs[name] = {k: v for k, v in flat(config).items() if v != base[k] and k != 'system'}
        assert config.system.lower() == name
    clean = {'train.adversarial_weight': 0.0}
    assert diffs == {
        'baseline': clean,
        'ensemble2': clean | {'ensemble.size': 2},
        'ensemble4': clean | {'ensemble.size': 4},
        'singleadv': {},
        'doubleadv': {'model.width': 15},
        'ensemble2adv': {'ensemble.size': 2},
        'ensemble4adv': {'ensemble.size': 4},
        'separate2adv': {'ensemble.size': 2, 'ensemble.training': 'separate'},
    }


def test_the_default_is_the_papers():
    expected = {
        'epsilon': 8 / 255, 'data.name': 'cifar10', 'model.depth': 28, 'model.width': 10,
        'train.steps': 500_000, 'train.batch_size': 128, 'train.momentum': 0.9,
        'train.learning_rate': 0.1, 'train.learning_rate_steps': [30_000, 60_000, 90_000],
        'train.learning_rate_factor': 0.2, 'train.weight_decay': 5e-4,
        'train.adversarial_weight': 1.0, 'attack.name': 'ifgsm', 'attack.steps': 7,
        'attack.step_size': 2 / 255, 'attack.sigma': 4 / 255, 'eval.pgd.sigma': 4 / 255,
    }  # fmt: skip
    found = flat(default.get_config())
    assert {field: found[field] for field in expected} == expected


def test_every_field_is_explained_where_it_is_declared_and_read_somewhere():
    declared = (ROOT / 'configs' / 'default.py').read_text()
    sources = [*(ROOT / 'ensadv').rglob('*.py'), ROOT / 'main.py']
    code = '\n'.join(path.read_text() for path in sources if path.name != 'config.py')
    for field in flat(default.get_config()):
        group, _, name = field.rpartition('.')
        if (kind := group.partition('.')[2]) in (kinds := registry.KINDS | registry.ONE_STEP):
            settings = kinds[kind].settings
            words = '\n'.join(base.__doc__ for base in settings.__mro__)
            assert f'\n      {name}: ' in words, field
            assert name in {known.name for known in dataclasses.fields(settings)}
            continue
        assert re.search(rf'\.{name} = .*  # \w', declared), field
        # the periods are read by the name of what is due
        by_name = {'name'}
        assert re.search(rf'\.{name}\b', code) or name in by_name, field


def test_sizes_follow_epsilon_unless_set():
    config = default.get_config()
    config.epsilon = 0.4
    config.eval.pgd.sigma = 0.01
    found = flat(config)
    assert found['attack.step_size'] == found['eval.ifgsm.step_size'] == 0.1
    assert found['eval.pgd.step_size'] == found['blackbox.step_size'] == 0.2
    assert found['attack.sigma'] == found['eval.ifgsm.sigma'] == 0.2
    assert found['eval.pgd.sigma'] == 0.01


@pytest.mark.parametrize(
    'field, value, told',
    [
        ('train.steps', 0, '>= 1, found 0'),
        ('train.steps', -5, 'found -5'),
        ('train.batch_size', 0, '>= 1'),
        ('epsilon', 1.5, '>= 0 and <= 1, found 1.5'),
        ('epsilon', -0.1, 'found -0.1'),
        ('epsilon', float('nan'), 'found nan'),
        ('model.depth', 27, '6n + 4'),
        ('model.depth', 4, '6n + 4'),
        ('model.width', 0, '>= 1'),
        ('model.name', 'wide_resnt', "did you mean 'wide_resnet'?"),
        ('device', 'tup', "did you mean 'tpu'?"),
        ('model.dtype', 'float16', "did you mean 'bfloat16'?"),
        ('model.conv', 'group', "did you mean 'grouped'?"),
        ('ensemble.size', 0, '>= 1'),
        ('ensemble.combine', 'prob', "did you mean 'probs'?"),
        ('ensemble.training', 'jointly', "did you mean 'joint'?"),
        ('data.name', 'cifar-10', "did you mean 'cifar10'?"),
        ('data.name', 'npz', 'data.path: needed'),
        ('data.path', 'x.npz', 'only for data.name=npz'),
        ('data.pad', -1, '>= 0'),
        ('data.name', 'tfds:', 'tfds:NAME'),
        ('data.cutout', -1, '>= 0'),
        ('data.cutmix', -0.5, '>= 0'),
        ('data.extra_fraction', 1.0, '>= 0 and < 1'),
        ('data.extra_fraction', 0.5, 'both or none'),
        ('data.extra', ('a.npz',), 'both or none'),
        ('data.extra', (1,), 'names of files'),
        ('data.on_device', 'maybe', 'allowed: auto, yes, no'),
        ('train.adversarial_weight', -1.0, '>= 0'),
        ('train.learning_rate', 0.0, '> 0'),
        ('train.learning_rate_steps', (5, 3), 'increasing'),
        ('train.momentum', 1.0, '>= 0 and < 1'),
        ('train.objective', 'trade', "did you mean 'trades'?"),
        ('train.beta', -1.0, '>= 0'),
        ('train.label_smoothing', 1.0, '>= 0 and < 1'),
        ('train.awp_gamma', -0.1, '>= 0'),
        ('train.awp_start', -1, '>= 0'),
        ('train.cross_entropy_of', 'member', "did you mean 'members'?"),
        ('train.diversity', 'trades', 'allowed: none, adp, gal, trs, dverge'),
        ('train.adp_alpha', -1.0, '>= 0'),
        ('train.trs_radius', 8.0, '>= 0 and <= 1'),
        ('train.dverge_steps', 0, '>= 1'),
        ('train.schedule', 'cosin', "did you mean 'cosine'?"),
        ('train.warmup_steps', -1, '>= 0'),
        ('train.warmup_steps', 30_000, 'fewer than the first of train.learning_rate_steps, 30000'),
        ('train.weight_decay_on', 'kernel', "did you mean 'kernels'?"),
        ('attack.name', 'igfsm', "did you mean 'ifgsm'?"),
        ('attack.steps', 0, '>= 1'),
        ('model.activation', 'swish', 'allowed: relu, silu'),
        ('model.padding', 'valid', 'allowed: symmetric, same'),
        ('model.mean', (0.5,), 'model.std: expected a number'),
        ('model.std', (1.0, 2.0), 'model.mean: expected a number'),
        ('train.overfitting_gap', 0.0, '> 0 and <= 1'),
        ('attack.start', 'normal', 'gaussian, uniform, none'),
        ('attack.batch_norm', 'runing', "did you mean 'running'?"),
        ('eval.attacks', ('clean', 'pgd'), "unknown attack 'pgd'"),
        ('eval.attacks', ('igfsm5',), "did you mean 'ifgsm5'?"),
        ('eval.attacks', ('pgd0',), "unknown attack 'pgd0'"),
        ('eval.attacks', (), 'found ()'),
        ('eval.attacks', ('pgd5', 'pgd5'), 'named once'),
        ('eval.attacks', ('clean', 'blackboks'), "did you mean 'blackbox'?"),
        ('eval.long_attacks', ('clean',), 'clean has no steps'),
        ('eval.long_attacks', ('pgd20',), 'named once'),
        ('eval.pgd.loss', 'cross-entropy', "did you mean 'cross_entropy'?"),
        ('eval.ifgsm.restarts', 0, '>= 1'),
        ('eval.ifgsm.schedule', 'cosin', "did you mean 'cosine'?"),
        ('eval.pgd.step_size', -0.1, '>= 0'),
        ('eval.iterate_examples', -1, '>= 0'),
        ('eval.select_on', 'train', 'allowed: test, validation'),
        ('eval.select_on', 'validation', 'data.validation_examples=5000'),
        ('eval.follow_timeout', 0, '> 0'),
        ('data.validation_examples', -1, '>= 0'),
        ('ensemble.gate_width', 0, '>= 1'),
        ('ensemble.members_snapshot', 'first', 'allowed: last, best'),
        ('blackbox.sources', (), 'found ()'),
        ('blackbox.sources', ('baseline', 'no/file'), 'not the name of a file'),
        ('blackbox.rounds', 0, '>= 1'),
        ('eval.num_examples', 0, '>= 1'),
        ('batch_norm.momentum', 1.0, '>= 0 and < 1'),
        ('seed', -1, '>= 0'),
        ('study.seeds', (), 'study.seeds'),
        ('study.seeds', (1, 1), 'only once'),
        ('study.systems', ('single adv',), 'not the name of a file'),
        # What once went on, or ended in a traceback.
        ('train.steps', 2**31, '<= 2147483647, found 2147483648'),
        pytest.param(
            'train.steps', 10**5000, 'found a number of thousands of digits', id='too many digits'
        ),
        ('train.learning_rate_steps', (2**31,), '<= 2147483647'),
        ('train.learning_rate', 1e39, '<= 3.402823466e+38'),
        ('attack.steps', 10**6 + 1, '<= 1000000'),
        ('model.depth', 10**9, '<= 1000'),
        ('model.width', 1001, '<= 1000'),
        ('ensemble.size', 10**10, '<= 1000'),
        ('planes.resolution', 10**9, '<= 10000'),
        ('planes.images', ([1],), 'found ([1],)'),
        ('blackbox.rounds', 21, '<= 20'),
        ('blackbox.steps', 10**5, 'last round, which has 3200000'),
        ('blackbox.sources', (['vgg'],), 'not the name of a file'),
        ('study.planes', ([1], 2), 'not the name of a file'),
        ('study.planes', ('a', 'a'), 'only once'),
        ('eval.attacks', (f'pgd{"9" * 5000}',), 'unknown attack'),
        ('system', 'a\nb', 'printable'),
        ('system', '', 'printable'),
    ],
)
def test_values_that_are_not_allowed_are_refused_by_name(field, value, told):
    config = default.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError) as caught:
        config_checks.validate(config)
    assert told in str(caught.value)
    assert field.partition('.')[0] in str(caught.value)
    assert '\n' not in str(caught.value)
    assert isinstance(caught.value, UserError)


TWO = {'ensemble.size': 2}


@pytest.mark.parametrize(
    'objective, fields, told',
    [
        ('trades', {'train.adversarial_weight': 2.0}, 'train.adversarial_weight: expected 1 with'),
        ('mart', {'train.adversarial_weight': 0.5}, 'train.beta weighs, or 0 for clean training'),
        ('mart', {'train.label_smoothing': 0.1}, 'train.label_smoothing: expected 0'),
        ('trades', {'attack.loss': 'margin'}, 'attack.loss: expected cross_entropy'),
        ('trades', {'attack.start': 'none'}, 'attack.start, attack.sigma: expected uniform, or'),
        ('trades', {'attack.sigma': 0.0}, 'at the image itself its attack has no gradient'),
        ('paper', {'train.schedule': 'linear', 'train.warmup_steps': 500_000}, 'than train.steps,'),
        ('mart', {'train.cross_entropy_of': 'members'}, 'train.objective=mart, whose loss is no'),
        ('mart', TWO | {'train.diversity': 'gal'}, 'expected paper or trades with train.diversity'),
        ('trades', TWO | {'train.diversity': 'dverge'}, 'expected paper with train.diversity='),
        ('paper', {'train.diversity': 'gal'}, 'gal needs two members or more that are trained'),
        (
            'paper',
            TWO | {'train.diversity': 'trs', 'ensemble.training': 'separate'},
            'found ensemble.size=2, ensemble.training=separate',
        ),
        (
            'paper',
            TWO | {'train.diversity': 'gal', 'ensemble.combine': 'gating'},
            'from which gates learn nothing, found gating',
        ),
        (
            'paper',
            TWO | {'train.diversity': 'adp', 'data.cutmix': 1.0},
            'data.cutmix: expected 0 with train.diversity=adp',
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(objective, fields, told):
    config = default.get_config()
    config.update_from_flattened_dict({'train.objective': objective} | fields)
    with pytest.raises(ConfigError) as caught:
        config_checks.validate(config)
    assert told in str(caught.value)
    assert '\n' not in str(caught.value)
    # In clean training there is neither an attack nor a divergence.
    if objective != 'paper':
        config.train.adversarial_weight = 0.0
        config_checks.validate(config)


@pytest.mark.parametrize(
    'text, name, kind, steps, changes',
    [
        ('clean', 'clean', 'clean', 0, {}),
        ('ifgsm5', 'ifgsm5', 'ifgsm', 5, {}),
        ('pgd500', 'pgd500', 'pgd', 500, {}),
        ('pgd20_margin', 'pgd20_margin', 'pgd', 20, {}),
        (
            'pgd20_m(loss=margin, step_size=2/255, restarts=5)', 'pgd20_m', 'pgd', 20,
            {'loss': 'margin', 'step_size': 2 / 255, 'restarts': 5},
        ),
    ],
)  # fmt: skip
def test_entries_of_eval_attacks(text, name, kind, steps, changes):
    entry = registry.entry(text)
    assert (entry.name, entry.kind, entry.steps, entry.changes) == (name, kind, steps, changes)


@pytest.mark.parametrize(
    'text, told',
    [
        ('pgd20_m(loss=mrgin)', "unknown 'mrgin' (did you mean 'margin'?)"),
        ('pgd20_m(los=margin)', "unknown setting 'los' (did you mean 'loss'?)"),
        ('pgd20_m(steps=3)', "unknown setting 'steps'"),
        ('pgd20_m(restarts=5, start=none)', 'restarts: 5 of them would be equal'),
        ('pgd20_m(step_size=8)', 'pixels are in [0, 1]'),
        ('pgd20_m(step_size=0)', 'step_size: 0 would be no attack'),
        ('pgd', 'unknown attack'),
        ('pgd20_margin', 'as in pgd20_margin(loss=margin)'),
        ('pgd20(loss=margin)', 'as in pgd20_margin(loss=margin)'),
        ('pgd20 m', 'unknown attack'),
        ('clean_m', 'unknown attack'),
        ('pgd0', 'unknown attack'),
    ],
)
def test_entries_that_cannot_be_meant_are_refused(text, told):
    config = default.get_config()
    config.eval.attacks = ('clean', text)
    with pytest.raises(ConfigError) as caught:
        config_checks.validate(config)
    assert str(caught.value).startswith('eval.attacks')
    assert told in str(caught.value)


def test_an_attack_that_needs_labels_goes_without_shares_of_them():
    config = default.get_config()
    config.data.cutmix = 1.0
    config_checks.validate(config)
    config.attack.loss = 'margin'
    with pytest.raises(ConfigError, match=r'expected 0 with attack\.loss=margin'):
        config_checks.validate(config)
    config.train.adversarial_weight = 0.0
    config_checks.validate(config)


def test_any_data_set_of_tfds_has_a_name():
    config = default.get_config()
    for name in ('tfds:fashion_mnist', 'tfds:imagenet_resized/32x32:0.1.0'):
        config.data.name = name
        config_checks.validate(config)


def test_an_entry_may_be_long():
    changes = (
        'step_size=0.00784313725490196, schedule=linear, start=uniform, restarts=5, loss=margin'
    )
    entry = registry.entry(f'pgd20_{"long" * 10}({changes})')
    assert (len(entry.changes), entry.changes['loss']) == (5, 'margin')


def test_a_length_is_of_the_norm():
    config = default.get_config()
    config.epsilon = 1.5
    with pytest.raises(ConfigError, match='epsilon'):
        config_checks.validate(config)
    config.norm = 'l2'
    config_checks.validate(config)
    assert config.eval.pgd.step_size == 0.75


@pytest.mark.parametrize(
    'fields, told',
    [
        ({'attack.fgsm.step_size': 8.0}, r'attack\.fgsm\.step_size: .*8/255, not 8'),
        ({'attack.fgsm.start': 'gaussian'}, r"attack\.fgsm\.start: unknown 'gaussian'"),
        ({'attack.fgsm.step_size': 0.0}, r'attack\.fgsm\.step_size: 0 would be no attack'),
        ({'attack.loss': 'mrgin'}, r"attack\.loss: .*did you mean 'margin'"),
        ({'attack.name': 'n_fgsm', 'attack.n_fgsm.noise': -0.1}, r'attack\.n_fgsm\.noise'),
        (
            {'attack.name': 'n_fgsm', 'norm': 'l2'},
            r'attack\.name: n_fgsm needs norm=linf, fo',
        ),
    ],
)
def test_attacks_of_one_step_have_groups_of_their_own(fields, told):
    config = default.get_config()
    config.epsilon = 0.04
    assert config.attack.fgsm.to_dict() == {'step_size': 0.05, 'start': 'uniform'}
    assert config.attack.n_fgsm.to_dict() == {'step_size': 0.04, 'noise': 0.08}
    config.attack.name = 'fgsm'
    config_checks.validate(config)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=told):
        config_checks.validate(config)


def test_what_an_older_run_did_not_say_it_had_as_it_was_then():
    old, new = (config_lib.to_dict(default.get_config()) for _ in range(2))
    del old['model']['activation'], old['model']['source'], old['attack']['fgsm']
    assert config_lib.changed_fields(old, new) == []
    new['model']['activation'] = 'silu'
    assert config_lib.changed_fields(old, new) == ['model.activation: relu -> silu']
    assert config_lib.settings(old)['model.source'] is None


def test_a_run_that_does_not_say_its_norm_had_linf():
    old = config_lib.to_dict(default.get_config())
    new = json.loads(json.dumps(old)) | {'norm': 'l2'}
    del old['norm']
    assert config_lib.changed_fields(old, old | {'norm': 'linf'}) == []
    assert config_lib.changed_fields(old, new) == ['norm: linf -> l2']


def test_a_run_of_before_had_no_mixed_images():
    old, new = (config_lib.to_dict(default.get_config()) for _ in range(2))
    for field in ('cutout', 'cutmix', 'extra', 'extra_fraction', 'on_device'):
        del old['data'][field]
    assert config_lib.changed_fields(old, new) == []
    new['data'] |= {'cutmix': 1.0, 'extra_fraction': 0.5}
    told = ['data.cutmix: 0.0 -> 1.0', 'data.extra_fraction: 0.0 -> 0.5']
    assert config_lib.changed_fields(old, new) == told


def test_runs_from_before_there_were_other_recipes_had_the_papers():
    old = config_lib.to_dict(default.get_config())
    new = json.loads(json.dumps(old))
    fields = [field for field in config_lib.settings({}) if field.startswith('train.')]
    for field in fields:
        assert config_lib.settings({})[field] == config_lib.settings(old)[field]
        del old['train'][field.removeprefix('train.')]
    assert config_lib.changed_fields(old, new) == []
    new['train'] |= {'objective': 'trades', 'awp_gamma': 0.01}
    assert config_lib.changed_fields(old, new) == [
        'train.objective: paper -> trades', 'train.awp_gamma: 0.0 -> 0.01',
    ]  # fmt: skip


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'one_cycle'])
def test_steps_are_fixed_where_the_learning_rates_depend_on_them(schedule):
    old = config_lib.to_dict(default.get_config())
    old['train']['schedule'] = schedule
    new = json.loads(json.dumps(old))
    new['train'] |= {'steps': 7, 'log_every': 3}
    assert config_lib.changed_fields(old, new) == [
        f'train.steps: 500000 -> 7, where train.schedule={schedule} ends'
    ]


def test_a_config_survives_json():
    config = quickstart.get_config()
    config.eval.num_examples = 7
    values = json.loads(json.dumps(config_lib.to_dict(config)))
    restored = config_lib.from_dict(values, default.get_config())
    assert config_lib.to_dict(restored) == config_lib.to_dict(config)
    assert isinstance(restored.eval.attacks, tuple)
    config_checks.validate(restored)


def test_a_stored_config_of_another_version_is_read_or_refused_by_name():
    values = config_lib.to_dict(default.get_config())
    del values['train']['nesterov'], values['device']
    restored = config_lib.from_dict(values, default.get_config())
    assert (restored.train.nesterov, restored.device) == (False, 'auto')
    values['train']['nestrov'] = True
    with pytest.raises(ConfigError, match=r"train\.nestrov \(did you mean 'train\.nesterov'"):
        config_lib.from_dict(values, default.get_config())


def test_a_stored_number_that_is_too_large_is_refused_by_name():
    values = config_lib.to_dict(default.get_config()) | {'epsilon': 10**400}
    with pytest.raises(ConfigError, match='epsilon: int too large'):
        config_lib.from_dict(values, default.get_config())


def test_fields_have_the_types_of_the_default():
    config = default.get_config()
    types = config_lib.field_types(config)
    assert types.keys() == flat(config).keys()
    found = types['epsilon'], types['attack.sigma'], types['data.path'], types['eval.attacks']
    assert found == (float, float, str, tuple)
    config_lib.check_fields(config, default.get_config())
    config.epsilon = 1  # as people write
    config_lib.check_fields(config, default.get_config())
    with config.ignore_type():
        config.train.steps = 'many'
    with pytest.raises(ConfigError, match=r'train\.steps: expected int, found str'):
        config_lib.check_fields(config, default.get_config())


def test_only_fields_that_change_no_step_may_change():
    old, new = (config_lib.to_dict(default.get_config()) for _ in range(2))
    new['train'] |= {'steps': 7, 'log_every': 3}
    new['eval']['attacks'] = ['clean']
    new['device'] = 'cpu'
    new['data'] |= {'extra': ['moved.npz'], 'on_device': 'no'}
    assert config_lib.changed_fields(old, new) == []
    new['train']['momentum'] = 0.5
    new['seed'] = 4
    assert config_lib.changed_fields(old, new) == ['seed: 0 -> 4', 'train.momentum: 0.9 -> 0.5']


@pytest.mark.parametrize(
    'changes, told',
    [
        ({'start': 'none'}, 'equal with eval.pgd.start: none'),
        ({'sigma': 0.0}, 'equal with eval.pgd.start, eval.pgd.sigma: gaussian and 0'),
    ],
)
def test_restarts_that_would_be_equal_are_refused(changes, told):
    config = default.get_config()
    config.eval.pgd.update(changes)
    config_checks.validate(config)
    config.eval.pgd.restarts = 3
    with pytest.raises(ConfigError, match=r'eval\.pgd\.restarts: 3 of them') as caught:
        config_checks.validate(config)
    assert told in str(caught.value)
    config.eval.pgd.start = 'uniform'
    config_checks.validate(config)


@pytest.mark.parametrize(
    'field, text, value',
    [
        ('train.steps', '1e5', 100_000),
        ('train.steps', '128.0', 128),
        ('eval.num_examples', '1_000', 1000),
        ('epsilon', '8/255', 8 / 255),
        ('eval.inline', 'no', False),
        ('eval.inline', '0', False),
        ('eval.follow', 'Yes', True),
        ('eval.attacks', 'clean,pgd20', ('clean', 'pgd20')),
        (
            'eval.attacks',
            'clean, pgd20_m(loss=margin, restarts=5),pgd5',
            ('clean', 'pgd20_m(loss=margin, restarts=5)', 'pgd5'),
        ),
        ('eval.attacks', '[clean, pgd20]', ('clean', 'pgd20')),
        ('eval.attacks', "('clean', 'pgd20')", ('clean', 'pgd20')),
        ('eval.long_attacks', '', ()),
        ('train.learning_rate_steps', '1e3,2e3', (1000, 2000)),
        ('train.learning_rate_steps', '7', (7,)),
        (
            'data.extra',
            'a.npz, ~/my shards/part[0-9]*.npz',
            ('a.npz', '~/my shards/part[0-9]*.npz'),
        ),
        ('data.extra', 'more/1m.npz', ('more/1m.npz',)),
        ('data.extra', 'generated', ('generated',)),
    ],
)
def test_values_are_taken_as_people_write_them(field, text, value):
    values = flags.FlagValues()
    argument = f'--config.{field}={text}'
    flag_values.register()
    config_flags.DEFINE_config_dict(
        'config', default.get_config(), flag_values=values, sys_argv=['main.py', argument]
    )
    values(['main.py', argument])
    found = config_lib.flatten(values.config.to_dict())[field]
    assert (found, type(found)) == (value, type(value))
