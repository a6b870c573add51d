"""Products of tiles, and the few float32 rows of per-token scalars.

A tile of scalars is `[8, C]`, one register's sublanes; sums over it that must
be exact go through the matrix unit in three bfloat16 parts. Kernels that are
differentiated find each product's derivative in the product's own dtype.
"""

import functools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def nn(a, b, dtype):
  """`a b`."""
  return _product(a, b, ((1,), (0,)), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def nt(a, b, dtype):
  """`a b^T`."""
  return _product(a, b, ((1,), (1,)), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def tn(a, b, dtype):
  """`a^T b`."""
  return _product(a, b, ((0,), (0,)), dtype)


def _defines(product, of_a, of_b):
  def back(dtype, operands, d):
    a, b = operands
    return (
      of_a(d, a, b, dtype).astype(a.dtype),
      of_b(d, a, b, dtype).astype(b.dtype),
    )

  product.defvjp(lambda a, b, dtype: (product(a, b, dtype), (a, b)), back)


_defines(nn, lambda d, a, b, t: nt(d, b, t), lambda d, a, b, t: tn(a, d, t))
_defines(nt, lambda d, a, b, t: nn(d, b, t), lambda d, a, b, t: tn(d, a, t))
_defines(tn, lambda d, a, b, t: nt(b, d, t), lambda d, a, b, t: nn(a, d, t))


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


def _exact(rows_8xN, b, dims):
  if b.dtype != jnp.bfloat16:
    return _product(rows_8xN, b, dims, rows_8xN.dtype)
  out = _product(jnp.concatenate(parts(rows_8xN)), b, dims, jnp.bfloat16)
  return out[:ROWS] + out[ROWS : 2 * ROWS] + out[2 * ROWS : 3 * ROWS]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exact(rows_8xN, b, dims=((1,), (0,))):
  """Few float32 rows times a bfloat16 matrix, exact to float32."""
  return _exact(rows_8xN, b, dims)


def _exact_back(dims, operands, d_8xM):
  rows, b = operands
  (axis,) = dims[1]
  pair = (rows, d_8xM) if axis == 0 else (d_8xM, rows)
  d_rows = _exact(d_8xM, b, ((1,), (1 - axis,)))
  return d_rows, outer(*pair).astype(b.dtype)


exact.defvjp(
  lambda rows, b, dims: (_exact(rows, b, dims), (rows, b)), _exact_back
)


def outer(rows_8xC, gates_8xN):
  """`rows^T gates` of the gates' rows, exact to float32.

  By the matrix unit: products of bfloat16 parts, all in one, since it takes 128
  rows as fast as eight. As columns, rows would be moved over lanes.
  """
  if rows_8xC.dtype != jnp.float32:
    return tn(rows_8xC, gates_8xN, rows_8xC.dtype)
  rows, gates = parts(rows_8xC), parts(gates_8xN)
  pairs = [(i, j) for i in range(3) for j in range(3 - i)]
  rows = jnp.concatenate([rows[i] for i, _ in pairs])
  gates = jnp.concatenate([gates[j] for _, j in pairs])
  return tn(rows, gates, jnp.bfloat16)


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


def _turned(rows):
  columns = []
  for first in range(0, len(rows), ROWS):
    some = rows[first : first + ROWS]
    tile = stack_rows(some, some[0].dtype).T
    columns += [tile[:, i : i + 1] for i in range(len(some))]
  return columns


def _turned_back(columns):
  rows = []
  for first in range(0, len(columns), ROWS):
    some = columns[first : first + ROWS]
    C = some[0].shape[0]
    lane = iota((C, ROWS), 1)
    tile = jnp.zeros((C, ROWS), some[0].dtype)
    for i, column in enumerate(some):
      tile = jnp.where(lane == i, column, tile)
    tile = tile.T
    rows += [tile[i : i + 1] for i in range(len(some))]
  return rows


# lists: a dictionary's entries would be sorted
_to_columns, _to_rows = jax.custom_vjp(_turned), jax.custom_vjp(_turned_back)
_to_columns.defvjp(
  lambda rows: (_turned(rows), None), lambda _, d: (_turned_back(d),)
)
_to_rows.defvjp(
  lambda columns: (_turned_back(columns), None), lambda _, d: (_turned(d),)
)


def as_columns(rows: dict):
  """Rows `[1, C]` as columns `[C, 1]`: one transposition for eight of them."""
  return dict(zip(rows, _to_columns(list(rows.values()))))


def columns_as_rows(columns: dict):
  """Columns `[C, 1]` as rows `[1, C]`: the same the other way."""
  return dict(zip(columns, _to_rows(list(columns.values()))))


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
