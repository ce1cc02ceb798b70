"""launch/tpu_vm.sh against a stand-in for gcloud, whose workers are directories on this machine.

The commands that the script sends over ssh are really executed there, by bash, with stand-ins for
sudo, systemctl, pip, uv and Python.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / 'launch' / 'tpu_vm.sh'
ZONE = '--zone=us-central2-b'
IMAGE = '--version=v2-alpha-'
WATCH = ('watch', 'pod', ZONE, '--type=v4-16', '--spot', '--interval=0', '--')
RUN = ('--config=configs/singleadv.py', '--workdir=gs://bucket/run')
# What bash, ssh or systemd might change on the way.
HOSTILE = [
    "--config.eval.attacks=('clean', 'pgd20')",
    '--workdir=gs://bucket/a run',
    '--config.data.path=$HOME/`id`/%h "x" \\ *  two',
    '--config.note=a\nb\té; exit 3 # & | < > ! ~',
    '',
]

GCLOUD = """#!{python} -IS
import json, os, pathlib, shutil, subprocess, sys

cloud = pathlib.Path(os.environ['CLOUD'])
args = sys.argv[1:]
with open(cloud / 'calls', 'a') as calls:
    calls.write(json.dumps(args) + '\\n')
plan = json.loads((cloud / 'plan').read_text())
workers = sorted(cloud.glob('worker?'))  # there is a VM if it has some
if args[:2] == ['config', 'get-value']:
    print(plan.get('zone', ''))
    sys.exit()
assert args[:3] == ['compute', 'tpus', 'tpu-vm'] and args[-1] == '--quiet', args
command, flags = args[3], dict(arg[2:].split('=', 1) for arg in args if '=' in arg)
errors = plan.get(command)
if errors:  # of these the first is raised now
    error = errors.pop(0)
    (cloud / 'plan').write_text(json.dumps(plan))
    if error:
        sys.exit(f'Something else\\nERROR: (gcloud.{{command}}) {{error}}')
if command == 'describe':
    # What happens between two looks: a new state of the VM, or the end of main.py.
    for event in plan.get('events', [])[:1]:
        plan['events'].pop(0)
        if event.startswith('exit '):
            for home in workers:
                (home / 'properties').write_text(
                    f'ActiveState={{"failed" if event[5:] != "0" else "inactive"}}\\n'
                    f'ExecMainCode=1\\nExecMainStatus={{event[5:]}}\\nResult=x\\n'
                )
        elif event == 'all reachable':
            del plan['unreachable']
        elif event == 'stop':
            for home in workers:
                (home / 'properties').unlink()
        elif event:
            plan['state'] = event
        (cloud / 'plan').write_text(json.dumps(plan))
    if not workers:
        sys.exit(f'ERROR: (gcloud.describe) NOT_FOUND: Resource {{args[4]}} was not found')
    print(plan.get('state', 'READY'), len(workers), plan.get('health', ''), sep='\\t')
elif command == 'create':
    for i in range(2):
        (cloud / f'worker{{i}}/etc/systemd/system').mkdir(parents=True)
    plan['state'] = 'READY'
    (cloud / 'plan').write_text(json.dumps(plan))
elif command == 'delete':
    for home in workers:
        shutil.rmtree(home)
elif command == 'scp':
    for home in workers:
        shutil.copy(args[4], home / args[5].split(':')[1])
elif command == 'ssh':
    if flags['worker'] != 'all':
        workers = [cloud / f'worker{{flags["worker"]}}']
    codes = []
    for home in workers:
        if plan.get('unreachable') == home.name:
            print(f'ERROR: {{home.name}}: connection refused', file=sys.stderr)
            codes.append(255)
            continue
        environment = {{'HOME': str(home), 'PATH': f'{{cloud}}/bin'}}
        # As gcloud and ssh do it: split at spaces, put together again, run by the login shell.
        remote = ' '.join(flags['command'].split(' '))
        codes.append(subprocess.run(['bash', '-c', remote], cwd=home, env=environment).returncode)
    sys.exit(max(codes, default=0))
