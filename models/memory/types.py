"""Dimension key, configuration and state of the self-referential memory.

Letters: B sequences, L tokens, H heads, K head width, C tokens of a chunk,
F hidden width of a two-layer memory (`expansion * K`), R rows of the stack.

Every map that takes the key itself as its input stands in one stacked matrix
`[R, K]`: K rows for a matrix memory, F rows (its first layer) for a two-layer
one, one row for a gate. They share key, rate and decay, so that a chunk is a
few wide matmuls. The second layers `[K, F]` have keys of their own.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nestax.models import fields

GATES = ('eta', 'alpha')
READS = ('token', 'boundary')
ANCHORS = ('initial', 'zero')
IMPLEMENTATIONS = ('token', 'scan', 'pallas')
OBJECTIVES = ('l2', 'dot')
STEP = 64  # most tokens of one system where `mem` changes at every token
SAVED = 'memory_kernels'  # what a policy of recomputation may keep


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """The rule by which one head remembers (NL Eq. 83-93; Table 6's ablations).

  Attributes:
    chunk_mem: tokens between two boundaries of `mem`.
    chunk_rest: tokens between two boundaries of every other memory; the
      larger of the two chunks is a multiple of the smaller.
    depth_mem: 1 for a matrix memory, 2 for a two-layer one (Eq. 89).
    depth_rest: the same for the memories k, v and q; gates are vectors.
    expansion: hidden width of a two-layer memory in head widths.
    momentum: the inner gradient is gathered as `S = beta S - eta grad`.
    delta: DGD's decay along the key, `- eta k k^T`; False is plain descent.
    retention: the forget gate alpha; False holds it at 1.
    read: 'token' reads the running memory, 'boundary' the chunk's first.
    anchor: what retention decays towards: the 'initial' value, or 'zero' (the
      paper as printed).
    objective: 'l2', `||M(k) - vhat||^2 / 2`, or 'dot', `-<M(k), vhat>`.
    adaptive: which of q, k, v, eta, alpha are memories; the others stay slow.
    identity: which maps carry the residual `M(z) = z + ...`.
    generated: each memory generates its own value `vhat = v + M(v)`; False
      makes v itself the value of all (Titans).
    given: which of the gates eta and alpha the layer hands in (see `Inputs`)
      instead of kernels to read them by: the linear recurrences have gates of
      their own forms.
    key_norm: q and k have unit norm; the delta rule needs it.
    value_norm: v has unit norm.
    eta_max: upper bound of the inner learning rate. Steps of unit keys are
      stable up to 1 without momentum; with it the gain is eta / (1 - beta).
      Without `delta` the steps of a chunk add up, and alike keys diverge where
      they come to 2: Titans and TTT bound a chunk's steps together by it (see
      `models.gates`), elsewhere keep `chunk_mem * eta_max` below 2.
    eta_bias: first bias of its gate: eta begins near
      `eta_max * sigmoid(eta_bias)`, a tenth of the bound unless given.
    eta_spread: how far the last head's first bias is below the first one's,
      the others evenly between: fast heads follow a state, slow ones count.
    bounded: a two-layer memory's steps are divided by their gain where it
      exceeds 1 (see `outer_gain`, `inner_gain`); False is the bare rule.
    remat: recompute a chunk's inner values in the backward pass.
    stride: chunks (of `step` tokens) from one boundary that is kept for the
      backward pass to the next; the chunks between are walked again from there.
      'scan' and a TPU's kernels do so. A GPU's, which work on many chunks at
      once, take 16 or somewhat less where 2 to 15 are asked for. The token rule
      keeps every token's state, whatever is asked for, and `twice` up to four
      chunks'.
    implementation: one of IMPLEMENTATIONS; '' picks by length, shape and
      machine, see `api.run`.
    twice: kernels are differentiated twice, see `memory.twice`.
  """

  chunk_mem: int = 64
  chunk_rest: int = 64
  depth_mem: int = 1
  depth_rest: int = 1
  expansion: int = 4
  momentum: bool = False
  delta: bool = True
  retention: bool = True
  read: str = 'token'
  anchor: str = 'initial'
  objective: str = 'l2'
  adaptive: tuple[str, ...] = ('k', 'v', 'eta', 'alpha')
  identity: tuple[str, ...] = ('q', 'k', 'v')
  generated: bool = True
  given: tuple[str, ...] = ()
  key_norm: bool = True
  value_norm: bool = True
  eta_max: float = 0.5
  eta_bias: float = -2.0
  eta_spread: float = 0.0
  bounded: bool = True
  remat: bool = True
  stride: int = 1
  implementation: str = ''
  twice: bool = False

  def __post_init__(self):
    fields.check(self)
    small, big = sorted((self.chunk_mem, self.chunk_rest))
    if small < 1 or big % small:
      raise ValueError(
        f'chunk_mem={self.chunk_mem} and chunk_rest={self.chunk_rest}: the '
        'larger must be a multiple of the smaller, both at least 1'
      )
    for name in ('depth_mem', 'depth_rest'):
      if getattr(self, name) not in (1, 2):
        raise ValueError(f'{name}={getattr(self, name)!r}: 1 or 2')
    for name, known in (
      ('read', READS),
      ('anchor', ANCHORS),
      ('objective', OBJECTIVES),
      ('implementation', ('', *IMPLEMENTATIONS)),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f'{name}={getattr(self, name)!r}: one of {known}')
    for name, known in (
      ('adaptive', ('q', 'k', 'v', *GATES)),
      ('identity', ('q', 'k', 'v', 'mem')),
      ('given', GATES),
    ):
      wrong = set(getattr(self, name)) - set(known)
      if wrong:
        raise ValueError(f'{name}: {sorted(wrong)} not among {known}')
      if len(set(getattr(self, name))) < len(getattr(self, name)):
        raise ValueError(f'{name}={getattr(self, name)}: each name once')
    if not self.generated and set(GATES) & set(self.adaptive):
      raise ValueError(
        'generated=False: a gate is a scalar and has no value but its own; '
        f'take {GATES} out of adaptive={self.adaptive}'
      )
    if set(self.given) & set(self.adaptive):
      raise ValueError(
        f'given={self.given} and adaptive={self.adaptive}: a gate that the '
        'layer hands in is no memory'
      )
    if 'alpha' in self.given and not self.retention:
      raise ValueError(
        f'given={self.given} and retention=False: without the forget gate '
        'there is no alpha to hand in'
      )
    if self.expansion < 1:
      raise ValueError(f'expansion={self.expansion}: at least 1')
    if self.stride < 1:
      raise ValueError(
        f'stride={self.stride}: chunks between two boundaries that are kept, '
        'at least 1'
      )
    if not 0 < self.eta_max <= 1:
      raise ValueError(f'eta_max={self.eta_max}: above 0 and at most 1')
    if not abs(self.eta_bias) <= 20:
      raise ValueError(
        f'eta_bias={self.eta_bias}: -20 to 20, beyond which a sigmoid is flat'
      )
    if not 0 <= self.eta_spread <= 20:
      raise ValueError(f'eta_spread={self.eta_spread}: 0 to 20')

  @property
  def boxes(self) -> tuple[str, ...]:
    """The memories that are maps, in their order on the stack."""
    return tuple(b for b in ('q', 'k', 'v') if b in self.adaptive) + ('mem',)

  @property
  def gates(self) -> tuple[str, ...]:
    """The gates that are memories."""
    return tuple(g for g in GATES if g in self.adaptive)

  def depth(self, box: str) -> int:
    return self.depth_mem if box == 'mem' else self.depth_rest

  @property
  def deep(self) -> tuple[str, ...]:
    """The two-layer memories."""
    return tuple(b for b in self.boxes if self.depth(b) == 2)

  def rows(self, K: int) -> dict[str, tuple[int, int]]:
    """First and last-but-one row of every memory on the stack."""
    ranges, row = {}, 0
    for box in self.boxes:
      size = K * self.expansion if box in self.deep else K
      ranges[box] = (row, row + size)
      row += size
    for gate in self.gates:
      ranges[gate] = (row, row + 1)
      row += 1
    return ranges

  @property
  def chunks(self) -> tuple[int, int]:
    """The smaller and the larger chunk, in tokens."""
    return tuple(sorted((self.chunk_mem, self.chunk_rest)))

  @property
  def running(self) -> bool:
    """Whether `mem` regresses at every token to what it is by then, linearly.

    Then a chunk of the others is solved at once, see `chunk.write_running`.
    """
    alone = self.chunk_mem == 1 < self.chunk_rest and self.depth_mem == 1
    return alone and self.read == 'token' and not self.momentum

  @property
  def step(self) -> int:
    """Tokens that `chunk.chunk_step` takes at a time."""
    if not self.running:
      return self.chunks[0]
    fits = range(min(self.chunk_rest, STEP), 0, -1)
    return next(n for n in fits if self.chunk_rest % n == 0)


class Weights(NamedTuple):
  """One value of all memories: initial values, fast parts or momenta."""

  stack: jax.Array  # [..., R, K]
  outer: dict[str, jax.Array]  # second layers, [..., K, F]


class MemoryState(NamedTuple):
  """What the memories of one layer carry from token to token, float32."""

  boundary: Weights  # fast parts at the start of the chunk, [B, H, ...]
  running: Weights  # fast parts after the last token
  momentum: Weights | None
  position_B: jax.Array  # int32, tokens since the larger chunk began


class Inputs(NamedTuple):
  """What a layer hands to its memories: slow projections after convolution.

  `log_beta` is the log of the momentum gate; None without momentum. Logs may be
  -inf, for gates of zero: `api.run` takes all below -30 for -30. `reset`
  is True where a document starts (the memories forget there); None: nowhere.
  `eta` and `log_alpha` are the gates that `MemoryConfig.given` names, or None.
  """

  query: jax.Array  # [B, L, H, K]
  key: jax.Array
  value: jax.Array
  log_beta: jax.Array | None  # [B, L, H], float32
  reset: jax.Array | None  # [B, L], bool
  eta: jax.Array | None = None  # [B, L, H], float32, at least 0
  log_alpha: jax.Array | None = None  # the same, at most 0


def stack_initial(cfg: MemoryConfig, initial) -> Weights:
  """Lays the slow initial values out as the fast parts are.

  Args:
    cfg: the rule.
    initial: box -> {'kernel'} or {'inner', 'outer'}; gate -> {'kernel',
      'bias'}; leaves `[..., K, K]`, `[..., F, K]`, `[..., K, F]`, `[..., K]`.

  Raises:
    ValueError: for a memory that is not there or of another depth or size.
  """
  K = _width(cfg, initial)
  F = K * cfg.expansion
  for box in reversed(cfg.boxes):  # `mem`, which says how wide all are, first
    parts = {'inner': (F, K), 'outer': (K, F)}
    _check_box(initial, box, parts if box in cfg.deep else {'kernel': (K, K)})
  for gate in cfg.gates:
    _check_box(initial, gate, {'kernel': (K,), 'bias': ()})
  rows = [
    initial[box]['inner' if box in cfg.deep else 'kernel'] for box in cfg.boxes
  ]
  rows += [initial[gate]['kernel'][..., None, :] for gate in cfg.gates]
  outer = {box: initial[box]['outer'] for box in cfg.deep}
  return Weights(jnp.concatenate(rows, axis=-2), outer)


def _width(cfg: MemoryConfig, initial) -> int:
  mem = initial.get('mem', {})
  parts = [mem[part] for part in ('kernel', 'inner') if part in mem]
  return parts[0].shape[-1] if parts else 0


def _check_box(initial, box: str, shapes) -> None:
  for part, shape in shapes.items():
    if box not in initial or part not in initial[box]:
      raise ValueError(
        f'initial: no [{box!r}][{part!r}]; this rule has a memory {box!r} of '
        f'{" and ".join(shapes)}'
      )
    found = initial[box][part].shape
    if found[len(found) - len(shape) :] != shape:
      raise ValueError(
        f'initial[{box!r}][{part!r}] of the shape {found}: its last axes have '
        f'to be {shape}'
      )


def init_state(
  cfg: MemoryConfig, B: int, H: int, K: int, dtype=jnp.float32
) -> MemoryState:
  """Empty memories for B sequences: nothing written, at a boundary."""
  R = max(stop for _, stop in cfg.rows(K).values())
  F = K * cfg.expansion

  def zeros():
    outer = {box: jnp.zeros((B, H, K, F), dtype) for box in cfg.deep}
    return Weights(jnp.zeros((B, H, R, K), dtype), outer)

  momentum = zeros() if cfg.momentum else None
  return MemoryState(zeros(), zeros(), momentum, jnp.zeros((B,), jnp.int32))


def varying_as(state, given):
  """A fresh state that under `shard_map` varies with what will write on it."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return state
  zeros = [jnp.zeros_like(x.reshape(-1)[0]) for x in jax.tree.leaves(given)]
  return jax.tree.map(
    lambda x: x + sum(zero.astype(x.dtype) for zero in zeros), state
  )


def wide(x):
  """At least float32: what sums, norms and states are kept in."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x, eps: float = 1e-6):
  """`x / ||x||` along the last axis, at least float32."""
  x = wide(x)
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def outer_gain(h):
  """`max(1, ||h||)`, by which the second layer's step must shrink.

  The layer is written with the unit key `h / ||h||` and read at `h`: beyond
  `||h|| = 2` an undivided step overshoots by more than it corrects.
  """
  return jnp.sqrt(jnp.maximum(1.0, jnp.sum(h * h, axis=-1, keepdims=True)))


def inner_gain(e, below):
  """`max(1, ||g||^2 / ||e||^2)`, the same for the first layer.

  A step of rate eta along its gradient `g = gelu' * (W1^T e)` moves the output
  by `- eta ||g||^2 / ||e||^2` along `e`.
  """
  size = jnp.sum(e * e, axis=-1, keepdims=True) + 1e-6
  return jnp.maximum(1.0, jnp.sum(below * below, -1, keepdims=True) / size)


def named(tree):
  """Names what a kernel's forward pass gives, for policies of recomputation."""
  return jax.tree.map(lambda x: checkpoint_name(x, SAVED), tree)
