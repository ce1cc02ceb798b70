"""README.md and docs/: links lead somewhere, commands parse, fields exist, examples run."""

import doctest
import importlib
import re
import shlex

import pytest
from absl import flags
from conftest import ROOT
from ml_collections import config_flags

from configs import default
from ensadv import command_line, config_checks
from ensadv import config as config_lib
from ensadv.attacks import registry

README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md'))]
CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))
BLOCK = re.compile(r'^```([^\n]*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
GROUPS = [name for name, kind in default.get_config().items() if hasattr(kind, 'keys')]
FIELDS = config_lib.field_types(default.get_config())
UNWRITTEN = 'configs/ensemble3adv.py'  # the reader writes it
by_name = pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)


def prose(page):
    """Returns a page's text without its blocks of code."""
    return BLOCK.sub('', page.read_text())


def anchors(page):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def commands(text):
    """Returns the arguments of each `python main.py` in a text, as the shell splits them."""
    text = text.replace('\\\n', ' ')
    found = re.findall(r'python main\.py((?: +(?:"[^"\n]*"|[^\s"`|&])+)*)', text)
    return [shlex.split(line.replace('...', '')) for line in found]


def parse(arguments):
    """Parses a command as main.py does, and returns its config.

    Raises:
      flags.Error, ValueError: for what main.py refuses.
    """
    config, overrides = default.get_config(), []
    for argument in arguments:
        name, _, value = argument.removeprefix('--').partition('=')
        field = name.removeprefix('config.')
        if name not in command_line.FLAGS and field not in FIELDS:
            raise flags.UnrecognizedFlagError(name)
        # A word in capitals stands for what the reader puts there.
        if re.search(r'[A-Z]{4}', value) or value == UNWRITTEN:
            continue
        if name == 'config':
            module = importlib.import_module(value.removesuffix('.py').replace('/', '.'))
            config = module.get_config()
        elif field in FIELDS:
            overrides.append(argument)
        else:
            command_line.FLAGS[name].parser.parse(value)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=overrides)
    values(['main.py', *overrides])
    return values.config


def test_readme_is_short():
    """Its tables are looked up, the rest is read."""
    text = re.sub(r'^\|.*', '', README.read_text(), flags=re.MULTILINE)
    assert len(text.split()) <= 650


@by_name
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)', prose(page))
    for link in links:
        assert '://' not in link, f'{link}: nobody checks whether it is still there'
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_reached_from_readme():
    linked = {(ROOT / link).resolve() for link in re.findall(r'\]\((docs/\w+\.md)', prose(README))}
    assert linked == set(PAGES[1:])


@pytest.mark.parametrize('page', [*PAGES, *CONFIGS, ROOT / 'main.py'], ids=lambda path: path.name)
def test_commands_parse(page):
    for arguments in commands(page.read_text()):
        config_checks.validate(parse(arguments))


def test_commands_that_do_not_parse_are_found():
    text = 'python main.py --config=configs/small.py \\\n    --config.train.stpes=5\nand more'
    (arguments,) = commands(text)
    assert arguments[-1] == '--config.train.stpes=5'
    for wrong in ('--config.train.stpes=5', '--config.epsilon=much', '--mode=trian', '--wrkdir=a'):
        with pytest.raises((flags.Error, ValueError)):
            parse(['--config=configs/small.py', wrong])


@by_name
def test_fields_exist(page):
    """What is in `code` and looks like a config field, and what follows --config."""
    text = page.read_text()
    named = re.findall(r'--config\.([a-z_.]+\b)', text)
    code = re.findall(r'`([^`\n]+)`', prose(page))
    named += [m[1] for c in code if (m := re.match(rf'((?:{"|".join(GROUPS)})\.[a-z_.]+\b)', c))]
    # Files and modules are no fields.
    unknown = [name for name in named if not name.endswith(('.py', '.npz', '.csv', '.md'))]
    groups = {field.rpartition('.')[0] for field in FIELDS}
    assert [name for name in unknown if name not in FIELDS and name not in groups] == []


@by_name
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    """Blocks that begin with ```python run; others are to be put somewhere first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, 'KINDS', dict(registry.KINDS))  # an example adds one
    for kind, code in BLOCK.findall(page.read_text()):
        if kind.startswith('python'):
            compiled = compile(code, page.name, 'exec')
            if kind == 'python run':
                exec(compiled, {})
    if page == README:
        robust, clean = map(
            float, re.findall(r'(?:robust|clean) +(\d+\.\d+) %', capsys.readouterr().out)
        )
        assert 80 < clean < 90
        assert 10 < robust < 30


def with_examples():
    """Returns the names of the modules whose docstrings have examples."""
    files = (ROOT / 'ensadv').rglob('*.py')
    found = [file.relative_to(ROOT) for file in files if '>>> ' in file.read_text()]
    return sorted('.'.join(file.with_suffix('').parts) for file in found)


def test_the_core_has_examples():
    assert {'ensadv.losses', 'ensadv.prng', 'ensadv.models.ensemble'} <= set(with_examples())


@pytest.mark.parametrize('name', with_examples())
def test_docstrings_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert (failed, tried > 0) == (0, True)
