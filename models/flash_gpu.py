"""Softmax attention over documents and windows in blocks, for GPUs.

Pallas (Triton) kernels that never hold more than a block of logits, so that
memory grows with the length and not with its square. Query t sees the keys
`first_t .. t`, where `first` never falls along a row: that covers documents,
windows and both at once, and a block of queries then visits one range of
blocks of keys, of which only the outer ones need a mask. Short documents are
therefore cheaper than long ones.
"""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory.gpu_tile import Dots
from nestax.models.memory.gpu_triton import LACKS, triton
from nestax.models.memory.pallas_gpu import capability
from nestax.models.memory.types import named

WIDTHS = (16, 32, 64, 128)  # of heads
OLDEST = 8  # compute capability: the first that multiplies bfloat16
ROOMY = ('8.0', '9.0', '10.0')  # with more than 100 KiB of a block's memory
UNSEEN = -1e30  # a logit; finite, for blocks of which a query sees nothing
LONGEST = 64  # of all blocks: what lengths are made a multiple of
_PER_E = math.log2(math.e)  # the kernels' exponentials are of base two


class Blocks(NamedTuple):
  """Sizes of a kernel: tokens of its own, tokens a visit, warps, stages."""

  own: int
  visit: int
  warps: int
  stages: int


class Sizes(NamedTuple):
  """Of the kernels forward, for the gradients of keys and of queries."""

  forward: Blocks
  keys: Blocks
  queries: Blocks


NARROW = Sizes(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3))
WIDE = Sizes(Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))
WIDEST = Sizes(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2))


class Kind(NamedTuple):
  """What kernels are compiled for."""

  dtype: jnp.dtype
  width: int  # of heads
  group: int  # query heads that share a head of keys
  interpret: bool

  @property
  def scale(self) -> float:
    return self.width**-0.5

  @property
  def sizes(self) -> Sizes:
    """Such that tiles fit a block's shared memory and registers."""
    moved = self.width * self.dtype.itemsize
    return NARROW if moved <= 128 else WIDE if moved <= 256 else WIDEST

  @property
  def dots(self) -> Dots:
    return Dots(self.dtype, self.interpret)

  def logits(self, a, b):
    """Of a tile's rows against another's, in base two."""
    return self.dots.nt(a, b) * (self.scale * _PER_E)


def _tokens(block, size: int):
  return block * size + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def _blocks(tokens, size: int):
  """How many blocks begin before so many tokens."""
  return jax.lax.div(tokens + size - 1, size)


def _over(bounds, visit, carry):
  """Visits three ranges of blocks that meet: outer, inner, outer ones."""
  for low, high, masked in zip(bounds, bounds[1:], (True, False, True)):
    body = functools.partial(visit, masked)
    carry = jax.lax.fori_loop(low, high, body, carry)
  return carry


def _keys_of(first_ref, b, i, own: int, visit: int):
  """Bounds of the blocks of keys that block i of queries sees, for `_over`."""
  lowest, highest = first_ref[b, i * own], first_ref[b, i * own + own - 1]
  end = _blocks((i + 1) * own, visit)
  free = jnp.minimum(_blocks(highest, visit), end)
  diagonal = jnp.maximum(free, jax.lax.div(i * own, visit))
  return jax.lax.div(lowest, visit), free, diagonal, end


def _program(kind: Kind):
  """Of queries: (block, head of queries, head of keys, row)."""
  # the blocks that see most begin first
  i = pl.num_programs(0) - 1 - pl.program_id(0)
  h, b = pl.program_id(1), pl.program_id(2)
  return i, h, jax.lax.div(h, kind.group), b


def _forward_kernel(kind: Kind, q_ref, k_ref, v_ref, first_ref, o_ref, lse_ref):
  own, visit, *_ = kind.sizes.forward
  i, h, g, b = _program(kind)
  rows = pl.ds(i * own, own)
  q, first, token = q_ref[b, rows, h, :], first_ref[b, rows], _tokens(i, own)

  def step(masked, j, carry):
    o, top, total = carry
    keys = pl.ds(j * visit, visit)
    s = kind.logits(q, k_ref[b, keys, g, :])
    if masked:
      at = _tokens(j, visit)[None]
      seen = (at >= first[:, None]) & (at <= token[:, None])
      s = jnp.where(seen, s, UNSEEN)
    higher = jnp.maximum(top, jnp.max(s, axis=1))
    p = jnp.exp2(s - higher[:, None])
    # what a query took from a block that it does not see fades to nothing, for
    # it sees itself at last
    fade = jnp.exp2(top - higher)
    o = o * fade[:, None] + kind.dots.nn(p, v_ref[b, keys, g, :])
    return o, higher, total * fade + jnp.sum(p, axis=1)

  o = jnp.zeros((own, kind.width), jnp.float32)
  top, total = jnp.full((own,), UNSEEN), jnp.zeros((own,), jnp.float32)
  bounds = _keys_of(first_ref, b, i, own, visit)
  o, top, total = _over(bounds, step, (o, top, total))
  o_ref[b, rows, h, :] = (o / total[:, None]).astype(o_ref.dtype)
  lse_ref[b, h, rows] = top + jnp.log2(total)


