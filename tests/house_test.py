"""Rules of the house: packaging, direction of imports, README."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.source

ROOT = pathlib.Path(__file__).parents[1]
# what each part of nestax may import of the others; tests may import all
MAY_IMPORT = {
  'cms': set(),
  'optim': set(),
  'models': {'cms'},
  'sleep': {'cms', 'models'},
  'launch': {'cms', 'models', 'optim', 'sleep'},
}


def setup_cfg():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  return config


def lines(text):
  return [line for line in text.splitlines() if line.strip()]


def pairs(text):
  return dict(map(str.strip, line.split('=', 1)) for line in lines(text))


def package_folders():
  """Folders of the parts that hold an __init__.py, relative to the root."""
  return sorted(
    str(init.parent.relative_to(ROOT))
    for part in MAY_IMPORT
    for init in (ROOT / part).rglob('__init__.py')
  )


def test_setup_cfg_lists_every_package():
  packages = lines(setup_cfg()['options']['packages'])
  want = ['nestax.' + f.replace('/', '.') for f in package_folders()]
  assert packages == want


def test_setup_cfg_maps_every_package_to_its_folder():
  mapped = pairs(setup_cfg()['options']['package_dir'])
  assert mapped == {
    'nestax.' + f.replace('/', '.'): f for f in package_folders()
  }


def test_every_folder_with_modules_is_a_package():
  folders = {
    str(path.parent.relative_to(ROOT))
    for part in MAY_IMPORT
    for path in (ROOT / part).rglob('*.py')
  }
  assert sorted(folders) == package_folders()


def test_the_root_is_no_package():
  # it would make the root `nestax` a package and hide the parts below it
  assert not (ROOT / '__init__.py').exists()
  assert not list(ROOT.glob('*.py'))


def test_console_scripts_import():
  # a process each, as they run: some define flags of the same name; what all
  # of them import is imported once
  scripts = pairs(setup_cfg()['options.entry_points']['console_scripts'])
  assert scripts
  code = 'import os\nimport nestax.launch.run, nestax.launch.trained\n'
  code += 'import nestax.sleep.tools\n'
  for target in scripts.values():
    module, function = target.split(':')
    code += (
      'if not (child := os.fork()):\n'
      f'  from {module} import {function}\n'
      f'  assert callable({function})\n'
      '  os._exit(0)\n'
      f'assert not os.waitpid(child, 0)[1], {target!r}\n'
    )
  subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def imported(path):
  """Full names of the modules that a file imports, anywhere in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('part', MAY_IMPORT)
def test_no_import_goes_against_the_grain(part):
  files = sorted((ROOT / part).rglob('*.py'))
  assert files
  for path in files:
    for name in imported(path):
      top, _, rest = name.partition('.')
      assert top not in MAY_IMPORT, f'{path}: import nestax.{name}'
      if top == 'nestax':
        used = rest.split('.')[0]
        allowed = MAY_IMPORT[part] | {part}
        assert used in allowed, f'{path} imports {name}: {part} may not'


def test_the_readme_begins_with_two_commands():
  text = (ROOT / 'README.md').read_text()
  blocks = re.findall(r'^```bash\n(.*?)^```$', text, re.M | re.S)
  train, test = blocks[:2]
  assert train.strip() == 'pip install -q -e . && nestax-train'
  assert test.strip() == "pip install -q -e '.[test]' && python -m pytest"
