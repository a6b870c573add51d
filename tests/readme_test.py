"""What README.md shows of Python runs, on a model made smaller."""

import pathlib
import re

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]


def test_python_of_the_readme_runs():
  text = (ROOT / 'README.md').read_text()
  read, train, _, mesh = re.findall(
    r'^```python\n(import .*?|from .*?)^```$', text, re.M | re.S
  )
  assert 'D=128, N=2, H=2, F=384' in read
  names = {}
  exec(read.replace('D=128, N=2, H=2, F=384', 'D=16, N=1, H=2, F=24'), names)
  # two pieces are the whole
  _, whole = names['read']({'params': names['params']}, None, names['tokens'])
  np.testing.assert_allclose(names['logits'], whole[:, 37:], atol=1e-5)
  before = names['params']
  exec(train, names)
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), before, names['params']
  )
  assert np.isfinite(names['value']) and all(jax.tree.leaves(moved))
  exec(mesh, names)
  _, whole = names['read']({'params': names['params']}, None, names['tokens'])
  np.testing.assert_allclose(names['logits'], whole, atol=1e-5)
  assert names['logits'].sharding.mesh.shape == {'data': 2, 'tensor': 2}
