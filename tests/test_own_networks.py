"""Networks of the user's own: their interface, mistakes in them, and the text that a run keeps."""

import itertools
import pathlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from etils import epath

from ensadv import architectures, build, config_checks, python_files, study, systems
from ensadv import config as config_lib
from ensadv.command_line import CONFIGS
from ensadv.errors import ConfigError, UserError
from ensadv.evaluation import evaluate
from ensadv.models import ensemble
from ensadv.storage import checkpoints
from ensadv.storage import workdir as workdir_lib
from ensadv.training import nans

EXAMPLES = 'configs/networks'
DESCRIPTION = {'num_classes': 3, 'mean': [0.4], 'std': [0.3], 'image_shape': [8, 8, 1]}
NET = """import flax.linen as nn
import jax.numpy as jnp

class Net(nn.Module):
    num_classes: int
    width: int = 4

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes)(x)
"""
LAST = '        return nn.Dense(self.num_classes)(x)'


def example(name, **settings):
    """Returns a class of an example."""
    file, _, code = name.partition(':')
    module = python_files.of_text((ROOT / EXAMPLES / file).read_text(), file)
    return getattr(module, code)(**{'num_classes': 10, **settings})


def shapes(model, image_shape=(32, 32, 3)):
    return jax.eval_shape(lambda: ensemble.init(model, jax.random.key(0), 1, image_shape))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    'name, expected',
    [
        ('wide_resnet', None),
        ('a/b c.py:Net', ('a/b c.py', 'Net', {})),
        ('a.py.py:N(k=2, s="x, y", t=(1, 2.5))',
         ('a.py.py', 'N', {'k': 2, 's': 'x, y', 't': (1, 2.5)})),
    ],
)  # fmt: skip
def test_names_of_networks(name, expected):
    assert architectures.own(name) == expected


@pytest.mark.parametrize(
    'name',
    ['net.py', 'net.py:', 'net.py:a b', 'net.py:Net(', 'net.py:Net(3)', 'net.py:Net(k=f())',
     'net.py:Net(**{})', 'net.pyc:Net', f'net.py:Net(k={"(" * 9999})'],
)  # fmt: skip
def test_names_that_cannot_be_meant(name):
    with pytest.raises(ConfigError, match=r'^model\.name: '):
        config_checks.validate(tiny_config(model__name=name))


def made(tmp_path, text, fields=(), name='Net', **given):
    """Returns the network of a text, which is in net.py."""
    path = tmp_path / 'net.py'
    path.write_text(text)
    config = tiny_config(model__name=f'{path}:{name}', **dict(fields))
    config_checks.validate(config)
    return build.model(build.resolve(config), DESCRIPTION, **{'dtype': 'float32', **given})


@pytest.mark.parametrize(
    'change, told',
    [
        (('Net(nn', 'Mine(nn'), r"net.py: found no class Net in the file.*'?Mine"),
        (('import jax.numpy as jnp', 'import jax.nunpy'), 'net.py:2: ModuleNotFoundError'),
        (('class Net', 'clas Net'), 'net.py:4: SyntaxError'),
        (('num_classes', 'classes'), 'net.py:4: Net: expected an argument num_classes, found cla'),
        (('Net(nn.Module):', 'Net:'), 'net.py:4: Net: expected an argument num_classes'),
        ((', train)', ')'), r'net.py:4: Net: expected __call__\(self, x, train\)'),
        (('(x)\n', '(z)\n'), 'net.py:11: in its first call: NameError: .*z'),
        ((LAST, LAST + '[0]'), r'net.py:4: Net: expected logits \[B, 3\] .*found float32 \[3\]'),
        ((LAST, LAST + ', 1'), 'expected logits .* of B = 2 found tuple'),
        ((LAST, LAST + '.argmax(1)'), r'expected logits .* found int32 \[2\]'),
        ((LAST, '        x = nn.Dropout(0.5, deterministic=not train)(x)\n' + LAST),
         'net.py:11: in __call__ with train=True: asks for random numbers'),
        ((LAST, '        x = nn.BatchNorm(use_running_average=False)(x)\n' + LAST),
         'net.py:11: in __call__ with train=False: ModifyScopeVariableError'),
        ((LAST, '        self.variable("cache", "x", lambda: 0.0)\n' + LAST), 'alone, found cache'),
        (('nn.Dense(self', 'nn.Dense(param_dtype=jnp.bfloat16, features=self'),
         'expected weights of float32, found bfloat16'),
    ],
    ids=lambda change: change[1][:40] if isinstance(change, tuple) else '',
)  # fmt: skip
def test_mistakes_in_a_file_are_told_with_their_line(tmp_path, change, told):
    assert change[0] in NET
    text = NET.replace(*change)
    with pytest.raises(UserError, match=told) as caught:
        made(tmp_path, text)
    assert '\n' not in str(caught.value)
    assert str(caught.value).startswith(f'model.name: {tmp_path}/net.py:')


