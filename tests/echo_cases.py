"""The smallest problem: to say the token that was just read."""

import numpy as np

from nestax.launch.evals import problems, trainable, trials

TRAINING = trials.Training(
  D=16,
  N=1,
  H=1,
  F=24,
  steps=40,
  batch=8,
  examples=60,
  tests=20,
  rates=(1e-6, 3e-2),
  evaluations=2,
)


def echo(rng, rows):
  """The token itself; its last two are no target."""
  tokens = rng.integers(0, 8, (rows, 6)).astype(np.int32)
  weights = np.ones(tokens.shape, np.float32)
  weights[:, -2:] = 0
  return {'tokens': tokens, 'targets': tokens, 'weights': weights}


PROBLEM = problems.Problem(
  'echo', 8, echo, {'rows': echo, 'again': echo}, trainable.whole_rows, {'a': 1}
)
