"""Training on eight devices is training on one; what is born where."""

import functools
import re

import jax
import numpy as np
import pytest
import sharded_cases as cases

from nestax.launch import optimizer
from nestax.launch import step as steps
from nestax.models.config import FAMILIES

MESHES = (
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'data': 2, 'fsdp': 4},
  {'data': 2, 'tensor': 2, 'sequence': 2},
  {'data': 8},
)
LEARNING = ('hope', 'hope_attention')


def some():
  """Every family on every mesh, every optimiser on every mesh.

  What takes the time is compiling: the runs of a family are held to one on one
  device (of the two whose levels learn, to one each way).
  """
  for i, family in enumerate(FAMILIES):
    name = optimizer.NAMES[::-1][i % 3]
    for k, sizes in enumerate(MESHES):
      levels = k > 0 and family in LEARNING
      few = sizes['data'] * sizes.get('fsdp', 1) < cases.B
      yield pytest.param(
        family,
        name,
        sizes,
        {'levels': levels},
        {'parts': 2 if k and few else 1, 'carry': levels or i % 2 > 0},
        marks=[] if k == 0 and family == 'transformer' else pytest.mark.slow,
        id=f'{family}-{name}-{"-".join(f"{a}{n}" for a, n in sizes.items())}',
      )


def spread(tree):
  return {
    jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(tree)
  }


@functools.cache
def alone(family, name, levels, carry):
  return cases.train(cases.config(family, levels), name, {}, carry=carry)


@pytest.mark.parametrize('family,name,sizes,model,run', some())
def test_eight_devices_train_as_one(family, name, sizes, model, run):
  cfg = cases.config(family, **model)
  losses, first, last, memory = cases.train(cfg, name, sizes, **run)
  want = alone(family, name, model['levels'], run['carry'])
  np.testing.assert_allclose(losses, want[0], rtol=1e-5)
  # Newton-Schulz multiplies in bfloat16
  off = 2e-3 if name == 'adamw' else 3e-2
  for path, got in spread(last).items():
    one, born = spread(want[2])[path], spread(want[1])[path]
    np.testing.assert_array_equal(spread(first)[path], born, path)
    moved = np.linalg.norm(one - born)
    assert moved > 0 or 'slots' in path, path
    assert np.linalg.norm(got - one) <= off * moved, path
  for path, got in spread(memory).items():
    # counts, clocks and flags are exact
    atol = 1e-3 if got.dtype == np.float32 else 0
    np.testing.assert_allclose(got, spread(want[3])[path], 1e-3, atol, path)


def test_no_parameter_is_ever_whole_on_one_device():
  # in no other way would a whole one have the shape of this N and F
  cfg = cases.config('hope', N=3, F=40, V=56)
  mesh, model, tx, _ = cases.parts_of_a_run(cfg, 'm3', MESHES[0])
  abstract = steps.abstract_state(model, tx, mesh)
  want = steps.shardings(abstract)
  with jax.set_mesh(mesh):
    fresh = jax.jit(steps._fresh(model, tx, None), out_shardings=want)
    compiled = fresh.lower(jax.random.key(0)).compile()
  assert compiled.output_shardings == want
  made = set(re.findall(r'\w+\[([\d,]+)\]', compiled.as_text()))
  large = {p: x for p, x in spread(abstract.params).items() if x.size > 128}
  assert len(large) > 4
  for path, leaf in large.items():
    # a block's parameters are drawn alone, then stacked
    for shape in (leaf.shape, leaf.shape['blocks' in path :]):
      assert ','.join(map(str, shape)) not in made, path
