"""What TPUs and GPUs compute, on a CPU: the same numbers, in programs that can be lowered for them.

Nobody who changes the code needs to have one: members by `vmap`, grouped convolutions, whole
batches, bfloat16.
"""

import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config, variables_like
from jax.sharding import Mesh, PartitionSpec
from small_network import wide_resnet

from ensadv import build
from ensadv.architectures import ARCHITECTURES
from ensadv.cpu import backend
from ensadv.evaluation import evaluate
from ensadv.models.base import ImageNetwork
from ensadv.runtime import distributed
from ensadv.storage import checkpoints
from ensadv.storage import workdir as workdir_lib
from ensadv.training import train

# Of weights and margins: in float32, and where 8 bits of a number are kept.
TOLERANCE = {'float32': 2e-3, 'bfloat16': 0.1}


class TwoConvolutions(ImageNetwork):
    """A small network whose second convolution sees other images for each member."""

    @nn.compact
    def __call__(self, x, train):
        x = self.standardise(x)
        for layer, strides in ((1, 1), (2, 2)):
            x = self.convolution()(8, (3, 3), strides, padding=1, name=f'conv_{layer}')(x)
            x = nn.relu(self.norm(train)(name=f'norm_{layer}')(x))
        return self.linear()(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


@pytest.fixture(autouse=True)
def _two_convolutions(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, 'wide_resnet', wide_resnet(TwoConvolutions))


@pytest.fixture
def as_accelerator(monkeypatch):
    """Returns what has all that follows computed as on an accelerator: () -> compiled programs.

    The programs are (function, its arguments' shapes), as they come to be compiled.
    """

    def switch():
        programs = []

        def recording(compile_it):
            def compiled(f, *args, **kwargs):
                def recorded(*given):
                    shape_of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                    programs.append((f, jax.tree.map(shape_of, given)))
                    return f(*given)

                return compile_it(recorded, *args, **kwargs)

            return compiled

        monkeypatch.setattr(backend, 'is_cpu', lambda: False)
        for name in ('run_on_devices', 'map_examples'):
            monkeypatch.setattr(distributed, name, recording(getattr(distributed, name)))
        return programs

    return switch


def lowered(programs):
    """Returns the programs as text, lowered for TPUs and for GPUs."""
    mesh = Mesh(np.array(jax.devices()[:1]), (distributed.AXIS,))
    texts = []
    for f, shapes in programs:
        on_one_device = jax.shard_map(
            f, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        for platform in ('tpu', 'cuda'):
            # It also refuses what only one backend knows, as oneDNN's convolutions.
            exported = jax.export.export(jax.jit(on_one_device), platforms=[platform])
            texts.append(exported(*shapes).mlir_module())
    return texts


def assert_close(ours, expected, dtype):
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * max(1, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize(
    'system, dtype',
    [('ensemble2adv', 'float32'), ('ensemble2adv', 'bfloat16'), ('separate2adv', 'float32')],
)
def test_training(system, dtype, workdir, as_accelerator):
    config = tiny_config(system, model__dtype=dtype, train__steps=2)

    def trained(path):
        train.run(config, path)
        return checkpoints.open_snapshots(path).restore(2, variables_like(config))

    on_cpu = trained(workdir / 'cpu')
    programs = as_accelerator()
    assert_close(trained(workdir / 'accelerator'), on_cpu, dtype)
    texts = lowered(programs)
    assert len(texts) == 2
    for text in texts:
        assert 'group_count = 2' in text  # both members' convolution
        assert ('bf16' in text) == (dtype == 'bfloat16')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_evaluation(dtype, workdir, as_accelerator):
    config = tiny_config('ensemble2adv', train__steps=2, eval__dtype=dtype)
    train.run(config, workdir)
    shutil.copytree(workdir, f'{workdir}_of_accelerator')

    def margins(path):
        evaluate.run(config, path)
        ledger = np.load(workdir_lib.evaluation_path(path, 2, '.npz'))
        return {name: ledger[name] for name in ledger.files if 'margin' in name}

    on_cpu = margins(workdir)
    assert len(on_cpu) >= 2
    programs = as_accelerator()
    assert_close(margins(type(workdir)(f'{workdir}_of_accelerator')), on_cpu, dtype)
    texts = lowered(programs)
    assert len(texts) >= 2 * 3
    assert any('group_count = 2' in text for text in texts)
    assert any('bf16' in text for text in texts) == (dtype == 'bfloat16')


def test_only_one_place_asks_for_the_backend():
    """Or a part of the program would go on as on a CPU where these tests say that it is none."""
    package = pathlib.Path(build.__file__).parent
    asking = {
        str(path.relative_to(package))
        for path in package.rglob('*.py')
        if 'default_backend' in path.read_text()
    }
    # The second decides a run's dtype, which is written down.
    assert asking == {'cpu/backend.py', 'build.py'}
