"""Which flags of XLA are set, and where they are left alone."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from ensadv import xla_flags

YNN = '--xla_cpu_experimental_ynn_fusion_type='


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.delenv('XLA_FLAGS', raising=False)


def test_what_the_user_sets_stays(cpu, monkeypatch):
    xla_flags.set_for_cpu()
    assert os.environ['XLA_FLAGS'] == YNN
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
    xla_flags.set_for_cpu()
    assert os.environ['XLA_FLAGS'] == f'--xla_force_host_platform_device_count=2 {YNN}'
    theirs = f'{YNN}LIBRARY_FUSION_TYPE_DOT'
    monkeypatch.setenv('XLA_FLAGS', theirs)
    xla_flags.set_for_cpu()
    assert os.environ['XLA_FLAGS'] == theirs


@pytest.mark.parametrize(
    'platforms, plugins, set_there',
    [('tpu,cpu', (), False), ('', ('cuda',), False), ('cpu', ('cuda',), True), ('', (), True)],
)
def test_only_where_a_cpu_computes(cpu, monkeypatch, platforms, plugins, set_there):
    monkeypatch.setenv('JAX_PLATFORMS', platforms)
    monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: plugins)
    xla_flags.set_for_cpu()
    assert ('XLA_FLAGS' in os.environ) == set_there


def test_not_for_a_jaxlib_that_may_not_know_them(cpu, monkeypatch):
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.11.0')
    xla_flags.set_for_cpu()
    assert 'XLA_FLAGS' not in os.environ


def test_the_installed_xla_takes_them(cpu):
    """It would end the process with an error otherwise."""
    program = (
        'from ensadv import xla_flags; xla_flags.set_for_cpu(); import jax; '
        'print(jax.jit(lambda x: x @ x.T)(jax.numpy.ones((2, 3)))[0, 0])'
    )
    result = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == '3.0\n', result.stderr
