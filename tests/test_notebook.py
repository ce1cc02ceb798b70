"""The notebook for Colab: run from top to bottom as Jupyter runs it, small and on the CPU."""

import ast
import contextlib
import glob
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import types

import nbformat
import pytest
from conftest import ROOT, TINY, overrides
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = ROOT / 'notebooks' / 'colab_tpu.ipynb'


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def cell(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == name)


def with_parameters(notebook: nbformat.NotebookNode, **values) -> nbformat.NotebookNode:
    """Returns the notebook with other values in the cell that is tagged "parameters"."""
    (tagged,) = (c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ()))
    names = {target.id for node in ast.parse(tagged.source).body for target in node.targets}
    assert set(values) <= names
    tagged.source += ''.join(f'\n{name} = {value!r}' for name, value in values.items())
    return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells; what they show is then in the notebook."""
    where = {'metadata': {'path': str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=200, kernel_name='python3', resources=where).execute()


def shown(cell: nbformat.NotebookNode, kind: str = 'text/plain') -> str:
    """Returns what a cell printed, or all that it displayed of another kind."""
    if kind == 'text/plain':
        return ''.join(o.text for o in cell.outputs if o.get('name') == 'stdout')
    return ''.join(o.data.get(kind, '') for o in cell.outputs if 'data' in o)


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Kernels that leave no files in the user's directories, and no TensorBoard behind."""
    temporary = tmp_path / 'tmp'
    temporary.mkdir()
    for variable in ('TMPDIR', 'IPYTHONDIR', 'JUPYTER_RUNTIME_DIR'):
        monkeypatch.setenv(variable, str(temporary))
    yield
    for info in (temporary / '.tensorboard-info').glob('*.info'):
        os.kill(json.loads(info.read_text())['pid'], signal.SIGTERM)


@pytest.mark.usefixtures('kernels')
def test_it_runs_from_top_to_bottom_and_trains_nothing_again_when_it_is_run_again(tmp_path):
    workdir = tmp_path / 'run'
    # Two snapshots: a figure over training has a point for each.
    tiny = TINY | {'train.steps': 2, 'train.learning_rate_steps': (1,), 'train.snapshot_every': 1}
    # SMALL stays on: the fields that it sets exist, and those of OVERRIDES win over them.
    notebook = with_parameters(
        read(),
        WORKDIR=str(workdir),
        SYSTEMS='singleadv',
        OVERRIDES=shlex.join(overrides(tiny)),
        ATTACK='pgd2',
    )
    again = nbformat.v4.new_code_cell(cell(notebook, 'train').source)
    imported = nbformat.v4.new_code_cell("print('jax' in sys.modules)")
    notebook.cells += [again, imported]
    execute(notebook)

    assert f'JAX {importlib.metadata.version("jax")} ' in shown(cell(notebook, 'devices'))
    assert 'tensorboard-frame' in shown(cell(notebook, 'tensorboard'), 'text/html')
    assert '[1/1] singleadv_seed0' in shown(cell(notebook, 'train'))
    assert re.search(r'step 2  n 30  robust .*pgd2', shown(cell(notebook, 'evaluate')))
    # Begun once, at step 0.
    record = json.loads((workdir / 'singleadv_seed0' / 'config.json').read_text())
    assert [session['step'] for session in record['sessions']] == [0]
    assert 'The report:' in shown(again)
    # The notebook's own process would keep the TPU from those that it starts.
    assert shown(imported) == 'False\n'

    report = cell(notebook, 'report')
    table = shown(report, 'text/markdown')
    for text in ('SingleAdv', 'PGD2', 'Figure 2a.'):
        assert text in table
    figures = [output for output in report.outputs if 'image/png' in output.get('data', {})]
    assert len(figures) == len(list((workdir / 'report').glob('*.png'))) > 0


def test_a_field_in_the_overrides_is_not_set_by_the_small_settings():
    attacks = "--config.eval.attacks=('clean', 'pgd5')"
    variables = run_cells('settings', SYSTEMS='baseline, vgg', OVERRIDES=f'"{attacks}" --x=1')
    settings = variables['SETTINGS']
    assert settings[-2:] == [attacks, '--x=1']
    assert sum('eval.attacks' in setting for setting in settings) == 1
    assert "--config.study.systems=('baseline', 'vgg')" in settings
    assert '--config.train.steps=4000' in settings
    assert len(run_cells('settings', SMALL=False)['SETTINGS']) == 2


