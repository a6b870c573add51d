"""Checkpoints: bit for bit, on another mesh, refused, disk full."""

import errno
import os
import resource

import checkpoint_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nestax.launch import checkpoint


@pytest.fixture
def said():
  return []


@pytest.fixture
def run(tmp_path, said):
  return cases.write(tmp_path, said)


def test_what_is_restored_is_what_was_saved(run, said):
  workdir, following = run
  state, data = cases.restore(workdir, said)
  cases.assert_same(state, cases.make_state(3))
  np.testing.assert_array_equal(next(data), following[3])
  assert f'resuming from checkpoint 3 in {workdir}' in said[-1]


def test_a_folder_without_checkpoints_restores_nothing(tmp_path, said):
  state, _ = cases.restore(tmp_path, said)
  assert state is None and said == []


def test_the_last_few_are_kept(run):
  workdir, _ = run
  checkpoints = cases.open_again(workdir, [])
  for step in (4, 5):
    checkpoints.save(step, cases.make_state(step), cases.make_data())
  checkpoints.wait()
  checkpoints.close()
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['3', '4', '5']


def test_what_cannot_be_deleted_is_said(run, monkeypatch):
  workdir, _ = run
  folder = workdir / 'checkpoints'
  checkpoints = cases.open_again(workdir, [])

  def refused(*_):
    raise PermissionError('not yours')

  manager = checkpoints._manager
  with monkeypatch.context() as patch:
    patch.setattr(manager, 'delete', refused)
    words = f'checkpoint 1 could not be deleted from {folder}: not yours'
    with pytest.raises(checkpoint.CheckpointError, match=words):
      checkpoints.keep_only(3)
  assert {'1', '2', '3'} <= set(os.listdir(folder))
  (workdir / 'damaged').mkdir()
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.shutil, 'rmtree', refused)
    patch.setattr(manager, 'delete', lambda step: None)
    with pytest.raises(checkpoint.CheckpointError, match='damaged could not'):
      checkpoints.keep_only(3)
  checkpoints.keep_only(3)
  checkpoints.close()
  assert os.listdir(folder) == ['3'] and not (workdir / 'damaged').exists()


def test_the_newest_every_few_and_the_best_are_kept(tmp_path):
  config = cases.make_config()
  config.checkpoint.update({'keep': 2, 'keep_every': 4, 'keep_best': 1})

  def save(bits):
    checkpoints = cases.open_again(tmp_path, [], config)
    for step, value in bits.items():
      checkpoints.save(step, cases.make_state(step), cases.make_data(), value)
    checkpoints.wait()
    kept = checkpoints.steps()
    checkpoints.close()
    assert sorted(map(int, os.listdir(tmp_path / 'checkpoints'))) == kept
    return kept

  bits = {1: 3.0, 2: 1.5, 3: 2.0, 4: 2.5, 5: None, 6: float('nan')}
  assert save(bits) == [2, 4, 5, 6]
  # the values are kept with the checkpoints; 2 is the best no more
  assert save({7: 1.6}) == [2, 4, 6, 7]
  assert save({8: 1.0}) == [4, 7, 8]


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
  spoil = jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)
  checkpoints = cases.open_again(tmp_path, [])
  state = cases.make_state(1)
  checkpoints.save(1, state, cases.make_data())
  spoiled = spoil(state.params)
  checkpoints.close()
  cases.assert_same(cases.restore(tmp_path, [])[0], cases.make_state(1))
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
    step, kernel = jnp.asarray(1), cases.make_state(1).params['kernel']
    step = jax.device_put(step, laid(count))
    kernel = jax.device_put(kernel, laid(count, 'x'))
    return cases.State(step, kernel, None, None, None)

  checkpoints = cases.open_again(tmp_path, [])
  checkpoints.save(1, state_on(4), cases.make_data())
  checkpoints.wait()
  want = state_on(ways)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), want
  )
  got = checkpoints.restore(abstract, cases.make_data())
  checkpoints.close()
  assert got.params.sharding == want.params.sharding
  cases.assert_same(got, want)


def test_another_config_is_refused_by_the_names_of_its_keys(run, said):
  workdir, _ = run
  config = cases.make_config(batch=4)
  config.model.D = 16
  words = 'model.D is 8 there and 16 here; train.batch is 2 there and 4 here'
  with pytest.raises(checkpoint.OtherConfigError, match=words):
    cases.restore(workdir, said, config)


def test_the_length_of_the_run_and_its_logging_may_change(run, said):
  workdir, _ = run
  config = cases.make_config(steps=99)
  config.checkpoint.every = 7
  config.model.remat = 'full'
  cases.assert_same(
    cases.restore(workdir, said, config)[0], cases.make_state(3)
  )


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
  config = cases.make_config()
  config.checkpoint.keep = 1
  checkpoints = cases.open_again(tmp_path, [], config)
  checkpoints.save(1, cases.make_state(1), cases.make_data())
  checkpoints.wait()
  small_disk()
  with pytest.raises(checkpoint.CheckpointError) as error:
    checkpoints.save(2, cases.make_state(2), cases.make_data())
    if seen_by == 'save':
      checkpoints.save(3, cases.make_state(3), cases.make_data())
    while seen_by == 'check':
      checkpoints.check()
    checkpoints.wait()
  words = f'checkpoint 2 could not be written .*{os.strerror(errno.EFBIG)}'
  assert error.match(words) and error.match('that of step 1 is complete')
  resource.setrlimit(
    resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
  )
  cases.assert_same(cases.restore(tmp_path, [])[0], cases.make_state(1))


def test_a_full_disk_is_named(run, monkeypatch):
  workdir, _ = run
  checkpoints = cases.open_again(workdir, [])

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(checkpoints._manager, 'save', full)
  with pytest.raises(
    checkpoint.CheckpointError,
    match='checkpoint 4 .*No space left on device.*step 3 is complete',
  ):
    checkpoints.save(4, cases.make_state(4), cases.make_data())


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
  cases.truncate(workdir / 'checkpoints' / '3')
  configs = []

  def abstract(config):
    configs.append(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      cases.make_state(0).params,
    )

  step, config, params = checkpoint.load_params(workdir, abstract, said.append)
  assert step == 2 and config == configs[-1] == cases.make_config().to_dict()
  cases.assert_same(params, cases.make_state(2).params)
  assert (workdir / 'checkpoints' / '3').is_dir()
  one = workdir / 'checkpoints' / '1'
  step, _, params = checkpoint.load_params(one, abstract, said.append)
  assert step == 1
  cases.assert_same(params, cases.make_state(1).params)
  with pytest.raises(FileNotFoundError, match='train there first'):
    checkpoint.load_params(workdir / 'nothing', abstract)
