"""Several processes of one command, as on a pod: here all on this machine, over gloo."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, TINY_STUDY, overrides, run_environment, tiny_config, variables_like
from etils import epath

from ensadv.errors import UserError
from ensadv.runtime import distributed
from ensadv.storage import checkpoints, files
from ensadv.storage import workdir as workdir_lib
from ensadv.training import train

pytestmark = pytest.mark.usefixtures('small_network')

SECONDS = 280  # no test waits longer
SINGLE = '--config=configs/singleadv.py'

# main.py with small networks and without TensorFlow, whose import takes long; it lists the files
# that it writes.
DRIVER = """
import os, runpy, sys

folder, tensorflow, sign_seconds = (sys.argv.pop(1) for _ in range(3))
if not tensorflow:
    sys.modules['tensorflow'] = None

def watch(event, args):
    if event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+'):
        path = os.fspath(args[0]) if not isinstance(args[0], int) else ''
    elif event in ('os.rename', 'os.remove', 'os.rmdir'):
        path = os.fspath(args[0])
    else:
        return
    path = os.fsdecode(path)
    if folder and path.startswith(folder):
        os.write(1, f'WRITES {path}\\n'.encode())

sys.addaudithook(watch)
sys.argv[0] = 'main.py'
sys.path[:0] = ['.', 'tests']
import small_network
small_network.install()
if sign_seconds:
    from ensadv.runtime import peers
    peers.Peers.__init__.__kwdefaults__.update(sign_seconds=float(sign_seconds))
runpy.run_path('main.py', run_name='__main__')
"""


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str

    def said(self) -> list[str]:
        """Returns what a script said, between the pieces of lines that gloo's threads write."""
        return re.findall('SAID (.*)', self.stdout)

    def told(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith('error: ')]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Pod:
    """Processes with devices of their own, started with the same command."""

    def __init__(self, command, *, processes=2, devices=1):
        address = f'127.0.0.1:{free_port()}'
        common = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': f'{processes}'}
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=run_environment(devices) | common | {'JAX_PROCESS_ID': f'{index}'},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(processes)
        ]

    def results(self) -> list[Result]:
        """Waits until all have ended."""
        with ThreadPoolExecutor() as pool:
            outputs = list(pool.map(lambda p: p.communicate(timeout=SECONDS), self.processes))
        codes = [process.returncode for process in self.processes]
        return [Result(code, *output) for code, output in zip(codes, outputs, strict=True)]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def pod(*args, watched='', tensorflow='', sign_seconds='', **settings):
    """Starts main.py on several processes, which do not outlive the test."""
    program = [sys.executable, '-c', DRIVER, str(watched), tensorflow, sign_seconds]
    started = Pod([*program, *map(str, args)], **settings)
    try:
        yield started
    finally:
        started.kill()


@contextlib.contextmanager
def script(text, **settings):
    """Starts a script on several processes."""
    started = Pod([sys.executable, '-c', text], **settings)
    try:
        yield started
    finally:
        started.kill()


def run_pod(*args, **settings) -> list[Result]:
    with pod(*args, **settings) as started:
        results = started.results()
    for result in results:
        assert result.code == 0, result.stderr
    return results


# A run: 2 steps on 2 processes with 2 devices each, the third on one device, the fourth on one
# process with 4; beside it, the same steps on one process with 4.
FIELDS = TINY | {
    'data.on_device': 'no',  # a study, below, has its data on the devices
    'batch_norm.sync': True,
    'train.steps_per_call': 1,
    'train.checkpoint_every': 1,
    'eval.attacks': ('clean', 'ifgsm2', 'apgd_t4_short(targets=2)'),
    'eval.long_attacks': ('ifgsm4',),
    'eval.iterate_examples': 7,
    'eval.examples': 2,
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = epath.Path(tmp_path_factory.mktemp('pods'))
    command = [SINGLE, *overrides(FIELDS)]
    several = run_pod(*command, f'--workdir={root}/pod', '--config.train.steps=2', devices=2,
                      watched=root)  # fmt: skip
    run_pod(*command, '--config.eval.inline=False', f'--workdir={root}/one', processes=1, devices=4)
    shutil.copytree(root / 'pod', root / 'mixed')
    (root / 'mixed' / 'eval').rmtree()
    config = tiny_config('singleadv', train__steps=3)
    config.update_from_flattened_dict({k: v for k, v in FIELDS.items() if k != 'train.steps'})
    train.run(config, root / 'mixed')
    run_pod(*command, f'--workdir={root}/mixed', processes=1, devices=4)
    return root, several


def weights(path, step):
    config = tiny_config('singleadv')
    return jax.device_get(checkpoints.open_snapshots(path).restore(step, variables_like(config)))


def assert_alike(a, b, **tolerances):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerances)


