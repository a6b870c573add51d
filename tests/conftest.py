"""Eight CPU devices for the whole suite, and no silent broadcasting."""

import gc
import os
import pathlib
import shutil
import tempfile

import jax
import pytest

from nestax.launch import mesh as meshes

DEVICES = 8
jax.config.update('jax_num_cpu_devices', DEVICES)
# Most of the suite's time is compilation: less than half of it so. Programs
# that tests start as processes of their own are compiled in full.
jax.config.update('jax_disable_most_optimizations', True)
# One thread compiles a program, in one piece: workers keep all cores busy.
FLAGS = '--xla_cpu_parallel_codegen_split_count=1'
if jax.__version_info__ < (0, 11):  # an unknown flag ends the process
  FLAGS += ' --xla_cpu_use_fusion_emitters=false'
had = {name: os.environ.get(name) for name in ('XLA_FLAGS', 'NPROC')}
os.environ['XLA_FLAGS'] = f'{had["XLA_FLAGS"] or ""} {FLAGS}'
meshes.spare_threads(DEVICES)
jax.devices()  # reads them
for name, value in had.items():
  os.environ.pop(name, None)
  if value is not None:
    os.environ[name] = value
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Every compiled program takes some of the 65,530 memory maps that Linux gives
# a process; the suite needs more than that, and died of it.
MAPS = pathlib.Path('/proc/self/maps')
MANY = 30_000

# Files that take longest begin first, or the last one runs alone at the end.
FIRST = (
  'notebooks_', 'models_active', 'models_memory_scan', 'launch_resume',
  'models_memory_pallas_gpu', 'models_language_model', 'launch_nights',
  'cms_stream', 'sleep_reader', 'launch_sleep_', 'launch_evals_levels',
)  # fmt: skip


def pytest_configure(config):
  """What one worker, file or process has compiled, others read back.

  Set before workers start, which inherit it as all processes do.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  folder = tempfile.mkdtemp(prefix='nestax-programs-')
  config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
  for name, value in (
    ('jax_compilation_cache_dir', folder),
    ('jax_persistent_cache_min_compile_time_secs', 0.0),
    ('jax_persistent_cache_min_entry_size_bytes', -1),
  ):
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: not item.path.name.startswith(FIRST))


def pytest_collection_finish():
  """What is imported by now stays: it need not be looked through again."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """Lets go of compiled programs after a file of tests, if there are many."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b'\n') > MANY:
    jax.clear_caches()
