"""Trains, evaluates and reports on adversarially trained ensembles. See README.md.

python main.py --config=configs/ensemble4adv.py --workdir=DIR
python main.py --mode=study --config=configs/quickstart.py --workdir=DIR
python main.py --mode=evaluate --workdir=DIR
python main.py --mode=blackbox --config=configs/blackbox.py --workdir=DIR
python main.py --mode=report --workdir=DIR
python main.py --mode=planes --workdir=DIR --config.planes.other=OTHER
python main.py --mode=compare --ledgers=DIR/eval/1000.npz,OTHER/eval/1000.npz
python main.py --mode=describe --config=configs/ensemble4adv.py
"""

from collections.abc import Callable

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

import ensadv
from configs import default
from ensadv import command_line, stopping, switches, workdir
from ensadv import config as config_lib
from ensadv.command_line import CONFIGS, fail
from ensadv.errors import ConfigError, StorageError, TrainingError, UserError

FLAGS = flags.FLAGS


def run_one(config: ConfigDict, path: epath.Path, label: str) -> None:
    """Trains one run to its end, evaluating its snapshots on the way unless told not to."""
    import jax

    from ensadv import evaluate, train

    job = evaluate.Job(config, path, label)
    inline = config.eval.inline
    try:
        if inline:
            job.check()
        train.run(config, path, on_snapshot=job.evaluate_pending if inline else None, label=label)
        if inline:
            job.evaluate_pending(wait=True)
    finally:
        job.close()
        # Of no use to the next run, and JAX keeps thousands of programs. On a CPU each takes some
        # of the memory mappings that Linux grants a process, 65,530; without one XLA crashes.
        jax.clear_caches()


def run_study(config: ConfigDict, path: epath.Path) -> None:
    """Makes the study's runs, and a report on them even if some of them fail."""
    from ensadv import blackbox, parallel, study

    write_report = None
    try:
        if parallel.is_main():
            write_report = report_writer()
    except UserError as error:  # training and evaluation do without
        logging.warning('%s; afterwards --mode=report writes it, on any machine', error)

    # All mistakes in the systems are told before the first source is trained.
    run_configs = dict(study.runs(config, CONFIGS))
    seeds = [run_config.seed for run_config in run_configs.values()]
    if 'blackbox' in config.eval.attacks and not config.eval.blackbox_path:
        if config.blackbox.seed in seeds:
            raise ConfigError('blackbox.seed: expected another than those of study.seeds')
        transfer_set = blackbox.make(config, path / 'blackbox', CONFIGS, run_one)
        config.eval.blackbox_path = str(transfer_set)
    finished, failures = study.run(config, path, CONFIGS, run_one)
    pair = study.pair_of_planes(config)
    drawn = parallel.agree(bool(write_report and pair))
    if drawn and {path / name for name in pair} <= set(finished):
        try:
            with parallel.failing_together():
                draw_planes(run_configs[pair[0]], path, pair)
        except UserError as error:  # the report is worth having without them
            logging.error('no decision planes: %s', error)
    if write_report and finished:
        write_report(path)
    if failures:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in failures.items())
        raise TrainingError(f'not in the report: {reasons}')


def draw_planes(config: ConfigDict, root: epath.Path, pair: tuple[str, str]) -> None:
    """Draws the decision planes of two runs of a study."""
    from ensadv import decision_planes

    config.planes.other = str(root / pair[1])
    decision_planes.run(config, root / pair[0])


def report_writer() -> Callable[[epath.Path], epath.Path]:
    """Returns `report.write`; what it needs beyond training is told before that, and not after."""
    try:
        from ensadv import report
    except ImportError as error:
        raise UserError(
            f'the report needs a package that is missing ({error}): pip install -r requirements.txt'
        ) from error
    return report.write


def compare() -> None:
    """Prints how two ledgers differ, example by example."""
    from ensadv import significance

    paths = [workdir.absolute(path) for path in FLAGS.ledgers or ()]
    if len(paths) != 2:
        raise UserError('--ledgers: expected two files, as in --ledgers=A/eval/9.npz,B/eval/9.npz')
    ledgers = [workdir.read_ledger(path) for path in paths]
    comparisons = significance.compare(*ledgers)
    for name, path in zip(('first', 'second'), paths, strict=True):
        print(f'{name}: {path}')
    print(f'\n{significance.comparison_table(comparisons, ("first", "second"))}')


