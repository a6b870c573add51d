"""Where every leaf of every family's state lies on a mesh."""

import re

import jax
import pytest
import sharded_cases as cases
from jax.sharding import AxisType

from nestax.models import axes, model_state
from nestax.models.config import FAMILIES

LEARNING = ('hope', 'hope_attention')
BOTH = ('tensor', 'sequence')
# What a leaf is called, and the mesh axes of its first dimensions.
PLACES = (
  (r'memory\.(boundary|running|momentum)\.', (None, 'data', BOTH)),
  (r'memory\.position_B', (None, 'data')),
  (r'tails\[\d\]', (None, 'data', None, 'tensor')),
  (r'(key|value)_BxCxHxK', (None, 'data', None, 'tensor')),
  (r'(key|value)_BxSxGxK', (None, 'data', 'sequence', 'tensor')),
  (r'\.position_BxS', (None, 'data', 'sequence')),
  (r'mixer\.(\w+\.)?(clock|start)_B', (None, 'data')),
  (
    r'(delta|total|moment|origin\w*)\.(gate|up)',
    (None, 'data', None, 'tensor'),
  ),
  (r'(delta|total|moment|origin\w*)\.down', (None, 'data', 'tensor')),
  (r'levels\.held\.', ('data', 'sequence')),
  (r'levels\.(clock|skip|held|surprise)_B', ('data',)),
  (r'levels\[0\]\.\w+_B', ('data',)),
)


def shardings(cfg, rows, **sizes):
  """(path, shape, sharding) of the state of some rows."""
  kinds = (AxisType.Auto,) * len(sizes)
  mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
  state = jax.eval_shape(
    lambda: model_state.init_state(cfg, rows, length=cases.L)
  )
  layout = model_state.state_shardings(mesh, state)
  assert jax.tree.structure(layout) == jax.tree.structure(state)
  for (path, leaf), sharding in zip(
    jax.tree.leaves_with_path(state), jax.tree.leaves(layout)
  ):
    yield jax.tree_util.keystr(path), leaf, sharding


def plain(spec):
  """A spec without what says nothing: tuples of one, None at the end."""
  spec = [x[0] if isinstance(x, tuple) and len(x) == 1 else x for x in spec]
  while spec and spec[-1] is None:
    spec.pop()
  return tuple(spec)


def options(family):
  """Settings under which a state has every leaf that it may have."""
  if family == 'hope':
    yield {'memory': {'chunk_mem': 4, 'chunk_rest': 4, 'momentum': True}}
    yield {'memory': {'chunk_mem': 4, 'chunk_rest': 4, 'depth_mem': 2}}
  yield {}


@pytest.mark.parametrize(
  'family,levels',
  [(name, False) for name in FAMILIES] + [(name, True) for name in LEARNING],
)
def test_every_leaf_lies_where_its_axes_say(family, levels):
  for option in options(family):
    cfg = cases.config(family, levels, **option)
    mesh = {'data': 2, 'tensor': 2, 'sequence': 2}
    for path, leaf, sharding in shardings(cfg, cases.B, **mesh):
      places = [p for name, p in PLACES if re.search(name, path)]
      assert plain(sharding.spec) in places, (path, leaf.shape, sharding.spec)
      part = sharding.shard_shape(leaf.shape)
      ways = leaf.size // max(1, jax.numpy.zeros(part).size)
      assert ways >= (4 if leaf.ndim > 3 else 2), (path, part)


def test_what_one_sequence_has_written_lies_over_fsdp_and_tensor():
  cfg = cases.config('hope', levels=True)
  for path, leaf, sharding in shardings(cfg, 1, fsdp=2, tensor=4):
    if re.search(r'(delta|total|moment)\.', path):
      part = sharding.shard_shape(leaf.shape)
      assert part[2] * part[3] * 8 == leaf.size, (path, part)


def test_heads_that_do_not_divide_stay_whole():
  cfg = cases.config('hope', H=3, K=8)
  for path, leaf, sharding in shardings(cfg, 8, data=2, tensor=4):
    assert plain(sharding.spec) == (None, 'data'), (path, leaf.shape)


def test_names_hold_for_every_leaf_below_them():
  tree = {'a': {'b': [1, 2]}, 'c': None, 'd': 3}
  names = {'a': ('batch',), 'c': ('heads',), 'd': ()}
  got = axes.map_names(lambda names, x: (names, x), names, tree)
  assert got == {
    'a': {'b': [(('batch',), 1), (('batch',), 2)]},
    'c': None,
    'd': ((), 3),
  }
  assert axes.stacked(names, 'layers')['a'] == ('layers', 'batch')