def test_two_processes_with_two_devices_take_the_steps_of_one_with_four(runs):
    root, several = runs
    devices = workdir_lib.read_record(root / 'pod')['sessions'][0]['devices']
    assert devices['count'] == 4
    told = 'SingleAdv: training on 4 devices (cpu) of 2 processes, in float32, JAX '
    assert [result.stderr.count(told) for result in several] == [1, 0]
    # Gloo sums in another order than one process: 2.4e-7 at most, as measured.
    assert_alike(weights(root / 'pod', 2), weights(root / 'one', 2), rtol=0, atol=1e-5)


def test_each_layouts_checkpoint_is_gone_on_from_by_the_others(runs):
    root, _ = runs
    sessions = workdir_lib.read_record(root / 'mixed')['sessions']
    assert [session['step'] for session in sessions] == [0, 2, 3]
    assert [session['devices']['count'] for session in sessions] == [4, 1, 4]
    # 3.6e-7 at most, as measured.
    assert_alike(weights(root / 'mixed', 4), weights(root / 'one', 4), rtol=0, atol=1e-5)


def test_the_evaluation_is_that_of_one_process(runs):
    root, _ = runs
    ledgers = [
        files.read_arrays(workdir_lib.evaluation_path(root / name, 2, '.npz'))
        for name in ('pod', 'mixed')
    ]
    for name in ('clean', 'ifgsm2', 'apgd_t4_short'):
        np.testing.assert_array_equal(*(ledger[f'{name}_correct'] for ledger in ledgers))
        # 2.4e-7 at most, as measured.
        np.testing.assert_allclose(
            *(ledger[f'{name}_margin'] for ledger in ledgers), rtol=0, atol=1e-5
        )
    names = [r['name'] for r in workdir_lib.read_evaluations(root / 'pod')[2]['attacks']]
    assert names == ['clean', 'ifgsm2', 'apgd_t4_short', 'ifgsm4']
    examples = workdir_lib.read_examples(root / 'pod', 2)
    assert examples['adversarial'].shape == (2, 8, 8, 1)


def written(result):
    """Returns what a process wrote beside Orbax's checkpoints, which all write together."""
    lines = [line for line in result.stdout.splitlines() if line.startswith('WRITES ')]
    return [line for line in lines if 'orbax-checkpoint-tmp' not in line]


def test_only_process_0_writes_and_tells(runs):
    _, (first, second) = runs
    assert any('config.json' in line for line in written(first))
    assert any('/claims/' in line for line in written(first))
    assert not written(second)
    assert first.stdout.count('step 2  n 30  robust ') == 1
    assert 'step' not in second.stdout
    assert 'step' not in second.stderr


STUDY = (
    TINY
    | TINY_STUDY
    | {
        'study.systems': ('baseline', 'singleadv'),
        'study.planes': ('baseline', 'singleadv'),
        'train.steps': 2,
    }
)


def test_a_study(tmp_path):
    command = ['--mode=study', '--config=configs/quickstart.py', *overrides(STUDY)]
    first, second = run_pod(*command, f'--workdir={tmp_path}', watched=tmp_path, tensorflow='yes')
    assert f'The report: {tmp_path}/report/report.html\n' in first.stdout
    assert not written(second)
    assert 'report' not in second.stdout
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert 'figure4_baseline_seed0-singleadv_seed0' in page
    table = (tmp_path / 'report' / 'report.md').read_text()
    assert 'black-box' in table
    assert 'SingleAdv' in table
    for name in ('baseline_seed0', 'singleadv_seed0', 'blackbox/baseline_seed1000'):
        path = epath.Path(tmp_path) / name
        assert list(workdir_lib.read_evaluations(path)) == [2]
        # TensorBoard's files have one writer. The one that ends in 0 says what was overtaken.
        assert len(list(path.glob('events.*[!0]'))) == 1
        assert not list((path / 'claims').glob('*'))


@contextlib.contextmanager
def training(path, **settings):
    """Starts a run without an end, which has written a checkpoint."""
    fields = TINY | {'train.steps': 10**6, 'train.checkpoint_every': 20, 'eval.inline': False}
    with pod(SINGLE, *overrides(fields), f'--workdir={path}', **settings) as started:
        deadline = time.monotonic() + SECONDS
        while not checkpoints.open_checkpoints(path, 3).steps():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in started.processes)
            time.sleep(0.1)
        yield started


