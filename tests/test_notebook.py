"""The notebook for Colab: run from top to bottom as Jupyter runs it, small and on the CPU."""

import ast
import glob
import json
import os
import pathlib
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
        return ''.join(o.text for o in cell.outputs if o.output_type == 'stream')
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


def sessions(run: pathlib.Path) -> list[int]:
    """Returns the steps from which a run was trained, one for each time."""
    record = json.loads((run / 'config.json').read_text())
    return [session['step'] for session in record['sessions']]


def parameters(workdir: pathlib.Path, systems: str, steps: int) -> dict:
    # SMALL stays on: what it sets are fields that exist, and OVERRIDES win over it.
    tiny = overrides(TINY | {'train.steps': steps, 'train.learning_rate_steps': (1,)})
    return {
        'WORKDIR': str(workdir),
        'SYSTEMS': systems,
        'OVERRIDES': shlex.join(tiny),
        'ATTACK': 'pgd3',
    }


@pytest.mark.usefixtures('kernels')
def test_it_runs_from_top_to_bottom_and_goes_on_when_it_is_run_again(tmp_path):
    workdir = tmp_path / 'run'
    first = with_parameters(read(), **parameters(workdir, 'singleadv', steps=2))
    execute(first)
    assert 'JAX 0.10' in shown(cell(first, 'devices'))
    assert 'tensorboard-frame' in shown(cell(first, 'tensorboard'), 'text/html')
    assert 'step 2  n 30  clean' in shown(cell(first, 'evaluate'))
    assert sessions(workdir / 'singleadv_seed0') == [0]

    # More steps and one more system stand for what a disconnect left undone.
    values = parameters(workdir, 'singleadv, ensemble2adv', steps=4)
    second = with_parameters(read(), **values, TENSORBOARD=False)
    again = nbformat.v4.new_code_cell(cell(second, 'train').source)
    question = nbformat.v4.new_code_cell("print('imported:', 'jax' in sys.modules)")
    second.cells += [again, question]
    execute(second)
    assert 'going on from the checkpoint of step 2' in shown(cell(second, 'train'))
    # Each step was computed once: what is finished is not trained again.
    assert sessions(workdir / 'singleadv_seed0') == [0, 2]
    assert sessions(workdir / 'ensemble2adv_seed0') == [0]
    assert not cell(second, 'tensorboard').outputs
    # The notebook's own process would hold the TPU.
    assert 'imported: False' in shown(question)

    table = shown(cell(second, 'report'), 'text/markdown')
    assert all(name in table for name in ('SingleAdv', 'Ensemble2Adv', 'PGD3', '**figure2a**'))
    figures = [o for o in cell(second, 'report').outputs if 'image/png' in o.get('data', {})]
    assert len(figures) == len(list((workdir / 'report').glob('*.png'))) >= 4


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
        return types.SimpleNamespace(stdout=(), returncode=0, wait=lambda: 0)


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
