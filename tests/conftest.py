"""What several tests need: tiny configs, a stand-in for a network, the program as a subprocess."""

import os
import pathlib
import subprocess
import sys
import tempfile


def is_known_to_xla(flag: str) -> bool:
    """Returns whether this jaxlib takes a flag; it ends a process that names one it does not."""
    tried = subprocess.run(
        [sys.executable, '-c', 'import jax; jax.devices()'],
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flag},
        capture_output=True,
        check=False,
    )
    return tried.returncode == 0


# Compile in a fraction of the time, here and in the processes that are started. What users get is
# compiled where a test asks for no flags.
_QUICK_COMPILE = (
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_use_fusion_emitters=false',
)
if 'QUICK_COMPILE' not in os.environ:  # the workers have this process's environment
    # Compiled programs are shared between the tests and the processes that they start.
    _cache = tempfile.TemporaryDirectory(prefix='ensadv-jax-cache-')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _cache.name
    # `make test` runs the core's tests a second time so, as users run the program.
    fully = os.environ.get('ENSADV_TESTS_COMPILE') == 'fully'
    os.environ['QUICK_COMPILE'] = '' if fully else ' '.join(filter(is_known_to_xla, _QUICK_COMPILE))
    _given = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{_given} {os.environ["QUICK_COMPILE"]}'.strip()
QUICK_COMPILE = os.environ['QUICK_COMPILE']
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'

import jax
import pytest
import small_network as small
from etils import epath
from ml_collections import ConfigDict

from ensadv.architectures import ARCHITECTURES

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
    'study.audit': False,
    'study.members': False,
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


# Runs main.py without TensorFlow; argv[1] says whether with small networks.
DRIVER = """
import runpy, sys
sys.modules['tensorflow'] = None
sys.path[:0] = ['.', 'tests']
if sys.argv.pop(1) == 'small':
    import small_network
    small_network.install()
sys.argv[0] = 'main.py'
runpy.run_path('main.py', run_name='__main__')
"""


class Clock:
    """A clock that stands still until a test moves `now`, seconds."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


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


def run_environment(devices: int = 1, xla_flags: str = QUICK_COMPILE) -> dict[str, str]:
    """Returns the environment of a process with so many CPU devices."""
    flags = f'--xla_force_host_platform_device_count={devices} {xla_flags}'
    return os.environ | {'XLA_FLAGS': flags}


def main_command(*args: str, small: bool = False) -> list[str]:
    """Returns the command that runs main.py without TensorFlow, whose import takes seconds."""
    return [sys.executable, '-c', DRIVER, 'small' if small else '', *map(str, args)]


def run_main(
    *args: str,
    devices: int = 1,
    xla_flags: str = QUICK_COMPILE,
    small: bool = False,
    tensorflow: bool = False,
) -> subprocess.CompletedProcess:
    """Runs main.py to its end on so many CPU devices; with `tensorflow` it is main.py itself."""
    itself = [sys.executable, 'main.py', *map(str, args)]
    return subprocess.run(
        itself if tensorflow else main_command(*args, small=small),
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

    from ensadv.storage import checkpoints

    tree = checkpoints.open_snapshots(epath.Path(workdir)).restore(step, variables_like(config))
    return [jax.device_get(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def empty_files(folder) -> None:
    """Leaves every file below a folder without content, as some storage does after a power cut."""
    for path in pathlib.Path(folder).rglob('*'):
        if path.is_file():
            path.write_bytes(b'')


def tensorboard_values(directory) -> dict[str, list[tuple[int, float]]]:
    """Returns what TensorBoard shows of a directory: each scalar's steps and values."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [
            (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()['tensors']
        if not tag.startswith('_')
    }


def variables_like(config: ConfigDict):
    """Returns the shapes of a snapshot."""
    from ensadv import build

    return build.network(config, build.dataset(config).describe()).variables


@pytest.fixture(scope='module')
def small_network():
    """Makes every Wide ResNet of this process small, see small_network.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, 'wide_resnet', small.wide_resnet(small.SmallNetwork))
        yield


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