def test_one_process_asked_to_end_ends_all_with_a_checkpoint(tmp_path):
    path = epath.Path(tmp_path) / 'run'
    with training(path) as started:
        # A host that is taken away tells only its own process.
        started.processes[1].send_signal(signal.SIGTERM)
        results = started.results()
    assert [result.code for result in results] == [143, 143], results
    told = ['error: SIGTERM: stopped; the same command goes on from here']
    assert [result.told() for result in results] == [told, []]
    [*_, step] = [line for line in results[0].stderr.splitlines() if 'adversarial_loss' in line]
    assert f'[{checkpoints.open_checkpoints(path, 3).steps()[-1]}]' in step


def test_a_process_that_dies_ends_the_other(tmp_path):
    with training(epath.Path(tmp_path) / 'run', sign_seconds='0.5') as started:
        started.processes[1].kill()
        survivor, _ = started.results()
    assert survivor.code == 1, survivor.stderr
    assert len(survivor.told()) == 1
    assert f'process 1 of 2, on {socket.gethostname()}, has ended or hangs' in survivor.told()[0]
    assert 'the same command, on all hosts, goes on from there' in survivor.told()[0]


# Without main.py: what the processes say to each other, with little patience.
TALK = """
import os, signal, sys, time
import numpy as np
import jax
from ensadv.runtime import distributed, peers
from ensadv.errors import StorageError, TrainingError, UserError

def say(words):
    print('\\nSAID', words, flush=True)

peers.Peers.__init__.__kwdefaults__.update(sign_seconds=0.2, patience=15)
distributed.initialize()
index = int(os.environ['JAX_PROCESS_ID'])
with distributed.together():
    {}
"""


def talk(text, **settings) -> list[Result]:
    with script(TALK.format(text.strip().replace('\n', '\n    ')), **settings) as started:
        return started.results()


def test_what_the_processes_agree_on():
    results = talk(
        """
assert distributed.num_processes() == 2 and distributed.is_main() == (index == 0)
assert distributed.agree({'mine': index, 'steps': (1, 2)}) == {'mine': 0, 'steps': [1, 2]}
for flags, answer in (((0, 0), False), ((0, 1), True), ((1, 0), True), ((0, 0), False)):
    assert distributed.any_process(bool(flags[index])) is answer
assert [distributed.agree(place * (1 - index)) for place in range(100)] == list(range(100))
distributed.barrier('here')
distributed.check_same('the weather', 'fine')
try:
    distributed.check_same('the weather', index)
except UserError as error:
    say(error)
try:
    with distributed.failing_together():
        raise TrainingError('both')
except TrainingError as error:
    say(error)

tree = {'key': jax.random.split(jax.random.key(3), 2), 'x': np.arange(3.0)}
tree = distributed.replicate(tree | {'y': jax.numpy.ones((2, 2))})
assert distributed.replicate(tree)['x'].is_fully_replicated
assert distributed.num_devices() == 4

def f(state, keys):
    noise = jax.random.normal(keys[0])
    share = distributed.my_share(8)
    total = distributed.mean_over_devices(jax.numpy.sum(share) * 4.0)
    return jax.tree.map(lambda leaf: leaf + total + 0 * noise, state)

step = distributed.run_on_devices(f, 2, donate_first=True)
state = {'x': tree['x'], 'y': tree['y']}
keys = tree['key']
given = state['x']
state = step(step(state, keys), keys)
assert given.is_deleted()
assert not state['x'].is_fully_addressable and state['x'].is_fully_replicated
assert np.asarray(state['x']).tolist() == [56, 57, 58] and np.asarray(state['y'])[0, 0] == 57

first = 4 * jax.process_index()
here = [[first, first + 1], [first + 2, first + 3]]
assert distributed.places_here(8).tolist() == here
differs = lambda own: distributed.max_over_devices(abs(own - distributed.my_share(8)).max())
assert distributed.run_on_devices(differs, 0, divided=True)(np.array(here)) == 0

double = distributed.map_examples(lambda scale, batch: (scale * batch[0], batch[1] > 3), 1)
scale = distributed.replicate(np.float32(2))
one, two = double(scale, (np.arange(8, dtype=np.float32).reshape(8, 1), np.arange(8)))
assert one.tolist() == [[2.0 * i] for i in range(8)], one
assert two.tolist() == [False] * 4 + [True] * 4, two
say('all is well')
""",
        devices=2,
    )
    for result in results:
        assert result.code == 0, result.stderr
        assert result.said() == [
            'the weather: found another on process 1 than on process 0', 'both', 'all is well'
        ]  # fmt: skip


