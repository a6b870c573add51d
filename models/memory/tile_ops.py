"""Products of tiles, and the few float32 rows of per-token scalars.

A tile of scalars is `[8, C]`, one register's sublanes; sums over it that must
be exact go through the matrix unit in three bfloat16 parts.
"""

import jax
import jax.numpy as jnp

ROWS = 8  # of a tile of per-token scalars: one register's sublanes


def _product(a, b, dims, dtype):
  precision = 'highest' if dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (dims, ((), ())),
    precision=precision,
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


def nn(a, b, dtype):
  """`a b`."""
  return _product(a, b, ((1,), (0,)), dtype)


def nt(a, b, dtype):
  """`a b^T`."""
  return _product(a, b, ((1,), (1,)), dtype)


def tn(a, b, dtype):
  """`a^T b`."""
  return _product(a, b, ((0,), (0,)), dtype)


def tns(keys, b, dtype):
  """`a^T b` of several a: the matrix unit is loaded with b once."""
  joined = tn(jnp.concatenate(keys, axis=1), b, dtype)
  products, at = [], 0
  for a in keys:
    products.append(joined[at : at + a.shape[1]])
    at += a.shape[1]
  return products


def parts(x, count: int = 3):
  """What bfloat16 holds exactly; the sum of three is x in float32."""
  found = []
  for _ in range(count):
    found.append(x.astype(jnp.bfloat16).astype(jnp.float32))
    x = x - found[-1]
  return found


def exact(rows_8xN, b, dims=((1,), (0,))):
  """Few float32 rows times a bfloat16 matrix, exact to float32."""
  if b.dtype != jnp.bfloat16:
    return _product(rows_8xN, b, dims, rows_8xN.dtype)
  out = _product(jnp.concatenate(parts(rows_8xN)), b, dims, jnp.bfloat16)
  return out[:ROWS] + out[ROWS : 2 * ROWS] + out[2 * ROWS : 3 * ROWS]


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def stack_rows(rows, dtype):
  """Rows `[1, C]` as one tile `[8, C]`."""
  C = rows[0].shape[1]
  at = iota((ROWS, C), 0)
  tile = jnp.zeros((ROWS, C), dtype)
  for i, row in enumerate(rows):
    tile = jnp.where(at == i, jnp.broadcast_to(row, (ROWS, C)), tile)
  return tile


def as_columns(rows: dict):
  """Rows `[1, C]` as columns `[C, 1]`: one transposition for eight of them."""
  names = list(rows)
  columns = {}
  for first in range(0, len(names), ROWS):
    some = names[first : first + ROWS]
    tile = stack_rows([rows[name] for name in some], rows[some[0]].dtype).T
    columns |= {name: tile[:, i : i + 1] for i, name in enumerate(some)}
  return columns


def columns_as_rows(columns: dict):
  """Columns `[C, 1]` as rows `[1, C]`: the same the other way."""
  names = list(columns)
  rows = {}
  for first in range(0, len(names), ROWS):
    some = names[first : first + ROWS]
    like = columns[some[0]]
    lane = iota((like.shape[0], ROWS), 1)
    tile = jnp.zeros((like.shape[0], ROWS), like.dtype)
    for i, name in enumerate(some):
      tile = jnp.where(lane == i, columns[name], tile)
    tile = tile.T
    rows |= {name: tile[i : i + 1] for i, name in enumerate(some)}
  return rows


def ones_triangle(C: int, dtype):
  """`[C, C]`, 1 where the row is at most the column."""
  upto = iota((C, C), 0) <= iota((C, C), 1)
  # float32 sums are exact with it, see `exact`
  narrow = jnp.bfloat16 if dtype == jnp.float32 else dtype
  return upto.astype(dtype).astype(narrow)


def unit_norm(x):
  norm = jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
  return x * norm, norm


def adaptive(cfg, tile):
  """The tile with the rows of gates that are no memories set to zero."""
  if len(cfg.gates) == 2:
    return jnp.where(iota(tile.shape, 0) < 2, tile, 0.0)
  if not cfg.gates:
    return jnp.zeros_like(tile)
  row = 0 if cfg.gates[0] == 'eta' else 1
  return jnp.where(iota(tile.shape, 0) == row, tile, 0.0)


def columns_of(cfg, box, K):
  start, stop = cfg.rows(K)[box]
  return slice(start, stop)