"""

ON_WORKERS = {
    'hostname': 'echo "${HOME##*/}"',
    # Root's files are below the home, too.
    'sudo': 'exec "${@/#\\/etc\\//$HOME/etc/}"',
    'journalctl': 'echo "$HOME" "$@"',
    # Runs what the unit names, at once, and goes by how it ends; 99: it is still running.
    'systemctl': """
echo "$@" >>~/systemctl_calls
unit=~/etc/systemd/system/ensadv.service
case $*  in
  'show ensadv --property=LoadState')
    if [[ -f $unit ]]; then echo LoadState=loaded; else echo LoadState=not-found; fi ;;
  'show ensadv '*)
    if [[ -f ~/properties ]]; then cat ~/properties; else
      printf 'Result=success\\nExecMainCode=0\\nExecMainStatus=0\\nActiveState=inactive\\n'
    fi ;;
  'enable --quiet --now ensadv')
    code=0
    $(sed -n s/ExecStart=//p $unit) &
    echo $! >~/pid_of_the_unit
    wait $! || code=$?
    active=failed
    if [[ $code == 0 ]]; then active=inactive; elif [[ $code == 99 ]]; then active=active; fi
    printf '%s\\n' ExecMainStatus=$code ExecMainCode=1 Result=x ActiveState=$active >~/properties
    ;;
  'disable --quiet --now ensadv') rm -f ~/properties ;;
  daemon-reload) [[ -f $unit ]] ;;
  'reset-failed ensadv') echo 'Unit ensadv.service not loaded.' >&2; exit 1 ;;
  *) exit 1 ;;
esac""",
    'python3': """
echo "$@" >>~/pip_calls
case $* in
  '-m pip install '*uv) mkdir -p ~/.local/bin; cp "$(dirname "$0")/the_uv" ~/.local/bin/uv ;;
esac""",
    'the_uv': """
echo "$@" >>~/uv_calls
if [[ $1 == venv ]]; then
  for venv; do :; done
  mkdir "$venv" "$venv/bin"
  cp "$(dirname "$(command -v python3)")/the_python" "$venv/bin/python"
else
  while [[ $1 != --requirement ]]; do shift; done
  grep -q jax "$2"
fi""",
    'the_python': """