@pytest.mark.parametrize(
    'fields, given, told',
    [
        ({'model__activation': 'silu'}, {}, 'model.activation: silu needs a network with an arg'),
        ({'batch_norm__momentum': 0.8}, {}, 'batch_norm.momentum: 0.8 needs'),
        ({'batch_norm__sync': True}, {}, 'batch_norm.sync: devices needs'),
        ({}, {'remat': True}, 'model.remat: True needs'),
        ({}, {'dtype': 'bfloat16'}, 'model.dtype, eval.dtype: bfloat16 needs'),
        ({'model__conv': 'separate', 'model__depth': 27}, {}, ''),
    ],
)
def test_a_setting_that_a_network_does_not_take_is_refused(tmp_path, fields, given, told):
    if not told:
        made(tmp_path, NET, fields, **given)
        return
    with pytest.raises(UserError, match=f'^{told}.*net.py:4: Net has num_classes, width$'):
        made(tmp_path, NET, fields, **given)


def test_a_network_gets_what_it_takes_and_what_its_name_says(tmp_path):
    names = ('mean', 'std', 'dtype', 'conv', 'remat', 'activation', 'norm_momentum', 'norm_epsilon',
             'norm_axis')  # fmt: skip
    text = NET.replace('width: int = 4', '\n    '.join([*(f'{n}: any' for n in names), 'w: int']))
    text = text.replace('self.width', 'self.w').replace('LAST', '')
    fields = {'model__activation': 'silu', 'batch_norm__momentum': 0.8, 'batch_norm__sync': True,
              'batch_norm__epsilon': 1e-3, 'model__conv': 'separate'}  # fmt: skip
    found = made(tmp_path, text, fields, 'Net(w=7)', dtype='bfloat16', remat=True)
    expected = {'num_classes': 3, 'mean': (0.4,), 'std': (0.3,), 'dtype': jnp.dtype('bfloat16'),
                'conv': 'separate', 'remat': True, 'activation': 'silu', 'norm_momentum': 0.8,
                'norm_epsilon': 1e-3, 'norm_axis': 'devices', 'w': 7}  # fmt: skip
    assert {name: getattr(found.network, name) for name in expected} == expected
    assert found.network.w == shapes(found, (8, 8, 1))['params']['network']['Dense_0']['bias'].size
    for name in ('Net(w=7, mean=(0,))', 'Net(v=1)', 'Net'):
        with pytest.raises(UserError, match=r'net.py:4: .*(set by the program|TypeError)'):
            made(tmp_path, text, name=name)


def test_a_type_that_a_network_does_not_take_is_not_chosen_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    for text, expected in (
        (NET, 'float32'), (NET.replace('width', 'dtype: any = 0\n    width', 1), 'bfloat16')
    ):  # fmt: skip
        path = tmp_path / f'{expected}.py'
        path.write_text(text)
        config = build.resolve(tiny_config(model__name=f'{path}:Net'))
        assert (config.model.dtype, config.model.source) == (expected, text)


def test_parameters_and_outputs_of_preactresnet18():
    """As of He et al.'s code: 9io for a 3x3 convolution, io for a shortcut, 2c for a batch norm."""
    model = example('preactresnet18.py:PreActResNet18')
    expected, inside = 9 * 3 * 64, 64
    for features, _ in itertools.product((64, 128, 256, 512), range(2)):
        expected += 2 * inside + 9 * inside * features + 2 * features + 9 * features * features
        expected += inside * features if inside != features else 0
        inside = features
    expected += 2 * 512 + 512 * 10 + 10
    assert count(shapes(model)['params']) == expected == 11_172_170
    _, state = jax.eval_shape(
        lambda x: model.init_with_output(
            jax.random.key(0), x, train=False, mutable=True,
            capture_intermediates=lambda module, _: (module.name or '').startswith('group'),
        ),
        jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32),
    )  # fmt: skip
    found = [block['__call__'][0].shape[1:] for block in state['intermediates'].values()]
    assert found[1::2] == [(32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512)]


