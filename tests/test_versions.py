"""What is used of JAX beyond what it promises to keep, and that this version of it has that."""

import ast
import importlib
import inspect
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Every use of jax._src in the repository: the file, what it takes, and why nothing public will do.
PRIVATE = {
    # JAX writes all compiled programs to its cache or none, and XLA cannot write oneDNN's.
    ('ensadv/cpu/onednn.py', 'jax._src.compilation_cache'),
    # The key-value store of JAX's coordination service. `jax.experimental.multihost_utils` agrees
    # by computing on all devices: a thread cannot beside training, nor can anyone once a process
    # has died.
    ('ensadv/runtime/distributed.py', 'jax._src.distributed'),
    # How many processes a cluster runs. `jax.distributed.initialize` asks too, but then joins them
    # at once, and a single machine may wait there for a coordinator that it does not have.
    ('ensadv/runtime/distributed.py', 'jax._src.clusters.ClusterEnv'),
}


def imported(tree: ast.AST) -> list[str]:
    """Returns the full names of what a module imports from anywhere below jax._src."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names += [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if '_src' in name.split('.')]


def test_each_use_of_what_jax_keeps_to_itself_has_a_reason():
    found = set()
    folders = ('ensadv', 'configs', 'benchmarks', 'launch', 'tests')
    paths = [path for folder in folders for path in (ROOT / folder).rglob('*.py')]
    for path in (*paths, ROOT / 'main.py', *(ROOT / 'notebooks').glob('*.ipynb')):
        if path == pathlib.Path(__file__):
            continue
        text = path.read_text()
        if '_src' not in text:
            continue
        names = imported(ast.parse(text)) if path.suffix == '.py' else []
        # And no other way leads there, as an attribute or a module's name in quotes.
        assert text.count('._src') == len(names), path
        found |= {(str(path.relative_to(ROOT)), name) for name in names}
    assert found == PRIVATE


@pytest.mark.parametrize(
    'module, names',
    [
        ('jax._src.compilation_cache', 'put_executable_and_time'),
        ('jax._src.distributed', 'global_state.client'),
        ('jax._src.clusters', 'ClusterEnv._cluster_types'),
        ('jax._src.clusters', 'ClusterEnv.opt_in_only_method'),
        ('jax._src.clusters', 'ClusterEnv.is_env_present'),
        ('jax._src.clusters', 'ClusterEnv.get_process_count'),
    ],
)
def test_this_jax_has_it(module, names):
    found = importlib.import_module(module)
    for name in names.split('.'):
        found = getattr(found, name)


def test_this_jax_gives_its_cache_the_executable_where_it_is_looked_for():
    from jax._src import compilation_cache

    put = inspect.unwrap(compilation_cache.put_executable_and_time)
    assert list(inspect.signature(put).parameters)[:3] == ['cache_key', 'module_name', 'executable']


def test_the_coordination_service_has_what_peers_asks_of_it():
    from jax._src.lib import _jax

    client = _jax.DistributedRuntimeClient
    for name in (
        'key_value_delete',
        'key_value_dir_get',
        'key_value_set',
        'wait_at_barrier',
    ):
        assert callable(getattr(client, name)), name
