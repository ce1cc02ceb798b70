"""The command line: flags, the config with its overrides, what is shown, and how it ends."""

import logging as python_logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from ensadv import config as config_lib
from ensadv import workdir
from ensadv.errors import ConfigError, UserError

MODES = ('train', 'evaluate', 'study', 'blackbox', 'compare', 'report', 'planes', 'describe')
FLAGS = flags.FLAGS
flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
flags.DEFINE_string('workdir', None, 'Directory of the run or study; may be on gs://.')
flags.DEFINE_string(
    'compilation_cache',
    None,
    'Directory that keeps compiled programs, for later starts; may be on gs://. Default: '
    "~/.cache/ensadv/compiled. '' keeps none. JAX_COMPILATION_CACHE_DIR goes before.",
)
flags.DEFINE_list('ledgers', None, 'For --mode=compare: two files eval/<step>.npz.')


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr: 2 for the user's mistakes, 1 for faults."""
    print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)


def workdir_path() -> epath.Path:
    """Returns --workdir, absolute."""
    return workdir.absolute(FLAGS.workdir)


def parse(argv: list[str], get_default: Callable[[], ConfigDict]) -> list[str]:
    """Parses the command line; a mistake there is one line and exit code 2.

    Without --config the config is the one of the workdir, so that a run that exists already can be
    evaluated and described by naming its workdir alone.

    Args:
      argv: the command line.
      get_default: gives the config whose fields are all there are.

    Returns:
      What is left of the command line.
    """
    # 8/255 is how everyone writes it.
    fraction = r'(--?config\.[\w.]+=)(\d+\.?\d*)/(\d+\.?\d*)'
    argv = [
        f'{m[1]}{float(m[2]) / float(m[3])}'
        if (m := re.fullmatch(fraction, arg)) and float(m[3])
        else arg
        for arg in argv
    ]
    try:
        record = None
        if not any(arg.lstrip('-').partition('=')[0] == 'config' for arg in argv[1:]):
            FLAGS(argv, known_only=True)
            if FLAGS.workdir:
                record = workdir.read_record(workdir_path())
            overrides = [arg for arg in argv[1:] if arg.lstrip('-').startswith('config.')]
            if record is None and overrides:
                where = f', and no run is in {FLAGS.workdir} yet' if FLAGS.workdir else ''
                raise ConfigError(f'--config: needed for {overrides[0]}{where}')
            FLAGS.unparse_flags()
        if record is None:
            config_flags.DEFINE_config_file('config', None, 'File of the config.')
        else:
            stored = config_lib.from_dict(record['config'], get_default())
            config_flags.DEFINE_config_dict('config', stored, 'Overrides of the stored config.')
        rest = FLAGS(argv)
        # A config file that cannot be loaded says so when something of it is asked for.
        _ = FLAGS.config and FLAGS.config.is_locked
        return rest
    except UserError as error:
        fail(str(error))
    except flags.Error as error:
        fail(_shortened(str(error)))
    # Whatever a config file or an override does wrong ends up here.
    except Exception as error:
        fields = known_fields(get_default())
        for arg in argv[1:]:
            name, dot, field = arg.lstrip('-').partition('=')[0].partition('.')
            if name == 'config' and dot and field not in fields:
                fail(f'{arg}: unknown config field {field}{config_lib.nearest(field, fields)}')
        fail(f'--config: {_shortened(str(error))}')


def _shortened(message: str) -> str:
    """Returns what a user needs of a message by ml_collections."""
    # It can hold the traceback of the config file, whose last line says what is wrong there,
    message, traceback, rest = message.partition('Traceback (most recent call last):')
    message += rest.strip().splitlines()[-1] if traceback else ''
    # and the whole config, between a key and a hint.
    return message if len(message) < 400 else f'{message[:90]} ... {message[-60:]}'


def known_fields(config: ConfigDict) -> set[str]:
    """Returns the names of a config's fields, as in 'train.steps'."""
    return set(config_lib.flatten(config_lib.to_dict(config)))


def config(get_default: Callable[[], ConfigDict]) -> ConfigDict:
    """Returns the validated config of the command line, with its references unresolved.

    Raises:
      ConfigError: naming the field.
    """
    found_config = FLAGS.config
    if found_config is None:
        raise ConfigError('--config: needed, as in --config=configs/ensemble4adv.py')
    found, known = known_fields(found_config), known_fields(get_default())
    for field in sorted(found - known):
        raise ConfigError(f'unknown config field {field}{config_lib.nearest(field, known)}')
    for field in sorted(known - found):
        raise ConfigError(f'{field}: missing; a config is a diff on configs/default.py')
    config_lib.validate(found_config)
    return found_config


def set_up_logging() -> None:
    """Shows what this program and CLU log, and the warnings of everything else."""

    def ours(record: python_logging.LogRecord) -> bool:
        parts = Path(record.pathname).parts
        return (
            # Orbax logs each thread's part of an error that it raises as well.
            (record.levelno >= python_logging.WARNING and 'orbax' not in parts)
            or 'ensadv' in parts
            or parts[-1] == 'logging_writer.py'
        )

    logging.get_absl_handler().addFilter(ours)
    # So do its unfinished writes, when they find that nobody waits for them any more.
    sys.unraisablehook = lambda args: logging.debug('%s', args.err_msg, exc_info=args.exc_value)
    # On a terminal the progress bars say it all.
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING if sys.stderr.isatty() else logging.INFO)
