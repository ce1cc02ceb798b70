"""Kills real runs at random moments, goes on with the same command, and compares the results.

    python benchmarks/kill_runs.py [--kills=17] [--seed=0] [--work=NAME] [--within=1]

Five kinds of work on digits: a trainer that evaluates its own snapshots, another whose images the
host streams, a trainer with an evaluator beside it, of which one or both are killed, a study with a
transfer set, and AutoAttack on a run that is trained already. Each is done once undisturbed. Then
it is started again and again in a new workdir, and killed (SIGKILL) after a
time drawn anew from the whole length of the work, or from that --within of it, so that one workdir
is killed more often; until it comes to its end. By then

- the weights of every snapshot that is left are to the bit those of the undisturbed work,
- so are all results, their ledgers and the transfer set, but for times,
- nothing half written is left, and the files read in between were all whole.

Prints a line for each kill and a table; exit code 1 if a run differs.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.machine import ROOT

FIELDS = {
    'data.name': 'digits',
    'data.pad': 1,
    'epsilon': 0.15,
    'model.depth': 10,
    'model.width': 1,
    'train.steps': 60,
    'train.batch_size': 16,
    'train.steps_per_call': 5,
    'train.log_every': 5,
    'train.checkpoint_every': 10,
    'train.snapshot_every': 20,
    'attack.steps': 2,
    'eval.attacks': ('clean', 'ifgsm5', 'pgd5'),
    'eval.long_attacks': ('pgd30',),
    'eval.num_examples': 100,
    'eval.examples': 4,
    'eval.batch_size': 50,
}
SINGLE = ['--config=configs/singleadv.py']
AUTOATTACK = ['--mode=evaluate']
EVALUATE = ['--mode=evaluate', '--config=configs/singleadv.py']
STUDY = ['--mode=study', '--config=configs/quickstart.py']
STUDY_FIELDS = {
    'study.systems': ('singleadv', 'ensemble2adv'),
    'study.planes': (),
    'study.audit': False,
    'study.members': False,
    'eval.attacks': ('clean', 'ifgsm5', 'blackbox'),
    'train.steps': 20,
    'train.learning_rate_steps': (15,),
    'blackbox.sources': ('baseline',),
    'blackbox.rounds': 2,
    'blackbox.steps': 5,
}
AUTOATTACK_FIELDS = {
    'eval.long_attacks': ('pgd30', 'autoattack'),
    'eval.autoattack.gradient_steps': 20,
    'eval.autoattack.queries': 500,
}
# Name: the commands that run beside each other.
WORK = {
    'trainer': [(SINGLE, {})],
    'streaming trainer': [(SINGLE, {'data.on_device': 'no', 'data.cutmix': 1.0})],
    'trainer and evaluator': [
        (SINGLE, {'eval.inline': False}),
        (EVALUATE, {'eval.inline': False, 'eval.follow': True}),
    ],
    'study': [(STUDY, STUDY_FIELDS)],
    'AutoAttack': [(AUTOATTACK, AUTOATTACK_FIELDS)],
}
LIMIT_SECONDS = 600.0


def start(arguments, fields, workdir, cache):
    """Starts a command, in a process group of its own."""
    command = [
        sys.executable, 'main.py', *arguments, f'--workdir={workdir}',
        f'--compilation_cache={cache}',
        *(f'--config.{field}={value}' for field, value in (FIELDS | fields).items()),
    ]  # fmt: skip
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '2'}
    env.pop('JAX_COMPILATION_CACHE_DIR', None)
    with (workdir.parent / f'{workdir.name}.log').open('ab') as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
        )


def finish(processes, workdir):
    """Waits until all are done; ends the program if one fails."""
    end = time.monotonic() + LIMIT_SECONDS
    for process in processes:
        try:
            code = process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = 'none: it hangs'
        if code != 0:
            for other in processes:
                other.kill()
            log = workdir.parent / f'{workdir.name}.log'
            sys.exit(f'{" ".join(process.args)}: exit code {code}\n{log.read_text()[-3000:]}')


def kill(process):
    """Kills a process; returns whether it was still at work."""
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def results(workdir):
    """Returns everything that must not depend on kills, as {name: digest or content}.

    Raises:
      ValueError: if something half written is left.
    """
    import numpy as np
    import orbax.checkpoint as ocp

    found = {}
    for path in sorted(workdir.rglob('*')):
        name = path.relative_to(workdir).as_posix()
        if 'tmp' in path.name or path.name.endswith('.damaged'):
            raise ValueError(f'{name} was left')
        if path.parent.name == 'eval' and path.suffix == '.json':
            found[name] = without_circumstances(json.loads(path.read_text()))
        elif path.suffix == '.npz':
            with np.load(path, allow_pickle=False) as arrays:
                found[name] = {key: digest(arrays[key]) for key in arrays if key != 'record'}
        elif path.parent.name == 'snapshots' and path.is_dir():
            tree = ocp.StandardCheckpointer().restore(path / 'default')
            import jax

            found[name] = [digest(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    return found


def digest(array):
    return hashlib.sha256(f'{array.dtype} {array.shape}'.encode() + array.tobytes()).hexdigest()


def without_circumstances(content):
    """Returns results without times and machines."""
    content.pop('crc32')
    for result in (*content['attacks'], *content['validation']):
        for part in (result, *result.get('stages', ())):
            for name in ('seconds', 'devices', 'versions', 'xla_flags'):
                part.pop(name, None)
        # The transfer set's place.
        result['settings'].pop('path', None)
    return content


def read_all(workdir):
    """Reads what another job might read at this moment."""
    for path in (*workdir.rglob('config.json'), *workdir.rglob('eval/[0-9]*.json')):
        json.loads(path.read_text())


def new_workdir(name, folder, turn, cache):
    """Returns a new workdir, in which AutoAttack finds a run that is trained."""
    workdir = folder / name.replace(' ', '_') / turn
    workdir.mkdir(parents=True)
    if WORK[name][0][0] is AUTOATTACK:
        trained = folder / 'trained'
        if not trained.exists():
            trained.mkdir()
            finish([start(SINGLE, {}, trained, cache)], trained)
        shutil.copytree(trained, workdir, dirs_exist_ok=True)
    return workdir


def undisturbed(name, folder, cache):
    """Does the work once to fill the cache, and once to be measured.

    Returns:
      Its results, and its length in seconds.
    """
    for turn in ('first', 'undisturbed'):
        workdir = new_workdir(name, folder, turn, cache)
        begin = time.monotonic()
        finish([start(*command, workdir, cache) for command in WORK[name]], workdir)
        seconds = time.monotonic() - begin
    return results(workdir), seconds


def killed(name, kills, folder, cache, rng, expected, seconds):
    """Kills the work so many times; returns how many kills each finished workdir survived."""
    survived, total = [], 0
    while total < kills:
        workdir = new_workdir(name, folder, f'killed_{len(survived)}', cache)
        in_this = 0
        while total < kills:
            processes = [start(*command, workdir, cache) for command in WORK[name]]
            after = rng.uniform(0, seconds)
            # Of several, any one or all of them.
            victims = rng.choice([processes, *([process] for process in processes)])
            end = time.monotonic() + after
            while time.monotonic() < end and any(v.poll() is None for v in victims):
                time.sleep(0.01)
            hits = sum(map(kill, victims))
            if not hits:
                finish(processes, workdir)
                break
            total, in_this = total + 1, in_this + 1
            read_all(workdir)
            there = sorted(p.name for p in workdir.rglob('checkpoints/[0-9]*'))
            print(f'{name}: kill {total} after {after:.1f} s; checkpoints {there}', flush=True)
            # Whoever was left alone goes on, and comes to its end only with the others.
            for process in processes:
                kill(process)
        else:
            finish([start(*command, workdir, cache) for command in WORK[name]], workdir)
        found = results(workdir)
        if found != expected:
            differing = sorted(
                key for key in expected | found if expected.get(key) != found.get(key)
            )
            sys.exit(f'{workdir}: differs after {in_this} kills: {", ".join(differing)}')
        survived.append(in_this)
        shutil.rmtree(workdir)
    return survived


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=17, help='of each kind of work (17)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (0)')
    parser.add_argument('--work', choices=WORK, help='one kind of work only')
    parser.add_argument(
        '--within', type=float, default=1, help='part of the length of the work (1)'
    )
    args = parser.parse_args()
    rng = random.Random(args.seed)
    load = os.getloadavg()[0]
    lines = [
        '# Runs killed at random moments',
        '',
        *machine.describe(load, ('jax', 'jaxlib', 'flax', 'orbax-checkpoint')),
        '',
        '| work | length, s | kills | workdirs | kills in each | equal to the undisturbed work |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name in [args.work] if args.work else WORK:
            expected, seconds = undisturbed(name, folder, folder / 'compiled')
            survived = killed(
                name, args.kills, folder, folder / 'compiled', rng, expected, args.within * seconds
            )
            in_each = ', '.join(map(str, survived))
            lines.append(
                f'| {name} | {seconds:.0f} | {args.kills} | {len(survived)} | {in_each} '
                f'| {len(survived)} of {len(survived)} |'
            )
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
