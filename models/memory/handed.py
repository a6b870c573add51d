"""What a memory is handed: refused in words where it does not fit the rule."""

import jax
import jax.numpy as jnp
import numpy as np

from nestax.models.memory.decay import LEAST_LOG
from nestax.models.memory.types import Inputs, MemoryConfig, init_state


def check(cfg: MemoryConfig, initial, state, inputs: Inputs, length_B) -> None:
  """Refuses arrays of other shapes or types, and gates too many or too few.

  Arguments are those of `api.run`. What `initial` lacks, `types.stack_initial`
  says.

  Raises:
    ValueError: naming what it is, what it has, and what is wanted.
  """
  q = inputs.query
  if q.ndim != 4 or not q.shape[1]:
    raise ValueError(
      f'query of the shape {q.shape}: [B, L, H, K] is wanted, L at least 1'
    )
  B, L, H, K = q.shape
  for name in ('query', 'key', 'value'):
    _floats(name, getattr(inputs, name), q.shape, '[B, L, H, K]')
  _check_gates(cfg, inputs)
  for name in ('eta', 'log_alpha', 'log_beta'):
    if (gate := getattr(inputs, name)) is not None:
      _floats(name, gate, (B, L, H), '[B, L, H]')
  if inputs.reset is not None:
    _shaped('reset', inputs.reset, (B, L), '[B, L]')
    if inputs.reset.dtype != jnp.bool_:
      raise ValueError(
        f'reset of the type {inputs.reset.dtype}: bool is wanted, True where '
        'a document starts'
      )
  if length_B is not None:
    _shaped('length_B', length_B, (B,), '[B]')
  for keys, x in jax.tree_util.tree_leaves_with_path(initial):
    if np.shape(x)[:1] != (H,):
      raise ValueError(
        f'initial{jax.tree_util.keystr(keys)} of the shape {np.shape(x)}: a '
        f'leading axis of H={H} heads is wanted'
      )
  if state is not None:
    _check_state(cfg, state, B, H, K)


def bounded(inputs: Inputs) -> Inputs:
  """The inputs with logs of gates that differences can be taken of."""

  def bound(log):
    return None if log is None else jnp.maximum(log, LEAST_LOG)

  return inputs._replace(
    log_beta=bound(inputs.log_beta), log_alpha=bound(inputs.log_alpha)
  )


def _check_gates(cfg: MemoryConfig, inputs: Inputs) -> None:
  handed = {'eta': inputs.eta, 'alpha': inputs.log_alpha}
  handed = {gate for gate, x in handed.items() if x is not None}
  if handed != set(cfg.given):
    raise ValueError(
      f'given={cfg.given}: the inputs hold the gates {sorted(handed)}'
    )
  if cfg.momentum != (inputs.log_beta is not None):
    has = 'no' if inputs.log_beta is None else 'a'
    raise ValueError(
      f'momentum={cfg.momentum}: the inputs hold {has} log_beta, its gate'
    )


def _floats(name: str, x, shape, letters: str) -> None:
  _shaped(name, x, shape, letters)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{name} of the type {x.dtype}: floats are wanted')


def _shaped(name: str, x, shape, letters: str) -> None:
  if not hasattr(x, 'dtype') or x.shape != shape:
    raise ValueError(
      f'{name} of the shape {np.shape(x)}: an array {letters} of {shape} is '
      'wanted, as of query'
    )


def _check_state(cfg: MemoryConfig, state, B: int, H: int, K: int) -> None:
  like = jax.eval_shape(lambda: init_state(cfg, B, H, K))
  wanted, found = (
    {jax.tree_util.keystr(k): x for k, x in tree}
    for tree in map(jax.tree_util.tree_leaves_with_path, (like, state))
  )
  remedy = 'make one by types.init_state with the same config'
  if lacks := [path for path in wanted if path not in found]:
    raise ValueError(f'the state has no {lacks[0]}: {remedy}')
  if more := [path for path in found if path not in wanted]:
    raise ValueError(f'a state of this rule has no {more[0]}: {remedy}')
  for path, want in wanted.items():
    x = found[path]
    narrow = jnp.dtype(x.dtype).itemsize < want.dtype.itemsize
    if x.shape != want.shape or narrow:
      raise ValueError(
        f'state{path} of the shape {x.shape} and type {x.dtype}: {want.shape} '
        f'and {want.dtype} are wanted; {remedy}'
      )
