"""What a language model is given: refused in words where it does not fit.

All but the range of token ids is known where a program is traced, and costs
nothing where it runs. Ids are looked at where they are known too, outside of
`jax.jit`; inside, one that is out of range gives NaN.
"""

import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np

from nestax.models import axes
from nestax.models.memory import api

REMEDY = 'make one by init_state(cfg, batch, length) with its own config'


def read(V: int, like, state_, tokens_BxL, reset_BxL) -> jax.Array:
  """Checks all that a model reads; the tokens as `tokens` gives them.

  Args:
    V: size of the vocabulary.
    like: `(owned) -> (shapes of a fresh state, names of its axes)`, with slots
      of sequences' own or without.
    state_: of the sequences, or None.
    tokens_BxL: ids.
    reset_BxL: where documents start, or None.

  Raises:
    ValueError: in words, for whatever does not fit.
  """
  tokens_BxL = tokens(V, tokens_BxL)
  mesh(tokens_BxL)
  reset(tokens_BxL, reset_BxL)
  if state_ is not None:
    owned = getattr(state_, 'owned', None) is not None
    state(state_, *like(owned), tokens_BxL.shape[0])
  return tokens_BxL


def mesh(x) -> None:
  """Refuses a mesh that models cannot be laid out on; tells of one unused.

  Raises:
    ValueError: for axes that the partitioner leaves alone.
  """
  here = jax.sharding.get_abstract_mesh()
  wide = [axis for axis in here.auto_axes if here.shape[axis] > 1]
  if wide and not set(wide) & set(axes.MESH_AXES):
    api.say_once(
      f'no axis of the mesh, {", ".join(wide)}, is one of '
      f'{", ".join(axes.MESH_AXES)}: every device does all of the work'
    )
  for where in (here, jax.typeof(x).sharding.mesh):
    if where.explicit_axes:
      n = len(where.axis_names)
      raise ValueError(
        f'the axes {where.explicit_axes} of the mesh are Explicit, as '
        'jax.make_mesh makes them unless told: models are laid out by the '
        f'partitioner; make it with axis_types=(AxisType.Auto,) * {n}'
      )


def tokens(V: int, tokens_BxL) -> jax.Array:
  """The ids as int32, since levels look for them among V.

  Raises:
    ValueError: for another rank, another type, or, where it is known, an id
      that is not in the vocabulary.
  """
  dtype = getattr(tokens_BxL, 'dtype', None)
  if dtype is None:
    raise ValueError(
      f'tokens are a {type(tokens_BxL).__name__}: an array [B, L] of whole '
      'numbers is wanted; is the state the first argument?'
    )
  shape = np.shape(tokens_BxL)
  if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f'tokens of the shape {shape} and type {dtype}: an array [B, L] of whole '
      'numbers is wanted, a row a sequence'
    )
  if _known(tokens_BxL):
    in_vocabulary(V, tokens_BxL)
  return jnp.asarray(tokens_BxL).astype(jnp.int32)


def in_vocabulary(V: int, ids, what: str = '') -> None:
  """Raises a ValueError for an id that is none; `what` says where it is."""
  ids = np.asarray(ids)
  if ids.size and not 0 <= (least := ids.min()) <= (most := ids.max()) < V:
    wrong = least if least < 0 else most
    raise ValueError(
      f'{what}token id {wrong}: the vocabulary has V={V}, ids from 0 to {V - 1}'
    )


def _known(x) -> bool:
  if isinstance(x, jax.core.Tracer):
    return False
  return getattr(x, 'is_fully_addressable', True)


def reset(tokens_BxL, reset_BxL) -> None:
  """Raises a ValueError for starts of documents that do not fit the tokens."""
  if reset_BxL is None:
    return
  shape, dtype = np.shape(reset_BxL), getattr(reset_BxL, 'dtype', None)
  if shape != tokens_BxL.shape or dtype != jnp.bool_:
    raise ValueError(
      f'reset of the shape {shape} and type {dtype}: it needs the shape of the '
      f'tokens, {tokens_BxL.shape}, and the type bool, True where a document '
      'starts'
    )


def state(found, like, names, B: int) -> None:
  """Refuses a state that is not of this model and batch.

  Args:
    found: what was given.
    like: shapes of a fresh state of the model, of any batch.
    names: of the axes of its leaves, see `axes.map_names`.
    B: rows of tokens.

  Raises:
    ValueError: naming the first part that differs.
  """
  wanted, got = _parts(found, like)
  every = []
  axes.map_names(lambda names, x: every.append(names), names, like)
  for names, path in zip(every, wanted, strict=True):
    _check_leaf(path, got[path], wanted[path], names, B)


def same(found, like) -> None:
  """Raises a ValueError for a state that has not just these shapes."""
  wanted, got = _parts(found, like)
  for path, want in wanted.items():
    _compare(path, got[path], want.shape, want.dtype)


def bare(params) -> None:
  """Raises a ValueError for parameters that are still in their collection."""
  if 'params' in params:
    raise ValueError(
      "{'params': ...} is what `apply` takes: give the tree in it, params"
    )


def batch(B) -> None:
  """Raises a ValueError for what is no number of sequences."""
  if not isinstance(B, numbers.Integral) or B < 0:
    raise ValueError(f'batch={B!r}: a whole number of sequences is wanted')


def row(blocks, index):
  """The number of a row of a state, or traced; `blocks` are its mixers'.

  Raises:
    IndexError: for a row that the state does not have.
  """
  rows = jax.tree.leaves(blocks)[0].shape[1]
  if isinstance(index, jax.core.Tracer):
    return index
  if not 0 <= operator.index(index) < rows:
    raise IndexError(
      f'row {index} of a state of {rows} sequences: from 0 to {rows - 1}'
    )
  return operator.index(index)


def _parts(found, like):
  """What both hold by path; refuses what does not hold the same."""
  wanted, got = _by_path(like), _by_path(found)
  wrong = [f'it has no {path}' for path in wanted if path not in got]
  wrong += [f'the model has no {path}' for path in got if path not in wanted]
  if type(found) is not type(like):
    wrong = [f'it is a {type(found).__name__}']
  if wrong:
    raise ValueError(f'a state of another model: {wrong[0]}; {REMEDY}')
  return wanted, got


def _check_leaf(path: str, x, like, names, B: int) -> None:
  shape = np.shape(x)
  free = {'batch': B}
  if len(shape) == len(like.shape):
    rows = shape[names.index('batch')]
    if rows != B:
      raise ValueError(
        f'a state of {rows} sequences, and tokens of {B}: as many are wanted'
      )
    # as many tokens as whoever made it wants attention to look back on
    free |= {'cache': shape[names.index('cache')]} if 'cache' in names else {}
  full = (*names, *[None] * (len(like.shape) - len(names)))
  _compare(path, x, tuple(map(free.get, full, like.shape)), like.dtype)


def _compare(path: str, x, wanted: tuple[int, ...], dtype) -> None:
  shape, found = np.shape(x), getattr(x, 'dtype', type(x).__name__)
  if shape != wanted or found != dtype:
    raise ValueError(
      f'a state of another model: its {path} has the shape {shape} and type '
      f'{found}, not {wanted} and {dtype}; {REMEDY}'
    )


def _by_path(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(keys, simple=True, separator='.'): leaf
    for keys, leaf in leaves
  }