def test_parameters_and_gradient_of_vit():
    width, places = 192, (32 // 4) ** 2
    layer = 4 * width * (width + 1) + 4 * width * (width + 1) + width * (4 * width + 1) + 4 * width
    expected = width * (4 * 4 * 3 + 1) + places * width + 6 * layer + 2 * width + 10 * (width + 1)
    assert count(shapes(example('vit.py:ViT'))['params']) == expected
    with jax.enable_x64(True):
        small = example('vit.py:ViT', depth=1, width=4, heads=2, remat=True, dtype=jnp.float64)
        x, along = jax.random.normal(jax.random.key(1), (2, 1, 8, 8, 1), jnp.float64) / 4
        variables = jax.jit(partial(small.init, train=False))(jax.random.key(0), x)
        loss = jax.jit(lambda x: jnp.sum(small.apply(variables, x, train=True)[0, :3]))
        slope = (loss(x + 1e-5 * along) - loss(x - 1e-5 * along)) / 2e-5
        np.testing.assert_allclose(jnp.sum(jax.jit(jax.grad(loss))(x) * along), slope, rtol=1e-5)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Runs of an own network with gates, whose file is gone since, and of ViT."""
    root = epath.Path(tmp_path_factory.mktemp('own'))
    file = root / 'net.py'
    file.write_text(NET)
    name = f'{EXAMPLES}/vit.py:ViT(depth=1, width=8, heads=2)'
    for path, system, changes in (
        ('net', 'ensemble2adv_gating', {'model__name': f'{file}:Net(width=5)'}),
        ('vit', 'singleadv', {'model__name': name}),
    ):
        changes |= {'train__steps': 2, 'attack__steps': 1, 'eval__attacks': ('clean',)}
        config = tiny_config(system, **changes)
        study.run_one(build.resolve(config), root / path, path)
    file.unlink()
    return root


def config_of(path, **changes):
    record = workdir_lib.read_record(path)
    config = config_lib.from_dict(record['config'], tiny_config('separate2adv'))
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def test_an_ensemble_trains_without_batch_norm_and_with_gates(root):
    config = config_of(root / 'net')
    tree = checkpoints.open_snapshots(root / 'net').restore(2, build.network(
        config, build.dataset(config).describe()).variables)  # fmt: skip
    assert tree['batch_stats'] == {}
    assert {*tree['params']} == {'gate', 'member'}
    kernels = tree['params']['member']['network']['Dense_1']['kernel']
    assert kernels.shape == (2, 5, 10)
    assert np.all(np.isfinite(kernels))
    assert np.any(kernels[0] != kernels[1])


def test_a_workdir_needs_no_file_and_a_changed_one_is_refused(root, tmp_path):
    path, file = root / 'net', pathlib.Path(root / 'net.py')
    # Nothing but the workdir is there.
    evaluate.run(config_of(path, eval__attacks=('clean', 'ifgsm2')), path)
    content = workdir_lib.read_evaluations(path)[2]
    assert [result['name'] for result in content['attacks']] == ['clean', 'ifgsm2']
    config_lib.keep_network(config_of(path), check_unchanged=True)
    file.write_text(NET)
    config_lib.keep_network(config_of(path), check_unchanged=True)
    file.write_text(NET.replace('relu', 'tanh'))
    with pytest.raises(ConfigError, match=r'^model\.name: .*net\.py is not what it was'):
        config_lib.keep_network(config_of(path), check_unchanged=True)
    changed = config_of(path, model__source=None)
    with pytest.raises(ConfigError, match=r'\(model\.source: the text .* has changed\)'):
        study.run_one(build.resolve(changed), path, 'changed')
    # The same text is the same network, wherever it is; another class is another one.
    moved = config_of(path, model__name=f'{tmp_path}/moved.py:Net(width=5)')
    workdir_lib.check_config(path, moved)
    with pytest.raises(ConfigError, match=r'model\.name: .* -> .*moved\.py:Net'):
        workdir_lib.check_config(path, config_of(path, model__name=f'{tmp_path}/moved.py:Net'))
    file.unlink()


def test_networks_of_ones_own_are_members_beside_others(root, tmp_path):
    paths = ','.join(str(root / name) for name in ('net', 'vit'))
    config = tiny_config(
        'separate2adv', ensemble__members_from=paths, eval__attacks=('clean',), eval__num_examples=9
    )
    evaluate.run(config, epath.Path(tmp_path))
    record = workdir_lib.read_record(epath.Path(tmp_path))
    assert [m['config']['model']['source'][:12] for m in record['members']] == [
        'import flax.', '"""A small v'
    ]  # fmt: skip


def test_a_study_may_be_of_it_but_for_what_a_system_is_by_its_width(tmp_path):
    (tmp_path / 'net.py').write_text(NET)
    config = tiny_config('ensemble2adv', model__name=f'{tmp_path}/net.py:Net', ensemble__size=1)
    made = partial(systems.make_config, config, field='study.systems', systems_dir=CONFIGS)
    run = made('ensemble2adv', 3)
    assert (run.ensemble.size, run.model.source) == (2, NET)
    assert made('vgg', 3).model.source is None
    with pytest.raises(ConfigError, match=r'^study\.systems: doubleadv is .* by model\.depth and'):
        made('doubleadv', 3)


class Inside(nn.Module):
    """Layers that give several arrays, and one that is looked at only from outside."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)

        class Pair(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x, (x / 0, jnp.arange(3))

        _, (x, _) = Pair(name='pair')(x)
        x = nn.remat(nn.Dense)(4, name='inside')(x)
        return nn.Dense(3, name='linear')(x)


def test_the_finder_takes_any_layers():
    variables = jax.jit(lambda: ensemble.init(Inside(), jax.random.key(0), 2, (2, 2, 1)))()
    count = jax.jit(partial(nans.count_in_layers, Inside(), combine='probs', train=True))
    found = count(variables, jnp.zeros((3, 2, 2, 1)))
    assert [layer for layer, _ in found] == ['pair', 'linear', '', '']
    np.testing.assert_array_equal(found['pair', 'its output'][0], [12, 0, 24, 0])