[[ $1 == main.py ]] || exit 0
[[ -f main.py ]] || exit 5
echo $$ >~/pid_of_python
printf '%s\\0' "$@" >>~/argv
exit "$(cat ~/exit_code 2>/dev/null || echo 99)"
""",
}


class Cloud:
    """What the stand-ins see, and this test of them."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.checkout = root / 'check out'
        self.path = root / 'path'

    def make(self):
        self.plan()
        bin = self.root / 'bin'
        bin.mkdir()
        for name, text in ON_WORKERS.items():
            (bin / name).write_text(f'#!/bin/bash\nset -e\n{text}\n')
            (bin / name).chmod(0o755)
        # No more than these, so that no uv of this machine is found there.
        for name in (
            *('bash', 'cat', 'cp', 'dirname', 'env', 'grep', 'gzip', 'id', 'mkdir'),
            *('mv', 'rm', 'sed', 'sort', 'tar', 'tee', 'tr'),
        ):
            (bin / name).symlink_to(shutil.which(name))
        self.path.mkdir()
        gcloud = self.path / 'gcloud'
        gcloud.write_text(GCLOUD.format(python=sys.executable))
        gcloud.chmod(0o755)

    def plan(self, **plan):
        (self.root / 'plan').write_text(json.dumps(plan))

    def make_checkout(self):
        """A checkout with the script, some of it not committed."""
        (self.checkout / 'launch').mkdir(parents=True)
        shutil.copy(SCRIPT, self.checkout / 'launch')
        files = {'main.py': '1', 'requirements.txt': 'jax', 'gone.py': '', '.gitignore': 'runs/'}
        for name, text in files.items():
            (self.checkout / name).write_text(text)
        git = ('git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=false')
        for command in ('init -q', 'add .', 'commit -q -m x'):
            subprocess.run([*git, *command.split()], cwd=self.checkout, check=True)
        (self.checkout / 'main.py').write_text('2')
        (self.checkout / 'gone.py').unlink()
        (self.checkout / 'a new.py').write_text('')
        (self.checkout / 'runs').mkdir()
        (self.checkout / 'runs' / 'big').write_text('')

    def __call__(self, *args, path=None, **environment):
        """Runs the script, of the small checkout if there is one."""
        script = self.checkout / 'launch' / 'tpu_vm.sh'
        return self.bash(script if script.exists() else SCRIPT, *args, path=path, **environment)

    def bash(self, *args, path=None, **environment):
        environment |= {'CLOUD': str(self.root), 'HOME': str(self.root), 'LC_ALL': 'C.UTF-8'}
        return subprocess.run(
            [shutil.which('bash'), *args],
            env=environment | {'PATH': path or f'{self.path}:{os.environ["PATH"]}'},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def done(self, *args):
        result = self(*args)
        assert result.returncode == 0, result.stderr
        return result

    def calls(self):
        """gcloud's arguments, call by call, without what all of them have."""
        path = self.root / 'calls'
        calls = path.read_text().splitlines() if path.exists() else []
        return [json.loads(call)[3:] for call in calls if json.loads(call)[0] == 'compute']

    def verbs(self):
        return [call[0] for call in self.calls()]

    def workers(self):
        return sorted(self.root.glob('worker?'))

    def argv(self):
        """What main.py's interpreter was called with, on each worker."""
        return [
            [arg.decode() for arg in (home / 'argv').read_bytes().split(b'\0')[:-1]]
            for home in self.workers()
        ]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    cloud.make()
    return cloud


@pytest.fixture(scope='module')
def set_up(tmp_path_factory):
    cloud = Cloud(tmp_path_factory.mktemp('pod'))
    cloud.make()
    cloud.make_checkout()
    cloud.done('create', 'pod', ZONE, '--type=v4-16')
    cloud.done('setup', 'pod', ZONE)
    (cloud.root / 'calls').unlink()
    return cloud.root


@pytest.fixture
def pod(set_up, tmp_path):
    """A VM of two workers that are set up."""
    shutil.copytree(set_up, tmp_path, symlinks=True, dirs_exist_ok=True)
    return Cloud(tmp_path)


def test_shellcheck():
    shellcheck = pathlib.Path(sys.executable).with_name('shellcheck')
    result = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    'flags, expected',
    [
        (
            ['--type=v4-32', '--spot'],
            ['--accelerator-type=v4-32', '--version=tpu-ubuntu2204-base', '--spot'],
        ),
        (['--type=v5p-8'], ['--accelerator-type=v5p-8', f'{IMAGE}tpuv5']),
        (['--type=v5litepod-8'], ['--accelerator-type=v5litepod-8', f'{IMAGE}tpuv5-lite']),
        (['--type', 'v6e-8'], ['--accelerator-type=v6e-8', f'{IMAGE}tpuv6e']),
        (
            [
                '--type=v6e-8',
                '--version=v',
                '--create_flag=--network=a b',
                '--create_flag=--tags=c',
            ],
            ['--accelerator-type=v6e-8', '--version=v', '--network=a b', '--tags=c'],
        ),
    ],
)
def test_create(cloud, flags, expected):
    cloud.done('create', 'pod', ZONE, *flags)
    assert cloud.calls() == [['create', 'pod', *expected, ZONE, '--quiet']]


def test_delete_and_project(cloud):
    cloud.done('delete', 'pod', '--zone', 'z', '--project=mine')
    assert cloud.calls() == [['delete', 'pod', '--zone=z', '--project=mine', '--quiet']]


