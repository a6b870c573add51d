"""Checkpoints: bit for bit, on another mesh, damaged, refused, disk full."""

import errno
import os
import pathlib
import resource
import shutil
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nestax.launch import checkpoint


class State(NamedTuple):
  """Has all that a TrainState has: keys, optax states, None, bfloat16."""

  step: Any
  params: Any
  opt_state: Any
  memory: Any
  key: Any


def make_state(seed: int) -> State:
  key = jax.random.key(seed)
  params = {
    'kernel': jax.random.normal(key, (64, 128)),
    'scale': jnp.full((8,), seed, jnp.bfloat16),
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  return State(jnp.asarray(seed), params, tx.init(params), None, key)


def make_data():
  data = grain.MapDataset.range(100).shuffle(seed=1).repeat().batch(2)
  return iter(data.to_iter_dataset())


def make_config(**train):
  return ml_collections.ConfigDict(
    {
      'model': {'D': 8, 'remat': 'none'},
      'train': {'steps': 10, 'batch': 2} | train,
      'checkpoint': {'keep': 3, 'every': 1},
    }
  )


@pytest.fixture
def said():
  return []


@pytest.fixture
def run(tmp_path, said):
  """A workdir with checkpoints 1, 2, 3 and what the data gives after 2, 3."""
  data, following = make_data(), {}
  checkpoints = checkpoint.Checkpoints(tmp_path, make_config(), said.append)
  for step in (1, 2, 3):
    following[step - 1] = next(data)
    checkpoints.save(step, make_state(step), data)
  checkpoints.wait()
  checkpoints.close()
  following[3] = next(data)
  return tmp_path, following


def open_again(workdir, said, config=None):
  return checkpoint.Checkpoints(workdir, config or make_config(), said.append)


def restore(workdir, said, config=None):
  data = make_data()
  checkpoints = open_again(workdir, said, config)
  abstract = jax.eval_shape(lambda: make_state(0))
  whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), abstract
  )
  state = checkpoints.restore(abstract, data)
  checkpoints.close()
  return state, data


def assert_same(got, want):
  def one(a, b):
    assert a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)

  jax.tree.map(one, got, want)


def test_what_is_restored_is_what_was_saved(run, said):
  workdir, following = run
  state, data = restore(workdir, said)
  assert_same(state, make_state(3))
  np.testing.assert_array_equal(next(data), following[3])
  assert f'resuming from checkpoint 3 in {workdir}' in said[-1]


def test_a_folder_without_checkpoints_restores_nothing(tmp_path, said):
  state, _ = restore(tmp_path, said)
  assert state is None and said == []


def test_the_last_few_are_kept(run):
  workdir, _ = run
  checkpoints = open_again(workdir, [])
  for step in (4, 5):
    checkpoints.save(step, make_state(step), make_data())
  checkpoints.wait()
  checkpoints.close()
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['3', '4', '5']


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
  spoil = jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)
  checkpoints = open_again(tmp_path, [])
  state = make_state(1)
  checkpoints.save(1, state, make_data())
  spoiled = spoil(state.params)
  checkpoints.close()
  assert_same(restore(tmp_path, [])[0], make_state(1))
  assert not spoiled['kernel'].any()


@pytest.mark.parametrize('ways', [2, 8])
def test_any_mesh_restores_what_another_saved(tmp_path, ways):
  def laid(count, *axes):
    mesh = jax.make_mesh(
      (count,),
      ('x',),
      axis_types=(AxisType.Auto,),
      devices=jax.devices()[:count],
    )
    return NamedSharding(mesh, PartitionSpec(*axes))

  def state_on(count):
    step, kernel = jnp.asarray(1), make_state(1).params['kernel']
    step = jax.device_put(step, laid(count))
    kernel = jax.device_put(kernel, laid(count, 'x'))
    return State(step, kernel, None, None, None)

  checkpoints = open_again(tmp_path, [])
  checkpoints.save(1, state_on(4), make_data())
  checkpoints.wait()
  want = state_on(ways)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), want
  )
  got = checkpoints.restore(abstract, make_data())
  checkpoints.close()
  assert got.params.sharding == want.params.sharding
  assert_same(got, want)


def largest(folder: pathlib.Path) -> pathlib.Path:
  return max(folder.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)


