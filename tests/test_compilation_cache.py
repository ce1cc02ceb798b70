"""Where compiled programs are kept."""

import jax
import jax.numpy as jnp
import pytest

from ensadv import compilation_cache


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
    folder = tmp_path / 'ensadv' / 'compiled' / compilation_cache._processor()
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_none_is_kept_on_request_and_the_environment_goes_before(restored, monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.enable('')
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'elsewhere')
    compilation_cache.enable(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == before
