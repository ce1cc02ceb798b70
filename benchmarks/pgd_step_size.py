"""Which learning rate makes Adam-PGD strongest: its accuracy after 20 steps, lowest is best.

  python benchmarks/pgd_step_size.py --workdir=DIR [--n=1000]

DIR is a finished run. Evaluates its last snapshot with PGD20 at several rates, and with IFGSM20 for
comparison, on the first n test images, and prints a Markdown table. Nothing in DIR changes.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from etils import epath

from configs import default
from ensadv import build, checkpoints, config, evaluate, workdir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--n', type=int, default=1000)
    args = parser.parse_args()
    path = epath.Path(pathlib.Path(args.workdir).absolute())
    record = workdir.read_record(path)
    run = config.from_dict(record['config'], default.get_config()).copy_and_resolve_references()
    dataset = build.dataset(run)
    run.eval.num_examples = min(args.n, len(dataset.label_test))
    evaluator = evaluate.Evaluator(run, dataset)
    snapshots = checkpoints.open_snapshots(path)
    step = snapshots.steps()[-1]
    variables = snapshots.restore(step, evaluator.init_variables())
    # DESIGN's 1/255, 2/255, 4/255 and 0.1 for epsilon = 8/255, in proportion.
    rates = {'eps/8': 1 / 8, 'eps/4': 1 / 4, 'eps/2': 1 / 2, '0.1 * 255/8 eps': 0.1 * 255 / 8}
    print(f'{run.system}, {run.data.name}, step {step}, epsilon {run.epsilon:.4g}, ', end='')
    print(f'n = {evaluator.num_examples}, seed {run.eval.seed}\n')
    print('| attack | rate | worst iterate % | last iterate % |\n| --- | --- | --: | --: |')
    for kind in ('pgd', 'ifgsm'):
        for name, factor in rates.items():
            run.eval[f'{kind}_step_size'] = min(factor * run.epsilon, 1.0)
            settings = build.evaluation_settings(run, f'{kind}20')
            worst, last = evaluator.evaluate(variables, settings, f'{kind}20 {name}')
            accuracies = [f'{100 * (margin > 0).mean():.1f}' for margin in (worst, last)]
            print(f'| {kind}20 | {name} | {" | ".join(accuracies)} |', flush=True)


if __name__ == '__main__':
    main()
