"""One step: accumulation, skipping, carried memory, any mesh the same."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.launch import loss
from nestax.launch import mesh as meshes
from nestax.launch import step as steps
from nestax.models import language_model
from nestax.models.config import ModelConfig

B, L, D, V = 8, 6, 8, 24


class Reader(nn.Module):
  """An embedding, a running sum of it that outlives the call, a head."""

  @nn.compact
  def __call__(self, state, tokens_BxL, reset_BxL=None):
    init = nn.initializers.normal(1.0)
    table_VxD = self.param(
      'embedding',
      nn.with_logical_partitioning(init, ('vocab', 'embed')),
      (V, D),
    )
    head_DxV = self.param(
      'kernel',
      nn.with_logical_partitioning(init, ('embed', 'vocab')),
      (D, V),
    )
    x_BxLxD = table_VxD[tokens_BxL]
    if state is None:
      seen_BxD = jnp.zeros((tokens_BxL.shape[0], D))
    else:
      seen_BxD = state['seen'][0]
    seen_BxLxD = seen_BxD[:, None] + jnp.cumsum(x_BxLxD, 1) / L
    logits_BxLxV = (x_BxLxD + seen_BxLxD) @ head_DxV
    if state is None:
      return None, logits_BxLxV
    return {'seen': seen_BxLxD[:, -1][None]}, logits_BxLxV


def memory(rows=B):
  return {'seen': jnp.zeros((1, rows, D))}


def make_batch(seed=0, spoil=False):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (B, L + 1)).astype(np.int32)
  weights = (rng.random((B, L)) < 0.8).astype(np.float32)
  if spoil:
    weights[3, 2] = np.nan
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': weights,
    'bytes': rng.integers(0, 4, (B, L)).astype(np.int32),
    'reset': np.zeros((B, L), bool),
  }


@functools.cache
def make(carry=True, parts=1, rate=0.1, **sizes):
  """Gives what makes the fresh state, the step, and what puts a batch."""
  sizes = {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1} | sizes
  mesh = meshes.make(sizes, B // parts, L)
  tx, schedule = optax.adam(rate), optax.constant_schedule(rate)
  model = Reader()
  state = steps.init_state(model, tx, mesh, 0, memory if carry else None)
  layout = steps.shardings(state)
  rows_axes = steps.batch_axes(memory) if carry else None
  run = steps.train_step(model, tx, schedule, layout, parts, rows_axes)
  fresh = functools.partial(jax.tree.map, jnp.copy, state)
  part = meshes.part(mesh, B)
  return fresh, run, functools.partial(meshes.put, mesh, part=part)


def train(batches, **setup):
  """Runs the batches; gives what is left, on the host, and the metrics."""
  fresh, run, put = make(**setup)
  state, rows = fresh(), []
  for batch in batches:
    state, metrics = run(state, put(batch))
    rows.append(jax.device_get(metrics))
  plain = state._replace(key=jax.random.key_data(state.key))
  return jax.device_get(plain), rows


def assert_close(got, want):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want
  )


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


BATCHES = [make_batch(i) for i in range(3)]


@pytest.mark.parametrize('carry', [False, True], ids=['fresh', 'carry'])
@pytest.mark.parametrize('parts', [2, 4])
def test_microbatches_equal_the_big_batch(parts, carry):
  assert_close(
    train(BATCHES, parts=parts, carry=carry), train(BATCHES, carry=carry)
  )


@pytest.mark.parametrize(
  'sizes',
  [
    {'data': 8},
    {'data': 2, 'fsdp': 2, 'tensor': 2},
    {'data': 2, 'fsdp': 2, 'parts': 2},
    {'data': -1},
  ],
  ids=str,
)
def test_a_mesh_equals_one_device(sizes):
  assert_close(train(BATCHES, **sizes), train(BATCHES))


def test_every_array_is_born_in_its_shards_and_stays_there():
  fresh, run, put = make(fsdp=2, tensor=2)
  state = fresh()
  table = state.params['embedding']
  assert table.addressable_shards[0].data.shape == (V // 2, D // 2)
  moment = state.opt_state[0].mu['embedding']
  assert moment.sharding == table.sharding
  before = steps.shardings(state)
  state, _ = run(state, put(BATCHES[0]))
  assert steps.shardings(state) == before
  run(state, put(BATCHES[1]))
  assert run._cache_size() == 1


def test_the_state_is_donated():
  fresh, run, put = make()
  state = fresh()
  run(state, put(BATCHES[0]))
  assert state.params['embedding'].is_deleted()


@pytest.mark.parametrize('parts', [1, 4])
def test_a_bad_step_changes_no_bit_but_the_counters(parts):
  bad = make_batch(7, spoil=True)
  want, _ = train(BATCHES[:1], parts=parts)
  got, rows = train([BATCHES[0], bad, bad], parts=parts)
  assert (got.step, got.skipped, got.bad) == (3, 2, 2)
  counters = {'step': 0, 'skipped': 0, 'bad': 0}
  assert_same(got._replace(**counters), want._replace(**counters))
  assert [int(r['bad']) for r in rows] == [0, 1, 2]
  after, _ = train([BATCHES[0], bad, BATCHES[1]], parts=parts)
  assert (after.skipped, after.bad) == (1, 0)
  want, _ = train(BATCHES[:2], parts=parts)
  assert_same(after._replace(**counters), want._replace(**counters))


def test_an_update_out_of_the_numbers_is_a_bad_step():
  fresh, _, _ = make()
  state, rows = train(BATCHES[:2], rate=np.inf)
  assert_same(state.params, jax.device_get(fresh().params))
  assert state.bad == 2 and all(np.isfinite(r['grad_norm']) for r in rows)


def test_two_batches_that_carry_equal_one_long_batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, V, (B, 2 * L)).astype(np.int32)
  halves = [
    make_batch() | {'tokens': tokens[:, :L]},
    make_batch() | {'tokens': tokens[:, L:]},
  ]
  state, rows = train(halves, rate=0.0)
  apply = jax.jit(Reader().apply)
  want, logits = apply({'params': state.params}, memory(), tokens)
  assert_close(state.memory, want)
  total = loss.sums(logits[:, L:], halves[1])
  np.testing.assert_allclose(rows[1]['loss'], loss.means(total)['loss'], 1e-5)


def test_sums_of_halves_add_up_and_nothing_unscored_counts():
  batch = make_batch()
  logits = np.random.default_rng(1).normal(size=(B, L, V)).astype(np.float32)
  whole = loss.sums(logits, batch)
  halves = [
    loss.sums(logits[rows], {k: v[rows] for k, v in batch.items()})
    for rows in (slice(0, 3), slice(3, None))
  ]
  assert_close(jax.tree.map(lambda a, b: a + b, *halves), whole)
  logits[batch['weights'] == 0] = np.inf
  assert_close(loss.sums(logits, batch), whole)
  means = loss.means(whole)
  np.testing.assert_allclose(
    means['bits_per_byte'],
    means['loss'] * whole.weight / np.log(2) / whole.bytes,
    1e-5,
  )


@pytest.mark.parametrize(
  'sizes, rows, length, words',
  [
    ({'data': 16}, 16, 8, 'there are 8'),
    ({'data': -1}, 4, 8, '4 rows.*multiple of 8, or let 2 devices.*tensor=2'),
    ({'fsdp': 8}, 12, 8, r'mesh.data=1, mesh.fsdp=4, mesh.tensor=2$'),
    ({'data': 0, 'fsdp': 0}, 4, 8, 'at least 1'),
    ({'data': 0}, 4, 8, 'at least 1'),
    ({'data': -1, 'fsdp': -1}, 8, 8, 'one at most'),
    ({'data': 1, 'sequence': 8}, 4, 12, 'data.length is 12'),
    ({'data': -1, 'tensor': 3}, 8, 8, 'shares 8 devices out by 3'),
    ({'data': -1, 'tensor': 16}, 8, 8, 'shares 8 devices out by 16'),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, rows, length, words):
  sizes = {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1} | sizes
  with pytest.raises(meshes.MeshError, match=words):
    meshes.make(sizes, rows, length)


@pytest.mark.parametrize(
  'sizes, want',
  [
    ({'data': -1}, (1, 8, 1)),
    ({'data': -1, 'tensor': 2}, (1, 4, 2)),
    ({'data': 6}, (3, 2, 1)),
    ({'data': 1, 'tensor': 8}, (1, 1, 8)),
  ],
)
def test_the_state_is_shared_out_as_far_as_rows_are(sizes, want, monkeypatch):
  sizes = {'fsdp': 0, 'tensor': 1, 'sequence': 1} | sizes
  made = lambda: tuple(meshes.make(sizes, 24, 8).shape.values())  # noqa: E731
  assert made() == (*want, 1)
  monkeypatch.setattr(meshes, 'MOST_FSDP', 2)
  data, fsdp, *_ = made()
  assert fsdp <= 2 and data * fsdp == want[0] * want[1]


def test_a_mesh_axis_that_splits_nothing_is_refused():
  sizes = {'data': 1, 'fsdp': 1, 'tensor': 5, 'sequence': 1}
  boxed = language_model.abstract(Reader())
  meshes.check_params(meshes.make(sizes | {'tensor': 4}, B, L), boxed)
  with pytest.raises(meshes.MeshError, match=rf'vocabulary .model.V. {V}; its'):
    meshes.check_params(meshes.make(sizes, B, L), boxed)
  cfg = ModelConfig(family='transformer', D=64, H=2, F=128, N=1)
  boxed = language_model.abstract(language_model.LanguageModel(cfg))
  words = (
    'tensor = 3 divides none .* could: heads 2, key and value heads .model.G. '
    '2, hidden width of MLPs 128, vocabulary .model.V. 272; its'
  )
  with pytest.raises(meshes.MeshError, match=words):
    meshes.check_params(meshes.make(sizes | {'tensor': 3}, B, L), boxed)


def test_gradients_are_gathered_in_the_shards_of_their_parameters():
  fresh, run, put = make(fsdp=4, tensor=2, parts=2)
  text = run.lower(fresh(), put(BATCHES[0])).compile().as_text()
  carried = [x.split(' while(')[0] for x in text.splitlines() if 'while(' in x]
  assert any(f'f32[{V // 2},{D // 4}]' in shapes for shapes in carried)
  assert not any(f'f32[{V},{D}]' in shapes for shapes in carried)
