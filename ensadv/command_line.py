"""The command line: flags, the config with its overrides, what is shown, and how it ends."""

import importlib.machinery
import importlib.util
import logging as python_logging
import os
import re
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ensadv import config as config_lib
from ensadv import terminal, workdir
from ensadv.errors import ConfigError, UserError

MODES = ('train', 'evaluate', 'study', 'blackbox', 'compare', 'report', 'planes', 'describe')
WITHOUT_CONFIG = ('compare', 'report')
FLAGS = flags.FLAGS
flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
flags.DEFINE_string(
    'config',
    None,
    'File of the config. --config.FIELD=VALUE sets a field. Default: the config of --workdir.',
)
flags.DEFINE_string('workdir', None, 'Directory of the run or study; may be on gs://.')
flags.DEFINE_string(
    'compilation_cache',
    None,
    'Directory that keeps compiled programs, for later starts; may be on gs://. Default: '
    "~/.cache/ensadv/compiled. '' keeps none. JAX_COMPILATION_CACHE_DIR goes before.",
)
flags.DEFINE_list('ledgers', None, 'For --mode=compare: two files eval/<step>.npz.')

_OVERRIDE = re.compile(r'--?(?:no)?config\.([^=]*)')
_LONGEST_MESSAGE = 600


class _FractionParser(flags.FloatParser):
    """Takes 8/255 too, which is how everyone writes it."""

    def convert(self, argument: int | float | str) -> float:
        if not isinstance(argument, str):
            return super().convert(argument)
        numerator, slash, denominator = argument.partition('/')
        if slash and not super().convert(denominator):
            raise ValueError('division by zero')
        return super().convert(numerator) / (super().convert(denominator) if slash else 1)


config_flags.register_flag_parser_for_type(float, _FractionParser())


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr: 2 for the user's mistakes, 1 for faults."""
    line = ' '.join(message.split())
    # What a terminal would obey instead of showing it.
    line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line)
    if len(line) > _LONGEST_MESSAGE:
        # The end often says what to do.
        line = f'{line[: _LONGEST_MESSAGE - 200]} ... {line[-195:]}'
    print(f'error: {line}', file=sys.stderr)
    sys.exit(code)


def workdir_path(to_write: bool = False) -> epath.Path:
    """Returns --workdir, absolute.

    Args:
      to_write: whether it is made if it is not there.

    Raises:
      UserError: if it is no directory and cannot become one.
    """
    path = workdir.absolute(FLAGS.workdir)
    if '://' not in FLAGS.workdir and (reason := _no_directory(path, to_write)):
        raise UserError(f'--workdir={FLAGS.workdir}: {reason}')
    return path


def _no_directory(path: epath.Path, to_write: bool) -> str:
    """Returns why a path on this machine is no directory and cannot become one; '' if it can."""
    for part in (path, *path.parents):
        try:
            found = os.stat(part)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f'cannot be a directory ({error.strerror})'
        if not stat.S_ISDIR(found.st_mode):
            return f'{"" if part == path else f"{part} "}is a file, expected a directory'
        if to_write and part != path and not os.access(part, os.W_OK | os.X_OK):
            return f'cannot be made: no permission to write in {part}'
        break
    return ''


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
    try:
        # Or the value of --config.epsilon 8/255 would end the flags.
        FLAGS.set_gnu_getopt()
        rest = FLAGS(argv, known_only=True)
        overrides = [(arg, m[1]) for arg in rest[1:] if (m := _OVERRIDE.match(arg))]
        found = _without_overrides(get_default)
        if found is None and overrides:
            where = f', and no run is in {FLAGS.workdir} yet' if FLAGS.workdir else ''
            raise ConfigError(f'--config: needed for {overrides[0][0]}{where}')
        if found is not None:
            known = config_lib.field_types(found)
            for arg, field in overrides:
                if field not in known:
                    hint = config_lib.nearest(field, known)
                    raise ConfigError(f'{arg}: unknown config field {field}{hint}')
                # ml_collections would join the two; of other fields the last one counts.
                if known[field] is tuple and sum(field == other for _, other in overrides) > 1:
                    raise ConfigError(f'{arg}: {field} is given more than once')
            # From here on --config is the config itself.
            del FLAGS.config
            config_flags.DEFINE_config_dict('config', found, sys_argv=rest)
        return FLAGS(rest)
    except (UserError, flags.Error) as error:
        fail(str(error))
    except Exception as error:  # of ml_collections, which checks little
        fail(f'{" ".join(argv[1:])}: {type(error).__name__}: {error}')