def test_zone_from_the_environment_and_from_gcloud(cloud):
    cloud.plan(zone='from-gcloud')
    assert cloud('delete', 'pod').returncode == 0
    assert cloud('delete', 'pod', TPU_ZONE='from-variable').returncode == 0
    assert cloud('delete', 'pod', '--zone=from-flag', TPU_ZONE='from-variable').returncode == 0
    zones = [call[2] for call in cloud.calls()]
    assert zones == ['--zone=from-gcloud', '--zone=from-variable', '--zone=from-flag']


@pytest.mark.parametrize(
    'args, words',
    [
        ([], "command: found ''"),
        (['run', 'pod', ZONE], "found 'run', allowed are create, setup, start,"),
        (['status', ZONE], 'NAME: needed'),
        (['status', 'My_pod', ZONE], "found 'My_pod'"),
        (['status', 'a', 'b', ZONE], 'found a and b'),
        (['status', 'pod'], '--zone: needed'),
        (['status', 'pod', '--zone'], '--zone: needs a value'),
        (['status', 'pod', ZONE, '--spott'], 'unknown flag --spott'),
        (['create', 'pod', ZONE], '--type: needed'),
        (['stop', 'pod', ZONE, '--', '--workdir=gs://b/r'], 'only start and watch'),
        (['start', 'pod', ZONE], '--workdir: needed'),
        (['start', 'pod', ZONE, *RUN], 'unknown flag --config=configs/singleadv.py'),
        (['start', 'pod', ZONE, '--', '--workdir=runs/a'], 'found runs/a, allowed is gs://'),
        (['start', 'pod', ZONE, '--', '--workdir', '/mnt/a'], 'found /mnt/a'),
        (['start', 'pod', ZONE, '--', *RUN, '--workdir=gs://'], 'found gs://,'),
        (['watch', 'pod', ZONE, '--', *RUN], '--type: needed'),
        (['watch', 'pod', ZONE, '--type=v4-8', '--interval=1m', '--', *RUN], 'found 1m'),
        (['logs', 'pod', ZONE, '--worker=x'], '--worker: found x'),
        # No git checkout.
        (['setup', 'pod', ZONE], 'not a git checkout'),
    ],
)
def test_a_mistake_is_one_line(cloud, args, words):
    if args[:1] == ['setup']:
        (cloud.checkout / 'launch').mkdir(parents=True)
        shutil.copy(SCRIPT, cloud.checkout / 'launch')
    result = cloud(*args)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.startswith('tpu_vm.sh: ')
    assert result.stderr.count('\n') == 1
    assert words in result.stderr
    assert cloud.calls() == []


def test_without_gcloud(cloud):
    result = cloud('status', 'pod', ZONE, path=f'{cloud.root}/bin')
    assert (result.returncode, result.stderr.count('\n')) == (2, 1)
    assert 'gcloud: not found' in result.stderr


def test_help(cloud):
    for args in (['--help'], ['start', '-h']):
        text = cloud.done(*args).stdout
        assert text.startswith('Runs main.py on a Cloud TPU VM')
        assert '--dry_run' in text


def test_setup_copies_the_checkout_as_it_is(cloud):
    cloud.make_checkout()
    cloud.done('create', 'pod', ZONE, '--type=v4-16')
    cloud.done('setup', 'pod', ZONE, '--ssh_flag=--internal-ip')
    _, scp, ssh = cloud.calls()
    assert scp[2:] == ['pod:ensadv_code.tar.gz', '--worker=all', '--internal-ip', ZONE, '--quiet']
    assert ssh[:4] == ['ssh', 'pod', '--worker=all', '--internal-ip']
    assert len(cloud.workers()) == 2
    for home in cloud.workers():
        code = home / 'ensadv' / 'code'
        files = {str(path.relative_to(code)) for path in code.rglob('*') if path.is_file()}
        assert sorted(files) == [
            '.gitignore',
            'a new.py',
            'launch/tpu_vm.sh',
            'main.py',
            'requirements.txt',
        ]
        assert (code / 'main.py').read_text() == '2'
        assert (home / 'pip_calls').read_text().endswith('-m pip install --quiet --user uv\n')
        venv, install = (home / 'uv_calls').read_text().splitlines()
        assert venv == f'venv --quiet --python 3.13 {home}/ensadv/venv'
        python, requirements = f'{home}/ensadv/venv/bin/python', f'{code}/requirements.txt'
        assert install == (
            f'pip install --quiet --python {python} --requirement {requirements} jax[tpu]'
        )


