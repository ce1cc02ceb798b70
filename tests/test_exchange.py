"""Weights that leave and weights that come in: the same numbers, by whatever names."""

import importlib
import json
import pickle
import re
import sys

import jax
import numpy as np
import pytest
import small_network
from conftest import ROOT, snapshot_bytes, tiny_config
from etils import epath

from benchmarks import reference_logits as reference
from ensadv import build
from ensadv.architectures import ARCHITECTURES
from ensadv.errors import ConfigError, UserError
from ensadv.evaluation import evaluate, finished_runs
from ensadv.exchange import card, export, imports, naming
from ensadv.storage import checkpoints, files, records, tensor_files, workdir
from ensadv.training import imported, streams, train

DESCRIPTION = {'num_classes': 10, 'mean': [0.4] * 3, 'std': [0.3] * 3, 'image_shape': [8, 8, 3]}
# From RobustBench's Wide ResNet to other authors' names, as their code has them.
DEEPMIND = (
    (r'^conv1\b', 'init_conv'),
    (r'^bn1\b', 'batchnorm'),
    (r'^fc\b', 'logits'),
    (r'^block1\.layer\.(\d)', r'layer.0.block.\1'),
    (r'^block2\.layer\.(\d)', r'layer.1.block.\1'),
    (r'^block3\.layer\.(\d)', r'layer.2.block.\1'),
    (r'(block\.\d)\.bn1', r'\1.batchnorm_0'),
    (r'(block\.\d)\.bn2', r'\1.batchnorm_1'),
    (r'(block\.\d)\.conv1', r'\1.conv_0'),
    (r'(block\.\d)\.conv2', r'\1.conv_1'),
    (r'convShortcut', 'shortcut'),
)
AUTHORS = (
    (r'^conv1\.weight', 'conv0'),
    (r'^bn1\b', 'bn'),
    (r'^block1\.layer\.(\d)', r'group0.block\1'),
    (r'^block2\.layer\.(\d)', r'group1.block\1'),
    (r'^block3\.layer\.(\d)', r'group2.block\1'),
    (r'(block\d)\.bn1', r'\1.bn0'),
    (r'(block\d)\.bn2', r'\1.bn1'),
    (r'(block\d)\.conv1\.weight', r'\1.conv0'),
    (r'(block\d)\.conv2\.weight', r'\1.conv1'),
    (r'convShortcut\.weight', 'convdim'),
)


def config_of(**changes):
    """Returns a config of WRN-10-1, of two members unless told otherwise."""
    return tiny_config('ensemble2adv', **changes)


def random_variables(config, description=DESCRIPTION):
    network = build.network(config, description)
    return network, reference.weights(network.variables)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def renamed(tensors, rules):
    """Returns the tensors of a single network by other names."""
    result = {}
    for name, array in tensors.items():
        name = name.removeprefix('members.0.')
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = array
    return result


@pytest.fixture(scope='module')
def single():
    """Returns the variables of a single WRN-16-2, and its tensors by RobustBench's names."""
    config = config_of(ensemble__size=1, model__depth=16, model__width=2)
    network, variables = random_variables(config)
    return network, variables, naming.to_pytorch(variables)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'ensemble__combine': 'gating', 'ensemble__gate_width': 3},
        {'model__name': 'vgg', 'model__depth': 11},
        {'model__name': 'vgg', 'model__depth': 11, 'ensemble__combine': 'gating'},
    ],
)
def test_what_is_exported_is_found_again_to_the_bit(changes):
    network, variables = random_variables(config_of(**changes))
    tensors = naming.to_pytorch(variables)
    found = naming.find(tensors)
    assert found == naming.Found(naming.OWN, '', True)
    back, standardisation = naming.from_pytorch(tensors, found, network.variables)
    assert_equal(back, variables)
    assert standardisation == {}


