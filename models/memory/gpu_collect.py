"""After the walk back on a GPU: every chunk by itself.

`collect` takes what the walk back found and finishes: the gradients of the
slow values, summed by groups of chunks, and of the inputs.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_tile
from nestax.models.memory.gpu_layout import (
  Shape,
  call,
  lay,
  marks_of,
  put_tokens,
  scalars_of,
  tokens_of,
)
from nestax.models.memory.types import GATES

WARPS = 8
STAGES = 1
GROUP = 8  # chunks whose slow gradients one program sums


def collect(shape: Shape, given, stream, saved, turned, d_out):
  """Gradients: (slow stack, rows, biases), key, value."""
  K, boxes = shape.K, len(shape.cfg.boxes)
  B, H = given.fast.shape[:2]
  groups = -(-shape.n // GROUP)

  def sums(*tail):
    return jax.ShapeDtypeStruct((B, H, groups, *tail), jnp.float32)

  d_tokens = tuple(
    jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (stream.key, stream.value)
  )
  lean = saved._replace(T=None, Z=None)
  (stack, maps, rows), (d_key, d_value) = call(
    _collect_kernel, shape, (groups, H, B),
    (lay(shape, given), stream[:5], lean, turned, d_out),
    ((sums(shape.N, K), sums(boxes, K, K), sums(2, K)), d_tokens),
    'memory_collect', WARPS, STAGES,
  )  # fmt: skip
  stack, maps, rows = (jnp.sum(x, axis=(0, 2)) for x in (stack, maps, rows))
  stack = stack[:, : shape.R]
  stack = stack.at[:, : boxes * K].add(maps.reshape(H, boxes * K, K))
  biases = jnp.sum(turned.d_logits, axis=(0, 2, 4))
  return (stack, rows, biases), d_key, d_value


def _collect_kernel(shape: Shape, slow, stream, saved, turned, d_out, sums,
                    d_tokens):  # fmt: skip
  K = shape.K
  group, h, b = (pl.program_id(axis) for axis in range(3))

  def chunk(i, d_slow):
    refs = slow, stream, saved, turned, d_out, d_tokens
    return _collect_chunk(shape, refs, (b, h, i), d_slow)

  zero = jnp.zeros((K, K), jnp.float32)
  zeros = (
    jnp.zeros((shape.N, K), jnp.float32),
    {box: zero for box in shape.cfg.boxes},
    tuple(jnp.zeros((K,), jnp.float32) for _ in GATES),
  )
  first = group * GROUP
  last = jnp.minimum(first + GROUP, shape.n)
  d_stack, d_maps, d_rows = jax.lax.fori_loop(first, last, chunk, zeros)
  stack, maps, rows = sums
  stack[b, h, group, :, :] = d_stack
  for j, box in enumerate(shape.cfg.boxes):
    maps[b, h, group, j, :, :] = d_maps[box]
  for j in range(len(GATES)):
    rows[b, h, group, j, :] = d_rows[j]


def _collect_chunk(shape: Shape, refs, at, d_slow):
  cfg, dots = shape.cfg, shape.dots
  slow, stream, saved, turned, d_out_ref, d_tokens = refs
  b, h, i = at
  query, key, value, document, live = stream
  decay = gpu_gates.decays(
    scalars_of(shape, saved, at)[0], marks_of(document, live, at)
  )
  d_stack, maps, rows = d_slow[0], dict(d_slow[1]), list(d_slow[2])
  k, v = (x[b, h, i].astype(jnp.float32) for x in (saved.k, saved.v))
  lw = -decay.eta[:, None] * gpu_tile.point(cfg, k, v)
  d_stack = d_stack + dots.nn(turned.d_rhs[b, h, i], lw)
  query, key, value = (tokens_of(shape, x, at) for x in (query, key, value))
  q, _ = gpu_tile.unit(query.astype(jnp.float32))
  maps['mem'] = maps['mem'] + dots.tn(tokens_of(shape, d_out_ref, at), q)

  for box, x, ref, d_x_ref in (
    ('k', key, turned.d_key, d_tokens[0]),
    ('v', value, turned.d_value, d_tokens[1]),
  ):
    d_y = ref[b, h, i]
    d_x = d_y.astype(jnp.float32)
    if box in cfg.boxes:
      at_rows = shape.box(box)
      back = dots.nn(d_y, saved.D[b, h, i, at_rows, :])
      back = back if decay.alive is None else decay.alive[:, None] * back
      back = back + dots.nn(d_y, slow.stack[h, at_rows, :])
      d_x = d_x + back if box in cfg.identity else back
      maps[box] = maps[box] + dots.tn(d_y, x)
    if box == 'k':
      d_x = d_x + _gates_back(shape, slow, saved, turned, at, decay.alive)
    put_tokens(shape, d_x_ref, at, d_x)
  wide_key = key.astype(jnp.float32)
  for j in range(len(GATES)):
    d_logit = turned.d_logits[b, h, i, j, :][:, None]
    rows[j] = rows[j] + jnp.sum(d_logit * wide_key, axis=0)
  return d_stack, maps, tuple(rows)


def _gates_back(shape: Shape, slow, saved, turned, at, alive):
  """Gradient of the key by the gates' logits."""
  b, h, i = at
  d_key = jnp.zeros((shape.C, shape.K), jnp.float32)
  for j, name in enumerate(GATES):
    row = slow.rows[h, j, :][None, :]
    if name in shape.cfg.gates:
      r = saved.D[b, h, i, shape.gate(name), :].astype(jnp.float32)[None, :]
      row = row + (r if alive is None else alive[:, None] * r)
    d_key = d_key + turned.d_logits[b, h, i, j, :][:, None] * row
  return d_key
