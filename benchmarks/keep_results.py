"""Copies from a study what its report is made of, but no weights, and makes the report.

    python benchmarks/keep_results.py DIR docs/results/NAME  # in the repository's root

The copy has of each finished run config.json, the results of all snapshots, the ledgers of the best
and the last, and decision planes. A run takes half a MB, a pair of planes 1 to 3 MB. Runs that the
copy has already stay: a study may be made on several machines, some of its runs on each. The report
is of all of them, in Markdown, with its figures as PNG.
"""

import json
import pathlib
import shutil
import subprocess
import sys

from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ensadv.attacks import registry
from ensadv.storage import files

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEPT_OF_REPORT = ('.md', '.png')


def keep(study: pathlib.Path, copy: pathlib.Path) -> int:
    """Copies a study's finished runs, and returns the size of the copy in bytes.

    Args:
      study: its workdir.
      copy: a folder; what it has of these runs is replaced.
    """
    for run in (path.parent for path in sorted(study.glob('*/config.json'))):
        record = files.read_json(epath.Path(run / 'config.json'))
        if not is_finished(run, record['config']):
            continue
        to = copy / run.name
        shutil.rmtree(to, ignore_errors=True)
        # A finished run has kept the best and the last snapshot.
        steps = [snapshot.name for snapshot in run.glob('snapshots/[0-9]*')]
        ledgers = [f'eval/{step}[._]*npz' for step in steps]
        for pattern in ('eval/*.json', *ledgers, 'planes/*.npz'):
            for file in run.glob(pattern):
                (to / file.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to / file.parent.name / file.name)
        # The paths of one machine mean nothing on another.
        text = json.dumps(record).replace(f'{study.resolve().parent}/', '')
        files.write_json(epath.Path(to / 'config.json'), json.loads(text))
    report(copy)
    return sum(file.stat().st_size for file in copy.rglob('*') if file.is_file())


def is_finished(run: pathlib.Path, config: dict) -> bool:
    """Returns whether a run's last snapshot has all attacks that its config names."""
    file = run / f'eval/{config["train"]["steps"]}.json'
    if not file.exists():
        return False
    made = {result['name'] for result in json.loads(file.read_text())['attacks']}
    named = [*config['eval']['attacks'], *config['eval']['long_attacks']]
    return made >= {registry.entry(text).name for text in named}


def report(copy: pathlib.Path) -> None:
    """Makes the report of the runs in a copy, and keeps what can be read in a repository."""
    command = [sys.executable, 'main.py', '--mode=report', f'--workdir={copy}']
    subprocess.run(command, cwd=ROOT, check=True)
    for file in (ROOT / copy / 'report').iterdir():
        if file.suffix not in KEPT_OF_REPORT:
            file.unlink()


if __name__ == '__main__':
    source, target = map(pathlib.Path, sys.argv[1:])
    print(f'{target}: {keep(source, target) / 1e6:.1f} MB')