def test_the_names_are_those_of_robustbenchs_wide_resnet():
    _, variables = random_variables(config_of(model__width=2))
    tensors = naming.to_pytorch(variables)
    blocks = [f'block{i}.layer.0' for i in (1, 2, 3)]
    norms = ['bn1', *(f'{block}.bn{i}' for block in blocks for i in (1, 2))]
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    expected = {f'{norm}.{leaf}' for norm in norms for leaf in leaves}
    convolutions = [f'{b}.{c}' for b in blocks for c in ('conv1', 'conv2', 'convShortcut')]
    expected |= {f'{name}.weight' for name in ('conv1', 'fc', *convolutions)} | {'fc.bias'}
    assert set(tensors) == {f'members.{i}.{name}' for i in (0, 1) for name in expected}
    shapes = {name: array.shape for name, array in tensors.items()}
    assert shapes['members.1.conv1.weight'] == (16, 3, 3, 3)
    assert shapes['members.1.block2.layer.0.convShortcut.weight'] == (64, 32, 1, 1)
    assert shapes['members.1.fc.weight'] == (10, 128)
    kernel = variables['params']['group_2_block_1']['conv_1']['kernel']
    found = tensors['members.1.block2.layer.0.conv1.weight']
    assert found[5, 7, 0, 2] == kernel[1, 0, 2, 7, 5]


@pytest.mark.parametrize('prefix', ['', 'module.', 'module.model.'])
@pytest.mark.parametrize(
    'rules, padding', [((), 'symmetric'), (DEEPMIND, 'same'), (AUTHORS, 'symmetric')]
)
def test_other_authors_names_are_the_same_network(single, rules, padding, prefix):
    network, variables, own = single
    tensors = {f'{prefix}{name}': array for name, array in renamed(own, rules).items()}
    if not rules:  # TRADES's networks have a group that they do not use
        extra = {k: v for k, v in tensors.items() if '.layer.' in k and 'block1' in k}
        tensors |= {k.replace('block1', 'sub_block1'): 2 * v for k, v in extra.items()}
    tensors[f'{prefix}bn1.num_batches_tracked'] = np.array(7)
    tensors |= {'0.mu': np.float32([[[1]], [[2]], [[3]]]), '0.sigma': np.ones((1, 3, 1, 1))}
    found = naming.find(tensors)
    assert found[1:] == (prefix, False)
    assert naming.NAMINGS[found.naming].padding == padding
    back, standardisation = naming.from_pytorch(tensors, found, network.variables)
    assert_equal(back, variables)
    np.testing.assert_array_equal(standardisation['mean'], [1, 2, 3])
    np.testing.assert_array_equal(standardisation['std'], [1, 1, 1])


def test_missing_left_over_and_other_shapes_are_told_in_a_line(single):
    network, _, own = single
    tensors = renamed(own, ())
    tensors['block1.layer.0.alpha'] = tensors.pop('fc.bias')
    tensors['conv1.weight'] = np.zeros((16, 1, 3, 3), np.float32)
    with pytest.raises(naming.MismatchError) as told:
        naming.from_pytorch(tensors, naming.find(tensors), network.variables)
    assert str(told.value) == (
        'missing: fc.bias; of another shape: conv1.weight [16, 1, 3, 3], expected [16, 3, 3, 3]; '
        'left over: block1.layer.0.alpha'
    )


def test_a_single_network_is_no_ensemble_and_has_no_gates(single):
    _, _, own = single
    tensors = renamed(own, ())
    for changes, told in (
        ({'ensemble__size': 2}, 'one network, where 2 members are expected'),
        (
            {'ensemble__size': 1, 'ensemble__combine': 'gating'},
            r'missing: gates\.0\.conv_1',
        ),
    ):
        config = config_of(model__depth=16, model__width=2, **changes)
        like = build.network(config, DESCRIPTION).variables
        with pytest.raises(naming.MismatchError, match=told):
            naming.from_pytorch(tensors, naming.find(tensors), like)


