"""Where compiled programs are kept."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ensadv.cpu import onednn, processor
from ensadv.models import conv
from ensadv.runtime import compilation_cache


@pytest.fixture
def restored(monkeypatch):
    """JAX as the tests use it, afterwards too; without the environment's wish."""
    from jax.experimental.compilation_cache import compilation_cache as jax_cache

    names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def test_programs_are_kept_in_the_directory(restored, tmp_path):
    compilation_cache.enable(str(tmp_path / 'kept'))
    jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 5)))
    (folder,) = (tmp_path / 'kept').iterdir()
    assert any('lambda' in path.name for path in folder.iterdir())


def test_the_default_is_the_users_cache(restored, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    compilation_cache.enable(None)
    folder = tmp_path / 'ensadv' / 'compiled' / processor.processor()
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_none_is_kept_on_request_and_the_environment_goes_before(restored, monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.enable('')
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'elsewhere')
    compilation_cache.enable(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.skipif(not onednn.available(), reason='no oneDNN in this jaxlib')
def test_programs_with_onednns_operations_are_not_kept(restored, tmp_path):
    # XLA would write them down as something else, at best with an error, which fails this test.
    compilation_cache.enable(str(tmp_path / 'kept'))

    convolve = functools.partial(conv.get('onednn'), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    def ours(x, w):
        return jnp.sin(convolve(x, w, (1, 1), 'SAME')) + 1

    def theirs(x, w):
        return jnp.sin(jax.lax.conv(x, w, (1, 1), 'SAME')) + 1

    x = jnp.ones((2, 4, 4, 4))
    for function in (ours, theirs):
        jax.jit(function)(x, x)
    (folder,) = (tmp_path / 'kept').iterdir()
    kept = ' '.join(path.name for path in folder.iterdir())
    assert 'jit_theirs' in kept
    assert 'jit_ours' not in kept
