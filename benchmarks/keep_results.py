"""Copies from a study what its report is made of, a few MB, and no weights.

    python benchmarks/keep_results.py DIR docs/results/NAME

The copy has config.json, eval/ and decision planes of each run, and the report in Markdown with
its figures as PNG. TensorBoard's files and the transfer set stay behind.
"""

import pathlib
import shutil
import sys

KEPT = ('config.json', 'eval/*.json', 'eval/*.npz', 'planes/*.npz')
REPORT = ('report/report.md', 'report/*.png')


def keep(study: pathlib.Path, copy: pathlib.Path) -> int:
    """Copies a study's results, and returns the size of the copy in bytes.

    Args:
      study: its workdir.
      copy: a folder; what it holds already is replaced.
    """
    if copy.exists():
        shutil.rmtree(copy)
    runs = [path.parent for path in sorted(study.rglob('config.json'))]
    files = [file for run in runs for pattern in KEPT for file in sorted(run.glob(pattern))]
    files += [file for pattern in REPORT for file in sorted(study.glob(pattern))]
    for file in files:
        # Of attacks that are still under way.
        if file.name.endswith('.stages.npz'):
            continue
        to = copy / file.relative_to(study)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
    return sum(file.stat().st_size for file in copy.rglob('*') if file.is_file())


if __name__ == '__main__':
    source, target = map(pathlib.Path, sys.argv[1:])
    print(f'{target}: {keep(source, target) / 1e6:.1f} MB')
