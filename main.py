"""Trains, evaluates and describes adversarially trained ensembles. See README.md.

python main.py --config=configs/ensemble4adv.py --workdir=DIR
python main.py --mode=study --config=configs/quickstart.py --workdir=DIR
python main.py --mode=evaluate --workdir=DIR
python main.py --mode=describe --config=configs/ensemble4adv.py
"""

import logging as python_logging
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from configs import default
from ensadv import config as config_lib
from ensadv import workdir
from ensadv.errors import ConfigError, TrainingError, UserError

MODES = ('train', 'evaluate', 'study', 'describe')
CONFIGS = epath.Path(__file__).parent / 'configs'
FLAGS = flags.FLAGS
flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
flags.DEFINE_string('workdir', None, 'Directory of the run or study; may be on gs://.')


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr: 2 for the user's mistakes, 1 for faults."""
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake there is one line and exit code 2.

    Without --config the config is the one of the workdir, so that a run that exists already can be
    evaluated and described by naming its workdir alone.
    """
    try:
        record = None
        if not any(arg.lstrip('-').partition('=')[0] == 'config' for arg in argv[1:]):
            FLAGS(argv, known_only=True)
            if FLAGS.workdir:
                record = workdir.read_record(epath.Path(FLAGS.workdir).expanduser())
            FLAGS.unparse_flags()
        if record is None:
            config_flags.DEFINE_config_file('config', None, 'File of the config.')
        else:
            stored = config_lib.from_dict(record['config'], default.get_config())
            config_flags.DEFINE_config_dict('config', stored, 'Overrides of the stored config.')
        rest = FLAGS(argv)
        # A config file that cannot be loaded says so when something of it is asked for.
        _ = FLAGS.config and FLAGS.config.is_locked
        return rest
    except (UserError, flags.Error) as error:
        fail(str(error))
    # Whatever a config file or an override does wrong ends up here.
    except Exception as error:
        fields = known_fields(default.get_config())
        for arg in argv[1:]:
            name, dot, field = arg.lstrip('-').partition('=')[0].partition('.')
            if name == 'config' and dot and field not in fields:
                fail(f'{arg}: unknown config field {field}{config_lib.nearest(field, fields)}')
        text = str(error)
        # A message of ml_collections can hold the whole config between a key and a hint.
        fail('--config: ' + (text if len(text) < 400 else f'{text[:90]} ... {text[-60:]}'))


def known_fields(config: ConfigDict) -> set[str]:
    return set(config_lib.flatten(config_lib.to_dict(config)))


def load_config() -> ConfigDict:
    """Returns the validated config of the command line.

    Raises:
      ConfigError: naming the field.
    """
    config = FLAGS.config
    if config is None:
        raise ConfigError('--config: needed, as in --config=configs/ensemble4adv.py')
    config = config.copy_and_resolve_references()
    found, known = known_fields(config), known_fields(default.get_config())
    for field in sorted(found - known):
        raise ConfigError(f'unknown config field {field}{config_lib.nearest(field, known)}')
    for field in sorted(known - found):
        raise ConfigError(f'{field}: missing; a config is a diff on configs/default.py')
    config_lib.validate(config)
    return config


def run_one(config: ConfigDict, path: epath.Path, label: str) -> None:
    """Trains one run to its end, evaluating its snapshots on the way unless told not to."""
    from ensadv import evaluate, train

    job = evaluate.Job(config, path, label)
    try:
        inline = config.eval.inline
        train.run(config, path, on_snapshot=job.evaluate_pending if inline else None, label=label)
    finally:
        job.close()


def describe(config: ConfigDict) -> None:
    """Prints what the config amounts to."""
    from ensadv import data, describe

    record = workdir.read_record(epath.Path(FLAGS.workdir)) if FLAGS.workdir else None
    if record is not None and record['config']['data']['name'] == config.data.name:
        dataset = record['dataset']
    else:
        name, group = config.data.name, config.data
        shape, classes = data.spec(name, data_dir=group.data_dir, path=group.path)
        # Sizes do not depend on the pixels' mean and deviation.
        dataset = {'name': name, 'image_shape': shape, 'num_classes': classes}
        dataset |= {'mean': [0.0], 'std': [1.0]}
    print(describe.describe(config, dataset))


def set_up_logging() -> None:
    """Shows what this program and CLU log, and the warnings of everything else."""

    def ours(record: python_logging.LogRecord) -> bool:
        parts = Path(record.pathname).parts
        return (
            record.levelno >= python_logging.WARNING
            or 'ensadv' in parts
            or parts[-1] == 'logging_writer.py'
        )

    logging.get_absl_handler().addFilter(ours)
    # On a terminal the progress bars say it all.
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING if sys.stderr.isatty() else logging.INFO)


def main(argv: list[str]) -> None:
    set_up_logging()
    if len(argv) > 1:
        fail(f'unexpected argument {argv[1]!r}; flags begin with --')
    try:
        config = load_config()
        if FLAGS.mode == 'describe':
            describe(config)
            return
        if not FLAGS.workdir:
            raise UserError('--workdir: needed, the directory that the run writes to')
        path = epath.Path(FLAGS.workdir).expanduser()
        if FLAGS.mode == 'study':
            from ensadv import study

            study.run(config, path, CONFIGS, run_one)
        elif FLAGS.mode == 'evaluate':
            from ensadv import evaluate

            evaluate.run(config, path)
        else:
            run_one(config, path, config.system)
    except UserError as error:
        fail(str(error))
    except TrainingError as error:
        fail(str(error), code=1)


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
