"""MAD's models begin small, and nothing else of them changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.launch.evals import (
  autoencoder,
  beginning,
  entrants,
  mad,
  suite,
  trainable,
)

SMALL = {'V': 16, 'D': 32, 'N': 2, 'H': 4, 'F': 96, 'tied': False}
KEPT = {  # what is no linear map, and gates per head
  *('head', 'scale', 'bias', 'skip'),
  *('alpha', 'alpha_bias', 'eta', 'eta_bias', 'k', 'v', 'mem'),
}


def drawn(net) -> dict[str, np.ndarray]:
  params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  named = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
    for path, x in named
  }


@pytest.mark.parametrize(
  'family', ['hope', 'transformer', 'deltanet', 'titans_mac', 'samba']
)
@pytest.mark.parametrize('linear', [False, True])
def test_embeddings_or_all_linear_maps_begin_small(family, linear):
  window = {'window': 8} if family == 'samba' else {}
  cfg = entrants.config(family, SMALL | window)
  make = autoencoder.net if linear else trainable.language
  plain = drawn(make(cfg))
  small = drawn(beginning.small(make, 0.02, linear)(cfg))
  assert plain.keys() == small.keys()
  changed = {name for name in plain if (plain[name] != small[name]).any()}
  for name in changed:
    assert abs(small[name].std() - 0.02) < 1e-5
    ratio = small[name] / plain[name]
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-4)
  if not linear:
    assert [*changed] == [name for name in plain if 'embedding' in name]
    return
  for name in plain.keys() - changed:
    last = name.split('/')[-1]
    assert last in KEPT or 'conv' in name or '/gates/' in name, name
  for part in ('query', 'key', 'value', 'out', 'level_0', 'decoder/Dense_2'):
    assert any(part in name for name in changed), part


@pytest.mark.parametrize('task', mad.BASE)
@pytest.mark.parametrize('linear', [False, True])
def test_every_task_begins_as_the_options_say(task, linear):
  cfg = entrants.config('transformer', SMALL)
  size = mad.BASE[task]._replace(V=16)
  all_of_it = linear or task == 'compression'
  for begin, want in ((0.02, 0.02), (0.3, 0.3), (0.0, 32**-0.5)):
    problem = mad.problem(task, task, size, begin, linear)
    # what trains alike is one cell: compression either way
    differs = begin and linear and task != 'compression'
    said = {'linear': True} if differs else {}
    assert problem.key == {'size': size._asdict(), 'begin': begin} | said
    params = drawn(problem.net(cfg))
    std = params[next(n for n in params if 'embedding' in n)].std()
    assert abs(std - want) < (0.1 * want if begin == 0 else 1e-5)
    maps = [n for n in params if n.endswith('/kernel') and 'mixer' in n]
    maps += [n for n in params if n.startswith('decoder') and 'kernel' in n]
    assert any('decoder' in n for n in maps) == (task == 'compression')
    for name in maps:
      small = abs(params[name].std() - begin) < 1e-5
      assert small == bool(begin and all_of_it), name


def test_models_begin_small_unless_asked_not_to():
  task = 'memorization'
  asked = suite.Asked(models=('transformer',), seeds=1)
  for options, linear in (({}, True), ({'linear': False}, None)):
    cells = mad.cells(mad.Options(**options), asked)
    keys = [cell.key for cell in cells if cell.task == task]
    assert [key.get('linear') for key in keys] == [linear]


@pytest.mark.parametrize('begin', [-0.1, 1.5, float('nan')])
def test_no_beginning_beyond_a_standard_deviation(begin):
  with pytest.raises(ValueError, match=f'begin={begin}: 0 to 1'):
    mad.Options(begin=begin)