def test_setup_again(pod):
    (pod.checkout / 'a new.py').rename(pod.checkout / 'newer.py')
    pod.done('setup', 'pod', ZONE)
    for home in pod.workers():
        names = {path.name for path in (home / 'ensadv' / 'code').iterdir()}
        assert names & {'a new.py', 'newer.py'} == {'newer.py'}
        # What is there stays: no second uv, no second environment.
        assert len((home / 'pip_calls').read_text().splitlines()) == 2
        assert [call.split()[0] for call in (home / 'uv_calls').read_text().splitlines()] == [
            'venv',
            'pip',
            'pip',
        ]


def test_every_argument_arrives_unchanged(pod):
    pod.done('start', 'pod', ZONE, '--', *HOSTILE)
    assert pod.verbs() == ['ssh']
    assert pod.argv() == [['main.py', *HOSTILE]] * 2


def test_the_unit(pod):
    pod.done('start', 'pod', ZONE, '--', *RUN)
    unit = pod.workers()[0] / 'etc' / 'systemd' / 'system' / 'ensadv.service'
    lines = unit.read_text().splitlines()
    assert {
        # After a crash, and after a SIGTERM that was not `systemctl stop`; not after a mistake.
        *('Restart=on-failure', 'RestartForceExitStatus=143 SIGTERM', 'RestartPreventExitStatus=2'),
        # Stopped it has not failed, and it has the 30 seconds that main.py may take.
        *('SuccessExitStatus=143', 'TimeoutStopSec=60'),
        # After a reboot.
        'WantedBy=multi-user.target',
        f'ExecStart=/bin/bash {pod.workers()[0]}/ensadv/run.sh',
    } <= set(lines)
    # It is Python that gets the SIGTERM.
    home = pod.workers()[0]
    assert (home / 'pid_of_python').read_text() == (home / 'pid_of_the_unit').read_text()
    calls = (home / 'systemctl_calls').read_text()
    assert calls.endswith('daemon-reload\nreset-failed ensadv\nenable --quiet --now ensadv\n')
    if shutil.which('systemd-analyze'):
        check = subprocess.run(
            ['systemd-analyze', 'verify', unit], capture_output=True, text=True, check=False
        )
        assert (check.returncode, check.stderr) == (0, '')


def test_start_again(pod):
    pod.done('start', 'pod', ZONE, '--', *RUN)
    assert 'already running' in pod.done('start', 'pod', ZONE, '--', *RUN).stdout
    other = pod('start', 'pod', ZONE, '--', *RUN, '--config.seed=1')
    assert (other.returncode, 'another run is going on' in other.stderr) == (2, True)
    assert pod.argv() == [['main.py', *RUN]] * 2
    # Nor is code exchanged under a run.
    (pod.checkout / 'main.py').write_text('3')
    setup = pod('setup', 'pod', ZONE)
    assert (setup.returncode, 'stop it first' in setup.stderr) == (2, True)
    assert (pod.workers()[0] / 'ensadv' / 'code' / 'main.py').read_text() == '2'
    pod.done('stop', 'pod', ZONE)
    pod.done('setup', 'pod', ZONE)
    pod.done('start', 'pod', ZONE, '--', *RUN, '--config.seed=1')
    assert pod.argv() == [['main.py', *RUN, 'main.py', *RUN, '--config.seed=1']] * 2


def test_start_before_setup(cloud):
    cloud.done('create', 'pod', ZONE, '--type=v4-16')
    result = cloud('start', 'pod', ZONE, '--', *RUN)
    assert (result.returncode, 'run setup first' in result.stderr) == (2, True)