def describe(config: ConfigDict) -> None:
    """Prints what the config amounts to."""
    from ensadv import data, describe, parallel

    parallel.take_device(config.device)
    record = workdir.read_record(command_line.workdir_path()) if FLAGS.workdir else None
    if record is not None and record['config']['data']['name'] == config.data.name:
        dataset = record['dataset']
        held_out = dataset.get('num_validation', 0)
        dataset = dataset | {'num_train': dataset['num_train'] + held_out}
    else:
        name, group = config.data.name, config.data
        shape, classes = data.spec(name, data_dir=group.data_dir, path=group.path)
        num_train, num_test = data.sizes(name, path=group.path)
        # Sizes do not depend on the pixels' mean and deviation.
        dataset = {'name': name, 'image_shape': shape, 'num_classes': classes}
        dataset |= {'mean': [0.0], 'std': [1.0], 'num_train': num_train, 'num_test': num_test}
    describe.check(config, dataset, CONFIGS)
    dataset['num_train'] -= config.data.validation_examples
    print(describe.describe(config, dataset))


def run(mode: str) -> None:
    """Does one job.

    Raises:
      UserError, TrainingError: see ensadv/errors.py.
    """
    if mode == 'compare':
        compare()
        return
    if mode == 'report':
        if not FLAGS.workdir:
            raise UserError('--workdir: needed, the directory whose runs are reported on')
        report_writer()(command_line.workdir_path(to_write=True))
        return
    config = command_line.config()
    switches.pin()
    for group, field in (
        (config.eval, 'blackbox_path'), (config.eval, 'indices'), (config.data, 'path')
    ):  # fmt: skip
        if group[field]:  # a run keeps it, and may go on in another directory
            group[field] = str(workdir.absolute(group[field]))
    if config.ensemble.members_from and mode != 'evaluate':
        raise ConfigError(f'ensemble.members_from: only for --mode=evaluate, found --mode={mode}')
    if mode == 'describe':
        describe(config)
        return
    if not FLAGS.workdir:
        raise UserError('--workdir: needed, the directory that is written to, as --workdir=runs/1')
    if mode == 'train' and config.study.systems and config.system == 'custom':
        raise ConfigError('study.systems: names systems, so this is for --mode=study')
    from ensadv import compilation_cache, parallel

    compilation_cache.enable(FLAGS.compilation_cache)
    path = command_line.workdir_path(to_write=True)
    parallel.take_device(config.device)
    parallel.initialize()
    with parallel.together():
        parallel.check_device(config.device)
        command = {'mode': mode, 'workdir': str(path), 'version': ensadv.__version__}
        resolved = config_lib.to_dict(config.copy_and_resolve_references())
        parallel.check_same('the command', command | {'config': resolved})
        parallel.check_same('XLA_FLAGS or a switch of JAX', switches.of(switches.recorded()))
        compute(mode, config, path)
        if mode != 'planes' and parallel.is_main():
            print(command_line.where())


def compute(mode: str, config: ConfigDict, path: epath.Path) -> None:
    """Does a job that needs JAX, on all processes."""
    if mode == 'study':
        run_study(config, path)
    elif mode == 'blackbox':
        from ensadv import blackbox

        blackbox.make(config, path, CONFIGS, run_one)
    elif mode == 'planes':
        from ensadv import decision_planes

        decision_planes.run(config.copy_and_resolve_references(), path)
    else:
        from ensadv import evaluate

        config = config.copy_and_resolve_references()
        if mode == 'evaluate':
            evaluate.run(config, path)
        else:
            run_one(config, path, config.system)
            evaluate.show(path)


def main(argv: list[str]) -> None:
    command_line.set_up_logging()
    if len(argv) > 1:
        fail(str(command_line.unexpected(argv[1])))
    try:
        run(FLAGS.mode)
    except UserError as error:
        fail(str(error))
    except (TrainingError, StorageError) as error:
        fail(str(error), code=1)
    except OSError as error:  # lost storage; --verbosity=1 shows where
        logging.debug('', exc_info=True)
        fail(f'{error}. What is on disk is whole: the same command goes on', code=1)
    except stopping.Stopped as stopped:
        fail(str(stopped), code=stopped.exit_code)


def parse(argv: list[str]) -> list[str]:
    """Parses the command line, and waits where that says so."""
    stopping.install()
    try:
        return command_line.parse(argv, default.get_config)
    except stopping.Stopped as stopped:
        fail(str(stopped), code=stopped.exit_code)


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
