"""Eight CPU devices for the whole suite, and no silent broadcasting."""

import os
import pathlib

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
# Most of the suite's time is compilation: less than half of it so. Programs
# that tests start as processes of their own are compiled in full.
jax.config.update('jax_disable_most_optimizations', True)
FLAG = '--xla_cpu_use_fusion_emitters=false'
if jax.__version_info__ < (0, 11):  # an unknown flag ends the process
  flags = os.environ.get('XLA_FLAGS')
  os.environ['XLA_FLAGS'] = f'{flags or ""} {FLAG}'
  jax.devices()  # reads them
  del os.environ['XLA_FLAGS']
  if flags is not None:
    os.environ['XLA_FLAGS'] = flags
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Every compiled program takes some of the 65,530 memory maps that Linux gives
# a process; the suite needs more than that, and died of it.
MAPS = pathlib.Path('/proc/self/maps')
MANY = 15_000


# Files that take longest begin first, or the last one runs alone at the end.
FIRST = ('notebooks_', 'models_active', 'launch_resume', 'launch_nights')


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: not item.path.name.startswith(FIRST))


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """Lets go of compiled programs after a file of tests, if there are many."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b'\n') > MANY:
    jax.clear_caches()