def test_stop_status_and_logs(pod):
    assert pod.done('stop', 'pod', ZONE).stdout.count('nothing was started') == 2
    pod.done('start', 'pod', ZONE, '--', *RUN)
    status = pod.done('status', 'pod', ZONE).stdout.splitlines()
    assert status[0] == 'pod: READY , workers: 2'
    assert [line.split()[:3] for line in status[1:]] == [
        [f'worker{i}', 'running', 'ActiveState=active'] for i in range(2)
    ]
    logs = pod.done('logs', 'pod', ZONE, '--worker=1', '-f').stdout
    assert logs == (
        f'{pod.root}/worker1 --unit=ensadv --output=cat --no-pager --lines=100 --follow\n'
    )
    assert pod.done('logs', 'pod', ZONE).stdout.startswith(f'{pod.root}/worker0 ')
    pod.done('stop', 'pod', ZONE)
    calls = (pod.workers()[1] / 'systemctl_calls').read_text()
    assert calls.endswith('disable --quiet --now ensadv\n')
    assert ' stopped ' in pod.done('status', 'pod', ZONE).stdout


def test_status_of_what_is_not_there(cloud):
    result = cloud('status', 'pod', ZONE)
    assert result.returncode == 1
    assert result.stderr == 'tpu_vm.sh: there is no VM pod in us-central2-b\n'
    cloud.plan(describe=['PERMISSION_DENIED: not yours'])
    result = cloud('status', 'pod', ZONE)
    assert (result.returncode, 'PERMISSION_DENIED' in result.stderr) == (1, True)
    cloud.done('create', 'pod', ZONE, '--type=v4-16')
    cloud.plan(state='PREEMPTED', health='TIMEOUT')
    assert cloud.done('status', 'pod', ZONE).stdout == 'pod: PREEMPTED TIMEOUT, workers: 2\n'


def test_a_preempted_vm_goes_on(cloud):
    cloud.make_checkout()
    # Somebody edits the checkout meanwhile.
    edit = f'echo 3 >"{cloud.checkout}/main.py"'
    (cloud.root / 'bin' / 'hostname').write_text(f'#!/bin/bash\n{edit}\necho "${{HOME##*/}}"\n')
    looks = ['', '', 'CREATING', 'READY', '', 'PREEMPTED', '', '', '', '', 'exit 0']
    cloud.plan(events=looks, create=['', 'RESOURCE_EXHAUSTED: no more capacity'])
    result = cloud.done(*WATCH, *RUN)
    start = ['scp', 'ssh', 'ssh']  # set up after a stop, and started
    assert cloud.verbs() == [
        *('describe', 'create'),  # there was none
        *('describe', 'ssh', 'ssh', *start),
        *('describe',),  # still on its way
        *('describe', 'ssh', 'describe', 'ssh'),  # running
        *('describe', 'delete'),  # preempted
        *('describe', 'create', 'describe', 'create'),  # no capacity at first
        *('describe', 'ssh', 'ssh', *start),
        *('describe', 'ssh', 'describe', 'ssh'),  # running, finished
    ]
    creates = [call for call in cloud.calls() if call[0] == 'create']
    assert creates[0] == creates[2]
    assert '--spot' in creates[0]
    assert cloud.argv() == [['main.py', *RUN]] * 2  # of the new VM; the old one's are gone
    # The new one has the code that watch began with, too.
    assert (cloud.checkout / 'main.py').read_text() == '3\n'
    for home in cloud.workers():
        assert (home / 'ensadv' / 'code' / 'main.py').read_text() == '2'
    said = [line.split(': ', 1)[1] for line in result.stderr.splitlines() if ' pod: ' in line]
    assert said[1:] == [
        'creating the VM',
        'setting up and starting',
        'CREATING',
        'running',
        'PREEMPTED, deleting the VM',
        'creating the VM',
        'no VM yet: ERROR: (gcloud.create) RESOURCE_EXHAUSTED: no more capacity',
        'creating the VM',
        'setting up and starting',
        'running',
        'finished',
    ]


