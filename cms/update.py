"""Inner optimisers: how one level turns a gathered gradient into a step."""

import dataclasses

import jax
import jax.numpy as jnp

OPTIMIZERS = ('sgd', 'momentum', 'dgd', 'muon')
# Muon's quintic: singular values of 0.01 and more end within [0.65, 1.25].
QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """The inner optimiser of the levels; `g` is the mean gradient of a commit.

  Attributes:
    optimizer: with `w` the weights and `r` the level's rate,
      'sgd': `w -= r g`;
      'momentum': `m = beta m + g`, `w -= r m`;
      'dgd': delta gradient descent (NL Eq. 57): `w -= r' (g + delta x x^T)`,
        `r' = r / (1 + r)`, for inputs `x` of unit norm. The second term
        comes with the gradient, see `cms/chain.py`; it acts on
        what was written, so that it decays towards the initial value;
      'muon': `m = beta m + g`, `w -= r NewtonSchulz(m)` (NL Eq. 42).
    beta: factor of the momentum.
    clip: greatest Frobenius norm of `g` over the level of one sequence in one
      block; 0 for none.
    ns_steps: Newton-Schulz steps of muon.
  """

  optimizer: str = 'sgd'
  beta: float = 0.9
  clip: float = 1.0
  ns_steps: int = 5

  def __post_init__(self):
    if self.optimizer not in OPTIMIZERS:
      raise ValueError(f'optimizer={self.optimizer!r}: one of {OPTIMIZERS}')
    if not 0 <= self.beta < 1:
      raise ValueError(f'beta={self.beta}: at least 0 and below 1')
    if not 0 <= self.clip < float('inf'):
      raise ValueError(f'clip={self.clip}: 0 (none) or above, and finite')
    if self.ns_steps < 1:
      raise ValueError(f'ns_steps={self.ns_steps}: at least 1')

  @property
  def remembers(self) -> bool:
    """Whether it keeps a momentum."""
    return self.optimizer in ('momentum', 'muon')


def square(tree):
  """Sum of squares of each block and sequence, `[n, B]`."""
  parts = [jnp.square(x).sum(range(2, x.ndim)) for x in jax.tree.leaves(tree)]
  return sum(parts)


def effective(cfg: UpdateConfig, rate_n):
  """What a step is proportional to: the rate, of 'dgd' `r / (1 + r)`."""
  return rate_n / (1 + rate_n) if cfg.optimizer == 'dgd' else rate_n


def step(cfg: UpdateConfig, moment, grads, rate_n):
  """The step of one commit.

  Args:
    cfg: the optimiser.
    moment: momentum, a tree like `grads`, or None if it keeps none.
    grads: mean gradients, leaves `[n, B, ...]`, the last two axes a matrix.
    rate_n: learning rate of each block.

  Returns:
    (what to add to the weights, new momentum or None).
  """
  if cfg.clip:
    size_nxB = root(square(grads))
    shrink_nxB = cfg.clip / jnp.maximum(size_nxB, cfg.clip)
    grads = jax.tree.map(lambda g: g * shrink_nxB[..., None, None], grads)
  if cfg.remembers:
    grads = moment = jax.tree.map(lambda m, g: cfg.beta * m + g, moment, grads)
  if cfg.optimizer == 'muon':
    grads = jax.tree.map(lambda g: orthogonalize(g, cfg.ns_steps), grads)
  rate = effective(cfg, rate_n)[:, None, None, None]
  return jax.tree.map(lambda g: -rate * g, grads), moment


def root(x):
  """Square root whose derivative at 0 is 0 instead of infinite."""
  # NaN is not 0: it has to come through
  return jnp.sqrt(jnp.where(x == 0, 1.0, x)) * (x != 0)


def orthogonalize(x, steps: int):
  """Newton-Schulz on the last two axes, float32, differentiable at 0."""
  a, b, c = QUINTIC
  wide = x.shape[-2] < x.shape[-1]
  x = x if wide else x.mT
  size = root(jnp.square(x).sum((-2, -1), keepdims=True))
  x = x / (size + 1e-7)
  for _ in range(steps):
    gram = x @ x.mT
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x if wide else x.mT
