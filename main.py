"""Trains, evaluates and reports on adversarially trained ensembles. See README.md.

python main.py --config=configs/ensemble4adv.py --workdir=DIR
python main.py --mode=study --config=configs/quickstart.py --workdir=DIR
python main.py --mode=evaluate --workdir=DIR
python main.py --mode=audit --workdir=DIR
python main.py --mode=members --workdir=DIR
python main.py --mode=evaluate --model=FILE.py:predict --workdir=DIR --config.data.name=digits
python main.py --mode=blackbox --config=configs/blackbox.py --workdir=DIR
python main.py --mode=report --workdir=DIR
python main.py --mode=planes --workdir=DIR --config.planes.other=OTHER
python main.py --mode=compare --ledgers=DIR/eval/1000.npz,OTHER/eval/1000.npz
python main.py --mode=export --workdir=DIR --to=FOLDER
python main.py --mode=import --from=FILE.pt --architecture=WRN-28-10-silu --workdir=DIR
python main.py --mode=describe --config=configs/ensemble4adv.py
"""

from absl import app

from configs import default
from ensadv import command_line, python_files
from ensadv.command_line import CONFIGS, FLAGS
from ensadv.runtime import switches


def run(mode: str) -> None:
    """Does one job. Each imports what it needs, and the first two do without JAX.

    Raises:
      UserError, TrainingError, StorageError: see ensadv/errors.py.
    """
    if mode == 'compare':
        from ensadv.report import comparison

        print(comparison.of_ledgers(FLAGS.ledgers or ()))
        return
    if mode == 'report':
        from ensadv.report import write

        write.write(command_line.workdir_path(to_write=True))
        return
    config = command_line.config()
    switches.pin()
    if mode == 'describe':
        from ensadv import describe

        print(describe.run(config, command_line.workdir_path() if FLAGS.workdir else None, CONFIGS))
        return
    path = command_line.workdir_path(to_write=True)
    from ensadv import build, study
    from ensadv.evaluation import any_model, evaluate
    from ensadv.exchange import export, imports
    from ensadv.runtime import compilation_cache, distributed

    def model():
        found = command_line.model_path()
        return found and any_model.Source(*python_files.function(found))

    def evaluation(config, path):
        if source := model():
            any_model.run(config, path, source)
        else:
            evaluate.run(config, path)

    jobs = {
        'train': study.run_and_show,
        'evaluate': evaluation,
        'study': lambda config, path: study.run(config, path, CONFIGS),
        'blackbox': lambda config, path: study.make_transfer_set(config, path, CONFIGS),
        'audit': lambda config, path: study.make_audit(config, path, model()),
        'members': lambda config, path: study.measure_members(config, path, model()),
        'planes': study.draw_planes,
        'export': lambda config, path: export.run(config, path, command_line.folder_to_write()),
        'import': lambda config, path: imports.run(
            config, path, FLAGS['from'].value, FLAGS.architecture
        ),
    }
    compilation_cache.enable(FLAGS.compilation_cache)
    with build.on_all_processes(mode, config, path):
        jobs[mode](config, path)
        if mode not in ('audit', 'members', 'planes', 'export') and distributed.is_main():
            print(command_line.closing_lines())


def main(argv: list[str]) -> None:
    command_line.set_up_logging()
    with command_line.error_exits():
        if len(argv) > 1:
            raise command_line.unexpected_argument(argv[1])
        run(FLAGS.mode)


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; with --config.eval.follow this waits for the run to begin."""
    with command_line.error_exits():
        return command_line.parse(argv, default.get_config)


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