@pytest.mark.parametrize(
    'looks, code, words',
    [
        (['', 'exit 0'], 0, 'finished'),
        (['', 'exit 2'], 1, 'has failed'),
        (['', 'stop'], 1, 'was stopped'),
        (['exit 0'], 0, 'finished'),
        # Before watch began: it is what goes on.
        (['exit 1', '', 'exit 0'], 0, 'setting up and starting'),
        (['stop', '', 'exit 0'], 0, 'setting up and starting'),
    ],
)
def test_watch_of_a_run_that_was_started(pod, looks, code, words):
    pod.done('start', 'pod', ZONE, '--', *RUN)
    pod.plan(events=looks)
    result = pod(*WATCH, *RUN)
    assert (result.returncode, words in result.stderr) == (code, True), result.stderr
    starts = 1 + ('setting' in words)
    assert pod.argv() == [['main.py', *RUN] * starts] * 2
    assert 'create' not in pod.verbs()


def test_watch_of_another_run(pod):
    pod.done('start', 'pod', ZONE, '--', *RUN, '--config.seed=1')
    result = pod(*WATCH, *RUN)
    assert (result.returncode, 'another run is going on' in result.stderr) == (2, True)
    # That it is finished does not mean that this one is.
    pod.plan(events=['exit 0', '', 'exit 0'])
    pod.done(*WATCH, *RUN)
    assert pod.argv()[1] == ['main.py', *RUN, '--config.seed=1', 'main.py', *RUN]


def test_watch_waits_for_a_worker_that_does_not_answer(pod):
    pod.done('start', 'pod', ZONE, '--', *RUN)
    pod.plan(
        unreachable='worker1', describe=['', 'offline'], events=['', 'all reachable', 'exit 0']
    )
    result = pod.done(*WATCH, *RUN)
    said = [line.split(' pod: ')[1] for line in result.stderr.splitlines() if ' pod: ' in line]
    assert said[1:] == [
        '1 of 2 workers answer: ERROR: worker1: connection refused',
        'ERROR: (gcloud.describe) offline',
        'running',
        'finished',
    ]
    assert pod.argv() == [['main.py', *RUN]] * 2


@pytest.mark.parametrize(
    'plan, code, words',
    [
        ({'create': ['INVALID_ARGUMENT: no such type']}, 2, 'no such type'),
        ({'describe': ['You do not have an active account']}, 1, 'active account'),
        ({'scp': ['broken'] * 5}, 1, 'five times'),
    ],
)
def test_watch_does_not_repeat_what_cannot_work(cloud, plan, code, words):
    cloud.make_checkout()
    cloud.plan(**plan)
    result = cloud(*WATCH, *RUN)
    assert (result.returncode, words in result.stderr.splitlines()[-1]) == (code, True)


@pytest.mark.parametrize(
    'args',
    [
        ('create', 'pod', ZONE, '--type=v4-16', "--create_flag=--description=it's"),
        ('start', 'pod', ZONE, '--', *HOSTILE),
        ('stop', 'pod', ZONE),
        ('logs', 'pod', ZONE, '--project=p'),
    ],
)
def test_dry_run_prints_what_would_be_called(cloud, args):
    """A shell that reads it calls the same."""
    dry_run = cloud.done(args[0], '--dry_run', *args[1:])
    assert cloud.calls() == []
    cloud.bash('-c', dry_run.stdout)
    cloud(*args)  # there is no VM, so that not all of them succeed
    printed, called = cloud.calls()
    assert printed == called


def test_dry_run_of_watch(cloud):
    shown = cloud.done(WATCH[0], '--dry_run', *WATCH[1:], *RUN).stdout
    assert cloud.calls() == []
    cloud.bash('-c', shown)
    assert cloud.verbs() == ['create', 'scp', 'ssh', 'ssh']