@pytest.mark.usefixtures('kernels')
def test_a_mistake_in_a_parameter_stops_it_with_the_programs_own_line(tmp_path):
    values = {'WORKDIR': str(tmp_path / 'run'), 'OVERRIDES': '--config.model.depht=16'}
    notebook = with_parameters(read(), **values, TENSORBOARD=False)
    notebook.cells.remove(cell(notebook, 'devices'))
    with pytest.raises(CellExecutionError, match='exit code 2'):
        execute(notebook)
    lines = shown(cell(notebook, 'train')).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('error: --config.model.depht=16: unknown config field')
    assert cell(notebook, 'evaluate').execution_count is None


def test_the_file_is_valid_and_has_no_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    codes = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert all(not cell.outputs and cell.execution_count is None for cell in codes)
    # What a user sets stands in a form.
    assert all('  # @param {' in line for line in cell(notebook, 'parameters').source.splitlines())


class Processes:
    """Stands in for subprocess.Popen: notes the commands, and clones an empty directory."""

    def __init__(self):
        self.commands = []
        self.environments = []

    def __call__(self, command, env, **_):
        self.commands.append(command)
        self.environments.append(env)
        if command[:2] == ['git', 'clone']:
            pathlib.Path(command[-1]).mkdir()
        return contextlib.nullcontext(types.SimpleNamespace(stdout=(), returncode=0))


def run_cells(*names: str, **values) -> dict:
    """Runs some cells in this process; returns the variables that they leave."""
    notebook = with_parameters(read(), **values)
    variables = {}
    for name in ('parameters', *names):
        exec(cell(notebook, name).source, variables)
    return variables


@pytest.mark.parametrize(
    'devices, build, platforms',
    [
        ('/dev/vfio/[0-9]*', 'jax[tpu]', 'tpu,cpu'),
        ('/dev/nvidia[0-9]*', 'jax[cuda12]', 'cuda,cpu'),
        (None, 'jax', None),
    ],
)
def test_in_colab_it_mounts_drive_clones_and_installs_beside_colabs_packages(
    tmp_path, monkeypatch, devices, build, platforms
):
    mounted, processes = [], Processes()
    colab = types.SimpleNamespace(drive=types.SimpleNamespace(mount=mounted.append))
    monkeypatch.setitem(sys.modules, 'google.colab', colab)
    monkeypatch.setattr(subprocess, 'Popen', processes)
    monkeypatch.setattr(glob, 'glob', lambda pattern: [pattern] if pattern == devices else [])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.delenv('COLAB_TPU_1VM', raising=False)
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    monkeypatch.chdir(tmp_path)
    variables = run_cells('drive', 'code', 'install', REPOSITORY='URL', BRANCH='v1')
    variables['main']('--mode=report')
    assert mounted == ['/content/drive']
    python = '/content/environment/bin/python'
    clone, make, install, report = processes.commands
    assert clone[2:] == ['--quiet', '--depth=1', '--branch=v1', 'URL', str(tmp_path / 'ensadv')]
    assert pathlib.Path.cwd() == tmp_path / 'ensadv'
    assert make == [sys.executable, '-m', 'venv', '--without-pip', '/content/environment']
    assert install[:6] == [sys.executable, '-m', 'pip', '--python', python, 'install']
    assert install[-2:] == ['--requirement=requirements.txt', build]
    assert report == [python, 'main.py', '--mode=report']
    assert processes.environments[-1].get('JAX_PLATFORMS') == platforms


@pytest.mark.parametrize(
    'values, told',
    [
        ({'WORKDIR': '/content/drive/MyDrive/run'}, 'only Colab has'),
        ({'WORKDIR': 'run'}, 'REPOSITORY: needed'),
    ],
)
def test_outside_colab_it_says_what_is_missing(tmp_path, monkeypatch, values, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=told):
        run_cells('drive', 'code', **values)


def test_the_stop_button_ends_the_program_and_shows_its_last_words(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    variables = run_cells('drive', 'code', WORKDIR='run')
    said = []

    def button(text, end):
        said.append(text)
        if text == 'training\n':
            raise KeyboardInterrupt

    variables['print'] = button
    program = (
        'import signal, sys, time\n'
        'signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))\n'
        'print("training")\n'
        'time.sleep(60)'
    )
    with pytest.raises(KeyboardInterrupt):
        variables['run'](sys.executable, '-c', program)
    assert said == ['training\n', 'saved\n']
