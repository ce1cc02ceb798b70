"""Numbers belong to the run: what the environment says of JAX is overridden, or recorded."""

import logging
import re

import jax
import numpy as np
import pytest
from conftest import ROOT, run_main, tiny_config

from ensadv import build, prng
from ensadv.runtime import switches
from ensadv.storage import environments
from ensadv.storage import workdir as workdir_lib
from ensadv.training import streams, train

OTHERS = {
    'jax_default_prng_impl': 'rbg',
    'jax_threefry_partitionable': False,
    'jax_random_seed_offset': 7,
    'jax_enable_x64': True,
    'jax_default_device': 'cpu',
    'jax_disable_jit': True,
    'jax_numpy_dtype_promotion': 'strict',
    'jax_numpy_rank_promotion': 'raise',
}


@pytest.fixture
def other_values():
    before = {name: jax.config.values[name] for name in switches.PINNED}
    for name, value in OTHERS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_what_decides_numbers_is_overridden_and_told_in_one_line(other_values, caplog):
    switches.pin()
    assert OTHERS.keys() == switches.PINNED.keys()
    for name, value in switches.PINNED.items():
        found = jax.config.values[name]
        assert getattr(found, 'value', found) == value, name
    (message,) = caplog.messages
    for name, other in OTHERS.items():
        assert f'{name.upper()}={other} (here always {switches.PINNED[name]})' in message
    switches.pin()
    assert len(caplog.messages) == 1


def test_jaxs_own_defaults_are_what_is_pinned(caplog):
    """So that runs of an undisturbed shell keep their numbers, and no warning bores their users."""
    switches.pin()
    assert not caplog.messages


def test_a_switch_that_this_jax_does_not_have_is_passed_over(monkeypatch):
    monkeypatch.setitem(switches.PINNED, 'jax_of_another_version', True)
    switches.pin()


def test_keys_name_their_implementation():
    draw = lambda: np.asarray(jax.random.bits(streams.run_keys(3).attack, (4,)))
    usual = draw()
    with jax.default_prng_impl('rbg'):
        assert jax.random.key_impl(prng.key(0)) == 'threefry2x32'
        np.testing.assert_array_equal(draw(), usual)


def test_no_key_is_made_elsewhere():
    files = [*ROOT.glob('ensadv/**/*.py'), *ROOT.glob('benchmarks/**/*.py'), ROOT / 'main.py']
    made = [f.name for f in files if re.search(r'random\.(key|PRNGKey)\(', f.read_text())]
    assert made == ['prng.py']


def test_the_program_overrides_before_anything_else(monkeypatch):
    """Without a workdir a training ends before it begins."""
    monkeypatch.setenv('JAX_DEFAULT_PRNG_IMPL', 'rbg')
    monkeypatch.setenv('JAX_THREEFRY_PARTITIONABLE', '0')
    told = run_main('--config=configs/singleadv.py').stderr
    assert 'JAX_DEFAULT_PRNG_IMPL=rbg (here always threefry2x32)' in told
    assert 'JAX_THREEFRY_PARTITIONABLE=False (here always True)' in told


def test_a_value_that_jax_does_not_take_is_one_line(monkeypatch):
    monkeypatch.setenv('JAX_ENABLE_X64', 'perhaps')
    result = run_main('--config=configs/singleadv.py', '--mode=describe')
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith('error: ')
    assert 'JAX_ENABLE_X64' in line


@pytest.fixture
def clean_environment(monkeypatch):
    for name in switches.recorded()['switches']:
        monkeypatch.delenv(name)
    monkeypatch.setenv('XLA_FLAGS', '')


def test_what_alters_rounding_is_recorded(clean_environment, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_b=1 --xla_a=2')
    altering = {
        'JAX_DEFAULT_MATMUL_PRECISION': 'bfloat16',
        'JAX_OPTIMIZATION_LEVEL': 'O1',
        'JAX_SOFTMAX_CUSTOM_JVP': '1',
        'LIBTPU_INIT_ARGS': '--xla_tpu_x',
        'NVIDIA_TF32_OVERRIDE': '1',
        'ONEDNN_DEFAULT_FPMATH_MODE': 'BF16',
    }
    others = {
        'JAX_COMPILATION_CACHE_DIR': '/tmp/x',
        'JAX_COORDINATOR_ADDRESS': 'host:1',
        'JAX_CUDA_VISIBLE_DEVICES': '0',
        'JAX_DEFAULT_PRNG_IMPL': 'rbg',  # overridden
        'JAX_LOG_COMPILES': '1',
        'JAX_PLATFORMS': 'cpu',
        'JAX_TRACEBACK_FILTERING': 'off',
        'JAX_WHAT_NO_VERSION_HAS': '1',
    }
    for name, value in (altering | others).items():
        monkeypatch.setenv(name, value)
    recorded = switches.recorded()
    assert recorded == {'xla_flags': '--xla_b=1 --xla_a=2', 'switches': altering}
    assert build.environment().items() >= recorded.items()


def test_xla_flags_are_the_same_in_any_order_and_without_what_alters_nothing():
    flags = '--xla_b=1 --xla_dump_to=/tmp/x --xla_a=2 --xla_force_host_platform_device_count=4'
    assert environments.switches({'xla_flags': flags}) == {'XLA_FLAGS': '--xla_a=2 --xla_b=1'}
    assert environments.switches({'xla_flags': '', 'switches': {'A': '1'}}) == {'A': '1'}
    assert environments.switches({}) == {}


@pytest.mark.usefixtures('small_network', 'clean_environment')
def test_a_run_that_goes_on_with_other_switches_says_so(workdir, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    go_on = lambda steps: train.run(tiny_config(train__steps=steps), workdir)
    go_on(2)
    go_on(3)
    assert not [message for message in caplog.messages if 'environment' in message]
    # Read by JAX when it starts; here by what records it alone.
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
    monkeypatch.setenv('JAX_OPTIMIZATION_LEVEL', 'O1')
    monkeypatch.setattr(build, 'ensadv', type('Other', (), {'__version__': '0.0.0'}))
    go_on(4)
    (message,) = [message for message in caplog.messages if 'environment' in message]
    assert 'JAX_OPTIMIZATION_LEVEL: none -> O1; XLA_FLAGS: none -> --xla_cpu_enable_fast' in message
    assert '-> 0.0.0' in message
    sessions = workdir_lib.read_record(workdir)['sessions']
    assert [session['switches'] for session in sessions] == [
        {}, {}, {'JAX_OPTIMIZATION_LEVEL': 'O1'}
    ]  # fmt: skip