def _queries_kernel(kind: Kind, q_ref, k_ref, v_ref, first_ref, d_o_ref,
                    lse_ref, delta_ref, d_q_ref):  # fmt: skip
  own, visit, *_ = kind.sizes.queries
  i, h, g, b = _program(kind)
  rows = pl.ds(i * own, own)
  q, first, token = q_ref[b, rows, h, :], first_ref[b, rows], _tokens(i, own)
  d_o = d_o_ref[b, rows, h, :]
  lse, delta = lse_ref[b, h, rows][:, None], delta_ref[b, h, rows][:, None]

  def step(masked, j, d_q):
    keys = pl.ds(j * visit, visit)
    k = k_ref[b, keys, g, :]
    p = jnp.exp2(kind.logits(q, k) - lse)
    if masked:
      at = _tokens(j, visit)[None]
      seen = (at >= first[:, None]) & (at <= token[:, None])
      p = jnp.where(seen, p, 0.0)
    d_p = kind.dots.nt(d_o, v_ref[b, keys, g, :])
    return d_q + kind.dots.nn(p * (d_p - delta), k)

  d_q = jnp.zeros((own, kind.width), jnp.float32)
  d_q = _over(_keys_of(first_ref, b, i, own, visit), step, d_q)
  d_q_ref[b, rows, h, :] = (d_q * kind.scale).astype(d_q_ref.dtype)


def _keys_kernel(kind: Kind, q_ref, k_ref, v_ref, first_ref, d_o_ref, lse_ref,
                 delta_ref, all_ref, any_ref, d_k_ref, d_v_ref):  # fmt: skip
  own, visit, *_ = kind.sizes.keys
  j, g, b = (pl.program_id(axis) for axis in range(3))
  keys = pl.ds(j * own, own)
  k, v, at = k_ref[b, keys, g, :], v_ref[b, keys, g, :], _tokens(j, own)
  end = _blocks(any_ref[b, j], visit)
  free = jnp.minimum(_blocks((j + 1) * own, visit), end)
  border = jnp.maximum(free, jax.lax.div(all_ref[b, j], visit))
  bounds = jax.lax.div(j * own, visit), free, border, end

  def step(h, masked, i, carry):
    d_k, d_v = carry
    rows = pl.ds(i * visit, visit)
    q, d_o = q_ref[b, rows, h, :], d_o_ref[b, rows, h, :]
    p = jnp.exp2(kind.logits(k, q) - lse_ref[b, h, rows][None])
    if masked:
      token, first = _tokens(i, visit), first_ref[b, rows]
      seen = (at[:, None] >= first[None]) & (at[:, None] <= token[None])
      p = jnp.where(seen, p, 0.0)
    d_s = p * (kind.dots.nt(v, d_o) - delta_ref[b, h, rows][None])
    return d_k + kind.dots.nn(d_s, q), d_v + kind.dots.nn(p, d_o)

  carry = (jnp.zeros((own, kind.width), jnp.float32),) * 2
  for member in range(kind.group):
    visit_all = functools.partial(step, g * kind.group + member)
    carry = _over(bounds, visit_all, carry)
  d_k, d_v = carry
  d_k_ref[b, keys, g, :] = (d_k * kind.scale).astype(d_k_ref.dtype)
  d_v_ref[b, keys, g, :] = d_v.astype(d_v_ref.dtype)