@pytest.mark.parametrize(
    'job, code, told',
    [
        # One alone makes a mistake, or fails; the other waits for it.
        ("if index: raise UserError('no such\\n data')\ndistributed.agree(1)", 2, 'no such data'),
        ("raise UserError('of all')", 2, 'error: of all'),
        ("if index: raise ValueError('a fault')\ndistributed.any_process(False)", 1,
         'error: process 1: ValueError: a fault'),
        ("if index: raise StorageError('no space')\ndistributed.barrier('never')", 1,
         'error: no space'),
    ],
)  # fmt: skip
def test_what_fails_on_one_ends_all_with_one_line(job, code, told):
    results = talk(job)
    assert [result.code for result in results] == [code, code], results
    assert [len(result.told()) for result in results] == [1, 0], results
    assert told in results[0].told()[0]


@pytest.mark.parametrize('dead', [0, 1])
def test_a_dead_process_is_missed_by_one_that_waits(dead):
    results = talk(
        f"if index == {dead}: os.kill(os.getpid(), signal.SIGKILL)\ndistributed.barrier('never')"
    )
    assert results[dead].code == -signal.SIGKILL
    assert results[1 - dead].code not in (0, -signal.SIGKILL)
    assert 'Traceback' not in results[1 - dead].stderr
    if dead == 1:
        assert 'process 1 of 2' in results[0].told()[0]
    else:
        # JAX ends the others of process 0 itself.
        assert 'the JAX distributed service detected fatal errors' in results[1].stderr


def test_a_dead_process_is_not_taken_for_bad_storage(tmp_path):
    """Orbax asks the others whenever it writes."""
    results = talk(
        f"""
from etils import epath
from ensadv.storage import checkpoints
store = checkpoints.open_checkpoints(epath.Path({str(tmp_path)!r}), 3)
tree = distributed.replicate({{'x': np.arange(4.0)}})
store.save(1, tree, wait=True)
distributed.barrier('saved')
if index: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.5)
store.save(2, tree, wait=True)
"""
    )
    assert results[0].code == 1
    [told] = results[0].told()
    assert 'process 1 of 2' in told
    assert 'cannot be written' not in told


def test_saves_in_two_places_do_not_meet(tmp_path):
    """Orbax's threads of two savings would wait at the same barrier, which is an error."""
    results = talk(
        f"""
from etils import epath
from ensadv.storage import checkpoints
path = epath.Path({str(tmp_path)!r})
stores = [checkpoints.open_checkpoints(path, 3), checkpoints.open_snapshots(path)]
tree = distributed.replicate({{'x': np.arange(4.0)}})
for step in range(20):
    for store in stores:
        store.save(step, tree)
        time.sleep(0.002 * (7 * step % 11))
for store in stores:
    store.close()
say(len(stores[1].steps()))
"""
    )
    for result in results:
        assert result.code == 0, result.stderr
        assert result.said() == ['20']


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv('JAX_NUM_PROCESSES', raising=False)
    joined = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *a, **k: joined.append(a))
    distributed.initialize()
    monkeypatch.setenv('JAX_NUM_PROCESSES', '1')
    distributed.initialize()
    assert not joined
    assert distributed.is_main()
    assert distributed.num_processes() == 1
    assert distributed.agree((1, 2)) == (1, 2)
    assert distributed.any_process(True)
    assert not distributed.any_process(False)


@pytest.mark.parametrize(
    'variables, told',
    [
        ({'JAX_NUM_PROCESSES': 'two'}, "JAX_NUM_PROCESSES: expected a whole number .* 'two'"),
        ({'JAX_NUM_PROCESSES': '2'}, "expected all three.*found None, 2, None"),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'},
         "below the second, found 'a:1', 2, 2"),
        ({'JAX_PROCESS_ID': '0'}, 'expected all three'),
    ],
)  # fmt: skip
def test_variables_that_make_no_sense(monkeypatch, variables, told):
    for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        distributed.initialize()


@pytest.mark.parametrize('count', [1, 3])
def test_the_cluster_says_how_many_there_are(monkeypatch, count):
    """With one there is nothing to join, and joining may wait for what is not there."""
    for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
        monkeypatch.delenv(name, raising=False)
    slurm = {'JOB_ID': '7', 'STEP_NODELIST': 'node[1-3]', 'NTASKS': f'{count}', 'PROCID': '0',
             'LOCALID': '0', 'STEP_NUM_NODES': f'{count}'}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(f'SLURM_{name}', value)
    joined = []

    def initialize(*given, **_):
        joined.append(given)
        raise RuntimeError('nobody answers')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    if count == 1:
        distributed.initialize()
        assert not joined
        return
    with pytest.raises(UserError, match='the 3 processes of this command did not find each other'):
        distributed.initialize()
    assert joined == [(None, 3, None)]
