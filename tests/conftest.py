"""What several tests need: tiny configs, a stand-in for a network, the program as a subprocess."""

import os
import pathlib
import subprocess
import sys
import tempfile

# Compiled programs are shared between the tests and the processes that they start.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix='ensadv-jax-cache-')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _cache.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
# Compiles in a fraction of the time. What users get is compiled in the processes that `run_main`
# starts.
QUICK_COMPILE = (
    '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
    '--xla_cpu_use_fusion_emitters=false'
)
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {QUICK_COMPILE}'.strip()
from ensadv import xla_flags

# As main.py does: tests compare what it computes with what they compute, to the bit.
xla_flags.set_for_cpu()

import jax
import pytest
from etils import epath
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[1]
CIFAR10 = ROOT.parent / 'shared' / 'tfds'

# Everything small: two steps of the attack, seconds to compile, less than one to run.
TINY = {
    'data.name': 'digits',
    'data.pad': 1,
    'epsilon': 0.15,
    'model.depth': 10,
    'model.width': 1,
    'train.steps': 4,
    'train.batch_size': 8,
    'train.steps_per_call': 2,
    'train.log_every': 2,
    'train.checkpoint_every': 2,
    'train.snapshot_every': 2,
    'train.learning_rate_steps': (3,),
    'attack.steps': 2,
    'eval.attacks': ('clean', 'ifgsm2'),
    'eval.long_attacks': (),
    'eval.examples': 0,
    'eval.num_examples': 30,
    'eval.batch_size': 16,
}
# What makes a study of two systems small; for their own fields see TINY.
TINY_STUDY = {
    'planes.attack': 'pgd2',
    'planes.images': (0,),
    'planes.resolution': 8,
    'eval.attacks': ('clean', 'ifgsm2', 'blackbox'),
    'eval.examples': 2,
    'blackbox.sources': ('baseline',),
    'blackbox.steps': 2,
    'blackbox.rounds': 1,
}


def overrides(fields: dict) -> list[str]:
    """Returns the command line's form of {'train.steps': 4, ...}."""
    return [f'--config.{field}={value}' for field, value in fields.items()]


def tiny_config(system: str = 'singleadv', **changes) -> ConfigDict:
    """Returns a system's config, tiny; `changes` name fields with __ for the dot."""
    import importlib

    from configs import default

    config = default.get_config()
    changes = {field.replace('__', '.'): value for field, value in changes.items()}
    config.update_from_flattened_dict(TINY)
    importlib.import_module(f'configs.{system}').system(config)
    config.update_from_flattened_dict(changes)
    return config.copy_and_resolve_references()


def run_environment(devices: int = 1, xla_flags: str = '') -> dict[str, str]:
    """Returns the environment of a process with so many CPU devices, compiled as users' are."""
    flags = f'--xla_force_host_platform_device_count={devices} {xla_flags}'
    return os.environ | {'XLA_FLAGS': flags}


def run_main(*args: str, devices: int = 1, xla_flags: str = '') -> subprocess.CompletedProcess:
    """Runs main.py to its end on so many CPU devices."""
    return subprocess.run(
        [sys.executable, 'main.py', *map(str, args)],
        cwd=ROOT,
        env=run_environment(devices, xla_flags),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def snapshot_bytes(config: ConfigDict, workdir, step: int) -> list[bytes]:
    """Returns the bytes of every array in a snapshot, in the tree's order."""
    import jax

    from ensadv import checkpoints

    tree = checkpoints.open_snapshots(epath.Path(workdir)).restore(step, variables_like(config))
    return [jax.device_get(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def empty_files(folder) -> None:
    """Leaves every file below a folder without content, as some storage does after a power cut."""
    for path in pathlib.Path(folder).rglob('*'):
        if path.is_file():
            path.write_bytes(b'')


def variables_like(config: ConfigDict):
    """Returns the shapes of a snapshot."""
    from ensadv import build

    return build.network(config, build.dataset(config).describe()).variables


@pytest.fixture(autouse=True)
def _few_memory_mappings():
    """Drops compiled programs in time: each takes many of the 65,530 mappings Linux grants."""
    yield
    mappings = pathlib.Path('/proc/self/maps')
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture
def workdir(tmp_path) -> epath.Path:
    return epath.Path(tmp_path) / 'run'