def _call(kernel, kind: Kind, blocks: Blocks, heads: int, args, like, name):
  """Compiled for CUDA, interpreted anywhere else."""
  B, L = args[0].shape[:2]

  def call(interpret: bool, *args):
    return pl.pallas_call(
      functools.partial(kernel, kind._replace(interpret=interpret)),
      grid=(L // blocks.own, heads, B),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
      compiler_params=triton.CompilerParams(
        num_warps=blocks.warps, num_stages=blocks.stages
      ),
      interpret=interpret,
      name=name,
    )(*args)

  if kind.interpret:
    return call(True, *args)
  return jax.lax.platform_dependent(
    *args,
    cuda=functools.partial(call, False),
    default=functools.partial(call, True),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kind: Kind, q, k, v, first):
  """(output, log of each query's sum `[B, H, L]`)."""
  return _forward(kind, q, k, v, first)[0]


def _forward(kind: Kind, q, k, v, first):
  B, L, H, _ = q.shape
  lse = jax.ShapeDtypeStruct((B, H, L), jnp.float32)
  o, lse = named(
    tuple(
      _call(
        _forward_kernel, kind, kind.sizes.forward, H, (q, k, v, first),
        (q, lse), 'attention_forward',
      )
    )
  )  # fmt: skip
  return (o, lse / _PER_E), (q, k, v, first, o, lse)


def _backward(kind: Kind, saved, gradients):
  q, k, v, first, o, lse = saved
  d_o, d_lse = gradients
  d_o = d_o.astype(q.dtype)
  own = jnp.einsum('blhk,blhk->bhl', o, d_o, preferred_element_type=jnp.float32)
  args = q, k, v, first, d_o, lse, own - d_lse
  (d_q,) = _call(
    _queries_kernel, kind, kind.sizes.queries, q.shape[2], args, (q,),
    'attention_queries',
  )  # fmt: skip
  d_k, d_v = _call(
    _keys_kernel, kind, kind.sizes.keys, k.shape[2],
    (*args, *_queries_of(first, kind.sizes.keys.own)), (k, v),
    'attention_keys',
  )  # fmt: skip
  return d_q, d_k, d_v, None


_attention.defvjp(_forward, _backward)


def _queries_of(first_BxL, own: int):
  """Of each block of keys: before which query all of it is seen, and any."""
  start = jnp.arange(0, first_BxL.shape[1], own, dtype=jnp.int32)
  until = functools.partial(jnp.searchsorted, side='right')
  until = jax.vmap(until, (0, None))
  return [
    until(first_BxL, key).astype(jnp.int32) for key in (start, start + own - 1)
  ]


def unfit(dtype, width: int) -> str:
  """Why the kernels do not take heads of this width, in words; '' if they do.

  Args:
    dtype: of queries, keys and values.
    width: of heads.
  """
  if triton is None:
    return LACKS
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    return f'attention in {jnp.dtype(dtype)}: bfloat16 or float32'
  if width not in WIDTHS:
    return f'heads of width {width}: one of {WIDTHS}'
  if not bfloats():
    return f'a GPU of compute capability {capability()!r}: {OLDEST}.0 or newer'
  if width * jnp.dtype(dtype).itemsize > 128 and capability() not in ROOMY:
    return (
      f'{jnp.dtype(dtype)} heads of width {width} on a GPU of compute '
      f'capability {capability()!r}: {ROOMY} have the memory'
    )
  return ''


def bfloats() -> bool:
  """Whether the GPU is NVIDIA's, and new enough to multiply bfloat16."""
  found = re.fullmatch(r'(\d+)\.\d+', capability() or '')
  return found is not None and int(found[1]) >= OLDEST


def attention(q, k, v, first, *, interpret: bool = False):
  """Causal softmax attention of each query over the keys from `first` on.

  Sums are float32. It can be differentiated once.

  Args:
    q: `[B, L, H, K]`, K one of WIDTHS.
    k, v: `[B, L, G, K]`, H a multiple of G, of q's dtype: bfloat16 or float32.
    first: `[B, L]` int32, the first key that each query sees, at most its own
      position and never less than the query's before.
    interpret: runs on any machine, slowly.

  Returns:
    (`[B, L, H, K]` of q's dtype, the log of each query's sum of exponentials
    `[B, H, L]` float32).
  """
  L, H, K = q.shape[1:]
  more = -L % LONGEST
  if more:
    # padded queries see padded keys only
    wide = (0, 0), (0, more), (0, 0), (0, 0)
    q, k, v = (jnp.pad(x, wide) for x in (q, k, v))
    first = jnp.pad(first, wide[:2], constant_values=L)
  kind = Kind(jnp.dtype(q.dtype), K, H // k.shape[2], interpret)
  o, lse = _attention(kind, q, k, v, first)
  return o[:, :L], lse[..., :L]