def _without_overrides(get_default: Callable[[], ConfigDict]) -> ConfigDict | None:
    """Returns the config of --config, or else of the run in --workdir, if there is one."""
    if FLAGS.config is not None:
        return _run_config_file(FLAGS.config, get_default)
    if not FLAGS.workdir or FLAGS.mode in WITHOUT_CONFIG:
        return None
    path = workdir_path()
    record = workdir.read_record(path)
    if record is None:
        return None
    try:
        return config_lib.from_dict(record['config'], get_default())
    except ConfigError as error:
        raise ConfigError(f'{path / "config.json"}: {error}') from error


def _run_config_file(path: str, get_default: Callable[[], ConfigDict]) -> ConfigDict:
    """Returns what get_config() of a file returns; in FILE:TEXT the text is its argument.

    Raises:
      ConfigError: whatever the file does wrong.
    """
    file, colon, text = path.partition(':')
    if not Path(file).is_file():
        raise ConfigError(f'--config={path}: found no such file')
    loader = importlib.machinery.SourceFileLoader('config_file', file)
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location(loader.name, file, loader=loader)
    )
    sys.modules[loader.name] = module  # where its dataclasses look for it
    try:
        loader.exec_module(module)
        config = module.get_config(*([text] if colon else []))
        if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
            kind = type(config).__name__
            raise ConfigError(f'get_config() has to return a ConfigDict, found {kind}')
        config_lib.check_fields(config, get_default())
    except ConfigError as error:
        raise ConfigError(f'--config={path}: {error}') from error
    except (Exception, SystemExit) as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == file]
        where = f'line {lines[-1]}: ' if lines else ''
        raise ConfigError(f'--config={path}: {where}{type(error).__name__}: {error}') from error
    return config


def config() -> ConfigDict:
    """Returns the validated config of the command line, with its references unresolved.

    Raises:
      ConfigError: naming the field.
    """
    found = FLAGS.config
    if found is None:
        raise ConfigError('--config: needed, as in --config=configs/ensemble4adv.py')
    try:
        found.to_dict()
    except Exception as error:  # whatever the user's own references to other fields compute
        cause = f'{type(error).__name__}: {error}'
        raise ConfigError(
            f'--config: a reference to a field cannot be computed ({cause})'
        ) from error
    config_lib.validate(found)
    return found


def set_up_logging() -> None:
    """Shows what this program logs, and the warnings of everything else."""

    def ours(record: python_logging.LogRecord) -> bool:
        parts = Path(record.pathname).parts
        return (
            # Orbax and CLU log each thread's part of an error that they raise as well.
            (record.levelno >= python_logging.WARNING and not {'orbax', 'clu'} & set(parts))
            # Not by name: an environment may lie in a checkout called ensadv.
            or Path(__file__).parent in Path(record.pathname).parents
        )

    logging.get_absl_handler().addFilter(ours)
    # So do its unfinished writes, when they find that nobody waits for them any more.
    sys.unraisablehook = lambda args: logging.debug('%s', args.err_msg, exc_info=args.exc_value)
    # And TensorBoard's thread, whose error the next writing raises.
    threading.excepthook = _tell_of_thread
    # Where progress bars are drawn they say it all.
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING if terminal.draws_bars() else logging.INFO)


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    if type(args.thread).__module__.startswith('tensorboard.'):
        logging.debug('%s', args.thread, exc_info=args.exc_value)
    else:
        threading.__excepthook__(args)
