"""Named cases of the continuum, and a toy network with a slow transcription.

Every option of the continuum stands in at least one case; the full product
would be a day of compilation.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nestax.cms import level as levels_
from nestax.cms import objective
from nestax.cms.level import Theta
from nestax.cms.stream import Net, Piece, StreamConfig, init_state
from nestax.cms.update import UpdateConfig

n, B, L, D, F = 2, 3, 27, 4, 3

# periods, inner optimiser, nested, whether the objective goes through forward
STREAMS = {
  'one level': ((3,), 'momentum', False, False),
  'two levels': ((3, 6), 'dgd', False, True),
  'longer than the stream': ((4, 32), 'sgd', False, True),
  'three levels': ((4, 8, 16), 'momentum', False, True),
  'nested': ((2, 4, 12), 'momentum', True, True),
}


def stream_config(name, differentiate='full'):
  periods, optimizer, nested, _ = STREAMS[name]
  update = UpdateConfig(optimizer, beta=0.7, clip=0.5)
  return StreamConfig(periods, update, differentiate, nested)


def resets():
  """Documents start at chunks' starts, inside them, and twice in one."""
  reset = np.zeros((B, L), bool)
  reset[0, [12, 25]] = True
  reset[1, [5, 7, 18]] = True
  return reset


def inputs(seed=0):
  """(slow weights and rates of each level, stream)."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  slow = [
    Theta(0.4 * normal(n, D, F), 0.4 * normal(n, D, F), 0.4 * normal(n, F, D))
    for _ in range(3)
  ]
  rates = [np.array(r, np.float32) for r in ([0.5, 0.2], [0.3, 0.6], [0.9, 1])]
  x_BxLxD = normal(B, L, D)
  return slow, rates, x_BxLxD


# The toy: a leaky sum in place of a mixer, and levels side by side that are
# products of matrices, so that the gradients can be written down.


def toy(slow, through=True, periods=None):
  """The network that `Plain` transcribes, for `cms.fresh` and `cms.resume`.

  With `periods` fresh sequences can be read at once.
  """

  def forward(weights, mixers, piece, length_B, alive_BxL):
    rows, width = piece.tokens_BxL.shape
    count_B = jnp.full((rows,), width) if length_B is None else length_B
    reset_BxL = piece.reset_BxL
    if reset_BxL is None:
      reset_BxL = jnp.zeros((rows, width), bool)

    def token(m_BxD, step):
      x_BxD, reset_B, t = step
      new = 0.5 * jnp.where(reset_B[:, None], 0.0, m_BxD) + x_BxD
      return jnp.where((t < count_B)[:, None], new, m_BxD), new

    steps = jnp.moveaxis(piece.x_BxLxD, 1, 0), reset_BxL.T, jnp.arange(width)
    last_BxD, m_LxBxD = jax.lax.scan(token, mixers[0], steps)
    z_BxLxD = piece.x_BxLxD + jnp.moveaxis(m_LxBxD, 0, 1)
    return last_BxD[None], read(weights, z_BxLxD, alive_BxL), z_BxLxD

  def whole(writes, piece):
    """Every token with the matrices that it is read with, gathered for it."""
    rows, length = piece.tokens_BxL.shape
    reset_BxL = piece.reset_BxL
    if reset_BxL is None:
      reset_BxL = jnp.zeros((rows, length), bool)
    index_1xL = jnp.arange(length)[None]
    begun_BxL = jax.lax.cummax(jnp.where(reset_BxL, index_1xL, -1), axis=1)
    _, _, z_BxLxD = forward((), toy_mixers(rows), piece, None, None)
    y_BxLxD = z_BxLxD
    for theta, (scale_n, own), period in zip(slow, writes, periods):
      alive_BxL = begun_BxL < index_1xL // period * period
      for i in range(n):
        mine = []
        for t, o in zip(theta, own):
          written = o[i] - jax.lax.stop_gradient(t[i])[None, None]
          written = written[jnp.arange(length) // period] * scale_n[i]
          written = jnp.moveaxis(written, 0, 1) * alive_BxL[..., None, None]
          mine.append(t[i][None, None] + written)
        gate, up, down = mine
        h = jnp.einsum('bld,bldf->blf', z_BxLxD, gate + up)
        y_BxLxD += jnp.einsum('blf,blfd->bld', h, down)
    return y_BxLxD

  def read(weights, z_BxLxD, alive_BxL):
    y_BxLxD = z_BxLxD
    for theta, delta in zip(slow, weights):
      for i in range(n):
        mine = [t[i][None] + d[i] for t, d in zip(theta, delta)]
        theirs = [jnp.broadcast_to(t[i][None], d[i].shape) for t, d in
                  zip(theta, delta)]  # fmt: skip
        own, empty = product(mine, z_BxLxD), product(theirs, z_BxLxD)
        if alive_BxL is not None:
          own = jnp.where(alive_BxL[..., None], own, empty)
        y_BxLxD += own
    return y_BxLxD

  def product(theta, z_BxLxD):
    gate, up, down = theta
    h = jnp.einsum('bld,bdf->blf', z_BxLxD, gate + up)
    return jnp.einsum('blf,bfd->bld', h, down)

  def loss(weights, y_BxLxD, z_BxLxD, piece, length_B):
    rows, width = piece.tokens_BxL.shape
    scored_BxL = objective.scored(piece.reset_BxL, length_B, rows, width)
    if not through:
      y_BxLxD = read(weights, z_BxLxD, None)
    error = y_BxLxD - jnp.roll(piece.x_BxLxD, -1, axis=1)
    half_BxL = 0.5 * jnp.square(error).sum(-1)
    count_B = scored_BxL.sum(1).astype(jnp.float32)
    return jnp.where(scored_BxL, half_BxL, 0.0).sum(1), count_B

  def own(k, delta):
    return Theta(*(t[:, None] + d for t, d in zip(slow[k], delta)))

  at_once = {'whole': whole, 'own': own} if periods else {}
  return Net(forward, loss, through, **at_once)


def toy_levels(cfg, rows=B):
  last = len(cfg.periods) - 1
  return tuple(
    levels_.init_state(cfg.update, n, rows, D, F, cfg.nested and k < last)
    for k in range(len(cfg.periods))
  )


def toy_mixers(rows=B):
  return jnp.zeros((1, rows, D))


def toy_state(cfg, rows=B):
  C = cfg.periods[0]
  levels = toy_levels(cfg, rows)
  return init_state(levels, toy_mixers(rows), C, rows, D, jnp.float32)


def piece(x_BxLxD, reset_BxL=None):
  tokens_BxL = jnp.zeros(x_BxLxD.shape[:2], jnp.int32)
  return Piece(x_BxLxD, tokens_BxL, reset_BxL)


class Plain:
  """One sequence of the toy, token by token, with its chunks written out.

  Every matrix has a leading axis of blocks. `stop` is applied to the gradients
  of a chunk: `lax.stop_gradient` for 'first_order'. Runs on numpy arrays, and
  on traced ones where its own gradient is wanted.
  """

  def __init__(self, cfg, slow, rates, stop=lambda g: g):
    self.cfg, self.slow, self.rates, self.stop = cfg, slow, rates, stop
    self.clock, self.skip, self.mixer, self.held = 0, False, np.zeros(D), []
    K = len(cfg.periods)
    self.commits = [0] * K
    self.count, self.origin_count = [0] * K, [0] * K
    self.total, self.origin_total = [self.zero()] * K, [self.zero()] * K
    self.forget()

  def zero(self):
    return Theta(np.zeros((n, D, F)), np.zeros((n, D, F)), np.zeros((n, F, D)))

  def forget(self):
    K = len(self.cfg.periods)
    for name in ('delta', 'total', 'moment', 'origin', 'origin_total'):
      setattr(self, name, [self.zero()] * K)
    self.count, self.origin_count = [0] * K, [0] * K

  def read(self, x_D, reset=False):
    C = self.cfg.periods[0]
    if reset:
      self.forget()
      self.mixer = np.zeros(D)
      self.skip = self.skip or self.clock % C != 0
    self.mixer = 0.5 * self.mixer + x_D
    z_D = x_D + self.mixer
    y_D = z_D + sum(
      z_D @ (gate + up) @ down for gate, up, down in self.matrices()
    )
    self.held.append((z_D, x_D))
    self.clock += 1
    if self.clock % C == 0:
      self.learn()
      for k, period in enumerate(self.cfg.periods):
        if self.clock % period == 0:
          self.commit(k)
      self.skip = False
    return y_D

  def matrices(self):
    for theta, delta in zip(self.slow, self.delta):
      for i in range(n):
        yield tuple(t[i] + d[i] for t, d in zip(theta, delta))

  def flush(self):
    self.learn()
    for k in range(len(self.cfg.periods)):
      self.commit(k)

  def learn(self):
    """Gathers the gradient of half the squared error of each pair."""
    held, self.held = self.held, []
    if self.skip or len(held) < 2:
      return
    for (z_D, _), (_, target_D) in zip(held, held[1:]):
      error = z_D - target_D
      error = error + sum(
        z_D @ (gate + up) @ down for gate, up, down in self.matrices()
      )
      for k, (theta, delta) in enumerate(zip(self.slow, self.delta)):
        weights = [t + d for t, d in zip(theta, delta)]
        blocks = [pair(z_D, error, *(w[i] for w in weights)) for i in range(n)]
        grads = [self.stop(stack(leaf)) for leaf in zip(*blocks)]
        self.total[k] = add(self.total[k], grads)
        self.origin_total[k] = add(self.origin_total[k], grads)
        self.count[k] += 1
        self.origin_count[k] += 1

  def commit(self, k):
    if self.count[k]:
      mean = clipped(self.cfg, self.total[k], self.count[k])
      rate = self.rates[k]
      if self.cfg.update.optimizer == 'momentum':
        beta = self.cfg.update.beta
        mean = [beta * m + g for m, g in zip(self.moment[k], mean)]
        self.moment[k] = mean
      if self.cfg.update.optimizer == 'dgd':
        rate = rate / (1 + rate)
      self.delta[k] = descend(self.delta[k], mean, rate)
      self.commits[k] += 1
    self.total[k], self.count[k] = self.zero(), 0
    if k and self.cfg.nested:
      self.restart(k - 1)

  def restart(self, k):
    if self.origin_count[k]:
      mean = clipped(self.cfg, self.origin_total[k], self.origin_count[k])
      self.origin[k] = descend(self.origin[k], mean, self.rates[k])
    self.delta[k], self.moment[k] = self.origin[k], self.zero()
    self.origin_total[k], self.origin_count[k] = self.zero(), 0


def space(x):
  return jnp if isinstance(x, jax.Array) else np


def stack(arrays):
  return space(arrays[0]).stack(arrays)


def pair(z_D, error_D, gate, up, down):
  """Gradients of the three matrices of one block for one pair of tokens."""
  inner = z_D[:, None] * (down @ error_D)[None]
  return inner, inner, (z_D @ (gate + up))[:, None] * error_D[None]


def add(tree, grads):
  return Theta(*(t + g for t, g in zip(tree, grads)))


def clipped(cfg, total, count):
  mean = [t / count for t in total]
  xp = space(mean[0])
  size = xp.sqrt(sum((g * g).sum((1, 2)) for g in mean))
  shrink = xp.minimum(1.0, cfg.update.clip / size)
  return [g * shrink[:, None, None] for g in mean]


def descend(tree, grads, rate):
  return Theta(*(w - rate[:, None, None] * g for w, g in zip(tree, grads)))


# name: (family, continuum); two blocks if not said otherwise, see
# `models_active_test.config`. Muon's
# steps are of one size however small the gradient, so that rounding grows fast:
# it gets a smaller rate.
MODELS = {
  'hope': (
    {'family': 'hope', 'N': 1},
    {
      'periods': (4, 8),
      'blocks': 'all',
      'variant': 'nested',
      'differentiate': 'full',
      'optimizer': 'momentum',
    },
  ),
  'local': (
    {'family': 'hope_attention'},
    {
      'periods': (3, 6),
      'blocks': 'last_quarter',
      'width': 'full',
      'objective': 'reconstruction',
      'optimizer': 'muon',
      'rate': 0.05,
    },
  ),
  'attention': (
    {'family': 'hope_attention'},
    {'periods': (4, 8, 16), 'blocks': '0', 'optimizer': 'muon', 'rate': 0.05},
  ),
  'windowed': (
    {'family': 'hope_attention', 'window': 5, 'G': 1, 'N': 1},
    {
      'periods': (3, 6),
      'blocks': 'all',
      'variant': 'independent',
      'objective': 'reconstruction',
      'differentiate': 'full',
      'optimizer': 'dgd',
    },
  ),
  'groups': (
    {'family': 'hope_attention'},
    {'periods': (4, 8), 'blocks': 'all', 'assign': 'groups'},
  ),
}