def truncate(folder):
  path = largest(folder)
  os.truncate(path, path.stat().st_size // 2)


def flip(folder):
  path = largest(folder)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGES = {
  'array data cut in half': truncate,
  'one bit flipped': flip,
  'array data deleted': lambda folder: largest(folder).unlink(),
  'no state': lambda folder: shutil.rmtree(folder / 'state'),
  'no data position': lambda folder: shutil.rmtree(folder / 'data'),
  'empty about': lambda folder: os.truncate(folder / 'about' / 'metadata', 0),
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_falls_back_and_says_so(run, said, damage):
  workdir, following = run
  damage(workdir / 'checkpoints' / '3')
  state, data = restore(workdir, said)
  assert_same(state, make_state(2))
  np.testing.assert_array_equal(next(data), following[2])
  assert 'checkpoint 3' in said[0] and 'falling back' in said[0]
  assert 'resuming from checkpoint 2' in said[1]
  assert (workdir / 'damaged' / '3-0').is_dir()
  again = open_again(workdir, [])
  again.save(3, make_state(3), data)
  again.close()
  assert_same(restore(workdir, [])[0], make_state(3))


def test_an_interrupted_save_is_named_and_left_out(run, said):
  workdir, _ = run
  shutil.copytree(
    workdir / 'checkpoints' / '3',
    workdir / 'checkpoints' / '4.orbax-checkpoint-tmp',
  )
  state, _ = restore(workdir, said)
  assert_same(state, make_state(3))
  assert 'checkpoint 4 was interrupted' in said[0]


def test_all_damaged_is_an_error_and_nothing_is_deleted(run, said):
  workdir, _ = run
  for step in '123':
    truncate(workdir / 'checkpoints' / step)
  with pytest.raises(
    checkpoint.CheckpointError, match=r'none of .*\[1, 2, 3\]'
  ):
    restore(workdir, said)
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['1', '2', '3']


def test_another_config_is_refused_by_the_names_of_its_keys(run, said):
  workdir, _ = run
  config = make_config(batch=4)
  config.model.D = 16
  words = 'model.D is 8 there and 16 here; train.batch is 2 there and 4 here'
  with pytest.raises(checkpoint.OtherConfigError, match=words):
    restore(workdir, said, config)


def test_the_length_of_the_run_and_its_logging_may_change(run, said):
  workdir, _ = run
  config = make_config(steps=99)
  config.checkpoint.every = 7
  config.model.remat = 'full'
  assert_same(restore(workdir, said, config)[0], make_state(3))


@pytest.fixture
def small_disk():
  """Writing more than 20 kB to a file fails, as on a disk that is full."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
@pytest.mark.parametrize('seen_by', ['check', 'wait', 'save'])
def test_a_write_that_fails_is_an_error_and_loses_nothing(
  tmp_path, small_disk, seen_by
):
  config = make_config()
  config.checkpoint.keep = 1
  checkpoints = open_again(tmp_path, [], config)
  checkpoints.save(1, make_state(1), make_data())
  checkpoints.wait()
  small_disk()
  with pytest.raises(checkpoint.CheckpointError) as error:
    checkpoints.save(2, make_state(2), make_data())
    if seen_by == 'save':
      checkpoints.save(3, make_state(3), make_data())
    while seen_by == 'check':
      checkpoints.check()
    checkpoints.wait()
  words = f'checkpoint 2 could not be written .*{os.strerror(errno.EFBIG)}'
  assert error.match(words) and error.match('that of step 1 is complete')
  resource.setrlimit(
    resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
  )
  assert_same(restore(tmp_path, [])[0], make_state(1))


def test_a_full_disk_is_named(run, monkeypatch):
  workdir, _ = run
  checkpoints = open_again(workdir, [])

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(checkpoints._manager, 'save', full)
  with pytest.raises(
    checkpoint.CheckpointError,
    match='checkpoint 4 .*No space left on device.*step 3 is complete',
  ):
    checkpoints.save(4, make_state(4), make_data())


@pytest.mark.parametrize('below', ['file', '/proc'])
def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, below):
  (tmp_path / 'file').write_text('')
  workdir = tmp_path / below / 'runs'
  with pytest.raises(PermissionError, match=f'workdir {workdir}.*--workdir'):
    checkpoint.check_writable(workdir)


def test_a_writable_workdir_is_left_empty(tmp_path):
  checkpoint.check_writable(tmp_path / 'a' / 'b')
  assert os.listdir(tmp_path / 'a' / 'b') == []


def test_parameters_alone_come_with_their_config(run, said):
  workdir, _ = run
  truncate(workdir / 'checkpoints' / '3')
  configs = []

  def abstract(config):
    configs.append(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      make_state(0).params,
    )

  step, config, params = checkpoint.load_params(workdir, abstract, said.append)
  assert step == 2 and config == configs[-1] == make_config().to_dict()
  assert_same(params, make_state(2).params)
  assert (workdir / 'checkpoints' / '3').is_dir()
  with pytest.raises(FileNotFoundError, match='train there first'):
    checkpoint.load_params(workdir / 'nothing', abstract)