def write(path, tensors, prefix='members.'):
    np.savez(path, **{name: array for name, array in tensors.items() if name.startswith(prefix)})
    return path


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Returns a config of two small networks, and their tensors in a file."""
    small = small_network.wide_resnet(small_network.SmallNetwork)
    monkeypatch.setitem(ARCHITECTURES, 'wide_resnet', small)
    config = config_of(train__steps=1, model__mean=(0.25,), model__std=(0.5,))
    config.eval.attacks = ('clean',)
    description = build.dataset(config).describe()
    _, variables = random_variables(config, description)
    return config, write(tmp_path / 'two.npz', naming.to_pytorch(variables)), variables


def restored(path, config):
    run = finished_runs.find(path, '--workdir', config)
    return jax.device_get(finished_runs.load_one(run, 'float32')[1])


def test_weights_come_in_go_out_and_come_in_again(small, tmp_path, capsys):
    config, file, variables = small
    first, out, second = (epath.Path(tmp_path) / name for name in ('first', 'out', 'second'))
    imports.run(config, first, str(file), None)
    assert_equal(restored(first, config), variables)
    evaluate.run(config, first)
    export.run(config, first, out)
    assert {path.name for path in out.iterdir()} == {
        'README.md', 'robustbench.json', 'weights.safetensors', 'reference.safetensors',
        'model.py', 'check.py',
    }  # fmt: skip
    for name in ('model.py', 'check.py'):
        compile((out / name).read_text(), name, 'exec')
    weights = out / 'weights.safetensors'
    kept = tensor_files.read(weights, '', lambda names: True)
    np.testing.assert_array_equal(kept.pop('mean').ravel(), [0.25])
    np.testing.assert_array_equal(kept.pop('std').ravel(), [0.5])
    assert_equal(kept, naming.to_pytorch(variables))
    # What it was exported with is what it is imported with, but for paths.
    theirs = tensor_files.exported(weights)['config']
    assert theirs['model']['mean'] == [0.25]
    assert 'path' not in theirs['data']
    again = config.copy_and_resolve_references()
    again.model.update(mean=None, std=None)
    imports.run(again, second, str(weights), None)
    assert snapshot_bytes(config, second, 1) == snapshot_bytes(config, first, 1)
    namings = [workdir.read_record(path)['imported']['naming'] for path in (first, second)]
    assert namings == [naming.OWN, records.EXPORTED]
    # The card has the numbers of these weights, with n.
    card = (out / 'README.md').read_text()
    (clean,) = workdir.read_evaluations(first)[1]['attacks']
    assert re.search(rf'\| clean +\| +{100 * clean["accuracy"]:.2f} \|.*\| +30 \|', card)
    assert 'how they were trained is not known here' in card
    fields = json.loads((out / 'robustbench.json').read_text())
    assert (fields['architecture'], fields['eps']) == ('WideResNet-10-1', '0.15')
    assert fields['number_forward_passes'] == 2
    assert fields['clean_acc'] == ''  # of 30 images

    with pytest.raises(UserError, match='is there already'):
        export.run(config, first, out)
    with pytest.raises(UserError, match='is there already'):
        imports.run(config, first, str(file), None)
    other = config_of(train__steps=1, ensemble__combine='logits')
    with pytest.raises(UserError, match='combine probs, not logits'):
        imports.run(other, epath.Path(tmp_path) / 'third', str(weights), None)


def test_training_goes_on_from_imported_weights(small, tmp_path):
    config, file, variables = small
    path = epath.Path(tmp_path) / 'run'
    imports.run(config, path, str(file), None)
    # None of these was used yet. From other weights, and at the rate of the first step, it would
    # end elsewhere.
    config.train.update(steps=3, learning_rate=1.0, learning_rate_steps=(1,), momentum=0.0,
                        learning_rate_factor=1e-6, adversarial_weight=0.0)  # fmt: skip
    config.attack.steps = 1
    train.run(config, path)
    record = workdir.read_record(path)
    assert [session['step'] for session in record['sessions']] == [1, 1]
    assert record['imported']['step'] == 1
    assert record['config']['attack']['steps'] == 1
    found = restored(path, config)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    jax.tree.map(close, found['params'], variables['params'])
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (found, variables)), strict=True)
    )
    config.train.learning_rate = 0.1
    with pytest.raises(ConfigError, match=r'train\.learning_rate'):  # which was used by now
        train.run(config, path)


def test_separate_members_and_averages_begin_at_imported_weights(small, tmp_path):
    config, _, variables = small
    config.ensemble.training = 'separate'
    config.train.ema_decay = 0.5
    opened = checkpoints.open_snapshots(epath.Path(tmp_path))
    opened.save(7, variables | {'averaged': variables}, wait=True)
    description = build.dataset(config).describe()
    model = build.model(config, description, dtype='float32')
    keys = streams.learner_keys(config)
    like = jax.jit(lambda: train.init_state(config, model, (8, 8, 1), keys))()
    state = jax.device_get(imported.state_at(config, opened, 7, like))
    np.testing.assert_array_equal(state.step, [7, 7])
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, like)
    assert_equal(train.snapshot_of(config, state), variables | {'averaged': variables})
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == np.int32]
    assert_equal(counts, [np.array([7, 7])] * len(counts))
    assert counts
    with pytest.raises(UserError, match='step 8'):
        imported.state_at(config, opened, 8, like)
    opened.close()


def test_robustbench_gets_accuracies_as_published_on_the_whole_test_set_alone():
    config = config_of(ensemble__size=1, model__depth=28, model__width=10)
    config.epsilon = 8 / 255
    run = finished_runs.Run(None, config, {'dataset': {'num_test': 10, 'name': 'cifar10'}}, 5)
    published = {'gradient_steps': 100, 'targets': 9, 'queries': 5000}

    def result(n, accuracy, name='autoattack', **changes):
        settings = published | changes
        return {'name': name, 'n': n, 'accuracy': accuracy, 'settings': settings}

    results = [result(10, 0.9, 'clean'), result(10, 0.5, queries=10), result(5, 0.3)]
    fields = card.robustbench(run, results)
    assert (fields['architecture'], fields['eps']) == ('WideResNet-28-10', '8/255')
    assert (fields['clean_acc'], fields['autoattack_acc']) == ('90.00', '')
    fields = card.robustbench(run, [*results, result(10, 0.4)])
    assert fields['reported'] == fields['autoattack_acc'] == '40.00'


def test_what_a_file_does_not_say_is_asked_for(small, tmp_path):
    config, file, _ = small
    path = epath.Path(tmp_path) / 'run'
    config.model.update(mean=None, std=None)
    with pytest.raises(UserError, match=r'does not say by which mean .* --config\.model\.mean='):
        imports.run(config, path, str(file), None)
    with np.load(file) as arrays:
        tensors = dict(arrays)
    np.savez(file, **tensors, mu=np.float32([0.5]), sigma=np.float32([0.25]))
    config.model.update(mean=(0.4,), std=(0.25,))
    with pytest.raises(UserError, match=r'are not those of model\.mean'):
        imports.run(config, path, str(file), None)
    tensors['members.1.fc.bias'][0] = np.nan
    np.savez(file, **tensors)
    with pytest.raises(UserError, match='NaN'):
        imports.run(config, path, str(file), None)
    np.savez(file, **{'layer1.0.conv1.weight': np.zeros(3)})
    with pytest.raises(UserError, match=r'no Wide ResNet .* found layer1\.0\.conv1\.weight'):
        imports.run(config, path, str(file), None)
    assert not path.exists()


def test_deepminds_names_ask_for_the_activation(single, tmp_path):
    file = tmp_path / 'network.npz'
    np.savez(file, **renamed(single[2], DEEPMIND))
    config = config_of(ensemble__size=1, model__depth=16, model__width=2)
    with pytest.raises(UserError, match='expected --architecture=WRN-16-2-silu or -relu'):
        imports.run(config, epath.Path(tmp_path) / 'run', str(file), 'WRN-16-2')


class Harmful:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, (str(ROOT / 'tests' / 'unpickled'), 'w')


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / 'network.pt'
    file.write_bytes(pickle.dumps({'state_dict': Harmful()}))
    npz = epath.Path(tmp_path) / 'network.npz'
    np.savez(npz, a=np.array([Harmful()], object))
    with pytest.raises(UserError, match=r'expected an \.npz of plain arrays'):
        tensor_files.read(npz, '', lambda names: True)
    with pytest.raises(UserError, match='expected a file of tensors'):
        tensor_files.read(epath.Path(tmp_path) / 'network.pickle', '', lambda names: True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'torch', None)
        with pytest.raises(UserError, match='is not installed: pip install torch'):
            tensor_files.read(file, '', lambda names: True)
    pytest.importorskip('torch')
    with pytest.raises(UserError, match='not read it as weights alone'):
        tensor_files.read(file, '', lambda names: True)
    assert not (ROOT / 'tests' / 'unpickled').exists()


@pytest.mark.parametrize(
    'content',
    [b'', b'12', b'\xff' * 8, b'\x03' + b'\0' * 7 + b'{}{', b'\x02' + b'\0' * 7 + b'[]'],
)
def test_damaged_files_are_told(tmp_path, content):
    file = epath.Path(tmp_path) / 'weights.safetensors'
    file.write_bytes(content)
    with pytest.raises(UserError, match=r'weights\.safetensors: '):
        tensor_files.read_metadata(file)
    with pytest.raises(UserError, match=r'weights\.safetensors: expected a \.safetensors file'):
        tensor_files.read(file, '', bool)


def leave_halfway(path):
    with files.appearing(path, 'one') as folder:
        (folder / 'one').write_text('1')
        raise KeyboardInterrupt


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = epath.Path(tmp_path) / 'a' / 'out'
    with pytest.raises(KeyboardInterrupt):
        leave_halfway(path)
    assert list(path.parent.iterdir()) == []
    path.mkdir()
    with files.appearing(path, 'one') as folder:
        (folder / 'one').write_text('1')
    assert [each.name for each in path.parent.iterdir()] == ['out']
    with pytest.raises(UserError, match='is there already'):
        files.check_is_free(path, '--to')


@pytest.fixture(scope='module')
def torch():
    return pytest.importorskip('torch')


def test_entries_of_what_torch_save_wrote(torch, single, tmp_path):
    _, _, own = single
    tensors = {name: torch.tensor(array) for name, array in renamed(own, ()).items()}
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    optimizer = {'state': {0: {'momentum_buffer': torch.ones(3)}}, 'param_groups': [{'lr': 0.1}]}
    torch.save(
        {'epoch': 3, 'best': torch.tensor(0.5), 'net': {'ema': half, 'raw': tensors},
         'optimizer': optimizer},
        tmp_path / 'two.pt',
    )  # fmt: skip
    is_network = lambda names: naming.find(names) is not None
    for entry in ('net.ema', 'net.raw'):
        path, found = tensor_files.split(f'{tmp_path}/two.pt:{entry}')
        assert found == entry
        read = tensor_files.read(path, entry, is_network)
        expected = {'net.raw': tensors, 'net.ema': half}[entry]
        assert_equal(read, {k: v.float().numpy() for k, v in expected.items()})
    with pytest.raises(UserError, match=r'may be a network: net\.ema, net\.raw; two\.pt:ENTRY'):
        tensor_files.read(path, '', is_network)
    with pytest.raises(UserError, match='tensors in ema'):
        tensor_files.read(path, 'ema', is_network)


@pytest.mark.parametrize(
    'changes, shape',
    [
        ({'ensemble__combine': 'probs', 'model__activation': 'silu'}, (8, 8, 3)),
        ({'ensemble__combine': 'gating', 'model__padding': 'same'}, (10, 8, 3)),
        ({'ensemble__combine': 'logits', 'model__name': 'vgg', 'model__depth': 11}, (8, 8, 3)),
    ],
)
def test_the_exported_file_computes_what_the_ensemble_does(torch, changes, shape):
    description = DESCRIPTION | {'image_shape': shape}
    config = config_of(**changes)
    network, variables = random_variables(config, description)
    module = importlib.import_module('ensadv.exchange.model')
    ensemble = module.Ensemble(**export.network_settings(config, description))
    tensors = naming.to_pytorch(variables) | {
        name: np.full((3, 1, 1), description[name][0], np.float32) for name in ('mean', 'std')
    }
    ensemble.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    x = np.random.default_rng(0).uniform(size=(3, *shape)).astype(np.float32)
    with torch.no_grad():
        logits = ensemble.eval()(torch.tensor(np.moveaxis(x, -1, 1)))
    expected = jax.jit(network.log_probs)(variables, x)
    np.testing.assert_allclose(torch.log_softmax(logits, 1).numpy(), expected, atol=1e-4, rtol=1e-4)
