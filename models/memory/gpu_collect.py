"""After the walk back on a GPU: every chunk by itself.

`collect` takes what the walk back found and finishes: the gradients of the
slow values, summed by groups of chunks, and of the inputs.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_tile
from nestax.models.memory.gpu_backward import scalars_of
from nestax.models.memory.gpu_forward import (
  Shape,
  call,
  marks_of,
  saved_of,
  slow_of,
  tokens_of,
)
from nestax.models.memory.gpu_tile import Fast
from nestax.models.memory.types import GATES

WARPS = 4
STAGES = 1
GROUP = 8  # chunks whose slow gradients one program sums


def collect(shape: Shape, given, stream, saved, prepared, turned, d_out):
  """Gradients: (slow maps, rows, biases), key, value."""
  cfg, K = shape.cfg, shape.K
  B, H = given.fast.shape[:2]
  groups = -(-shape.n // GROUP)
  narrow = given._replace(maps=given.maps.astype(shape.dtype))
  sums = (
    jax.ShapeDtypeStruct((B, H, groups, len(cfg.boxes) * K, K), jnp.float32),
    jax.ShapeDtypeStruct((B, H, groups, 2, K), jnp.float32),
  )
  d_tokens = tuple(
    jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (stream.key, stream.value)
  )
  lean = prepared._replace(
    turned_k=None, Z=None, d_k=None, d_rhs=None, d_L=None, keep=None,
    d_mem=None,
  )  # fmt: skip
  (maps, rows), (d_key, d_value) = call(
    _collect_kernel, shape, (groups, H, B),
    (narrow[:3], stream[:5], saved, lean, turned, d_out),
    (sums, d_tokens), 'memory_collect', WARPS, STAGES,
  )  # fmt: skip
  biases = jnp.sum(turned.d_logits, axis=(0, 2, 4))
  d_slow = (jnp.sum(maps, axis=(0, 2)), jnp.sum(rows, axis=(0, 2)), biases)
  return d_slow, d_key, d_value


def _collect_kernel(shape: Shape, given, stream, saved, prepared, turned,
                    d_out, sums, d_tokens):  # fmt: skip
  cfg, K = shape.cfg, shape.K
  group, h, b = (pl.program_id(axis) for axis in range(3))
  slow = slow_of(shape, *given, h)

  def chunk(i, d_slow):
    return _collect_chunk(
      shape, slow, stream, saved, prepared, turned, d_out, d_tokens,
      (b, h, i), d_slow,
    )  # fmt: skip

  zero = jnp.zeros((K, K), jnp.float32)
  zeros = Fast(
    {box: zero for box in cfg.boxes},
    {gate: jnp.zeros((K,), jnp.float32) for gate in GATES},
  )
  first = group * GROUP
  last = jnp.minimum(first + GROUP, shape.n)
  d_slow = jax.lax.fori_loop(first, last, chunk, zeros)
  maps, rows = sums
  for j, box in enumerate(cfg.boxes):
    maps[b, h, group, pl.ds(j * K, K), :] = d_slow.maps[box]
  for j, gate in enumerate(GATES):
    rows[b, h, group, j, :] = d_slow.rows[gate]


def _collect_chunk(shape, slow, stream, saved, prepared, turned, d_out_ref,
                   d_tokens, at, d_slow: Fast) -> Fast:  # fmt: skip
  cfg, dots = shape.cfg, shape.dots
  b, h, i = at
  query, key, value, document, live = stream
  fast = saved_of(shape, saved, b, h, i)
  marks = marks_of(document, live, b, i)
  gate = scalars_of(shape, prepared.scalars, b, h, i).gate
  decay = gpu_tile.decays(gate, marks)
  alive = decay.alive
  k, v = (x[b, h, i].astype(jnp.float32) for x in (prepared.k, prepared.v))
  lw = -decay.eta[:, None] * gpu_tile.point(cfg, k, v)
  query, key, value = (
    tokens_of(shape, x, b, h, i) for x in (query, key, value)
  )
  maps, rows = dict(d_slow.maps), dict(d_slow.rows)
  for box, ref in zip(cfg.boxes, turned.d_rhs):
    maps[box] = maps[box] + dots.tn(ref[b, h, i], lw)
  q, _ = gpu_tile.unit(query.astype(jnp.float32))
  d_out = tokens_of(shape, d_out_ref, b, h, i)
  maps['mem'] = maps['mem'] + dots.tn(d_out, q)

  d_x = {}
  for box, x, ref in (
    ('k', key, turned.d_key),
    ('v', value, turned.d_value),
  ):
    d_y = ref[b, h, i]
    d_x[box] = d_y.astype(jnp.float32)
    if box in cfg.boxes:
      back = dots.nn(d_y, fast.maps[box])
      back = back if alive is None else alive[:, None] * back
      back = back + dots.nn(d_y, slow.maps[box])
      d_x[box] = d_x[box] + back if box in cfg.identity else back
      maps[box] = maps[box] + dots.tn(d_y, x)
  wide_key = key.astype(jnp.float32)
  for j, name in enumerate(GATES):
    d_logit = turned.d_logits[b, h, i, j, :][:, None]
    row = slow.rows[name][None, :]
    rows[name] = rows[name] + jnp.sum(d_logit * wide_key, axis=0)
    if name in cfg.gates:
      r = fast.rows[name][None, :]
      row = row + (r if alive is None else alive[:, None] * r)
      d_rhs = turned.d_rows[b, h, i, cfg.gates.index(name), :]
      rows[name] = rows[name] + jnp.sum(d_rhs[:, None] * lw, axis=0)
    d_x['k'] = d_x['k'] + d_logit * row
  for box, ref in zip(('k', 'v'), d_tokens):
    x = d_x[box].astype(ref.dtype)
    ref[b, pl.ds(i * shape.C, shape.C), h, :] = x
  return Fast(maps, rows)
