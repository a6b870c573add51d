"""The train state, one step of training, one batch of evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nestax.launch import initial, loss
from nestax.launch import mesh as meshes
from nestax.models import axes, language_model, model_state, telemetry


class TrainState(NamedTuple):
  """All that a run carries from one step to the next, and all it saves."""

  step: jax.Array  # int32, batches seen, bad ones included
  params: Any
  opt_state: Any
  memory: Any  # state of the sequences that the next batch continues, or None
  key: jax.Array  # what is random in step n draws from fold_in(key, n)
  skipped: jax.Array  # int32, bad steps since the beginning
  bad: jax.Array  # int32, bad steps in a row, up to now


def abstract_state(model, tx, mesh, memory=None) -> TrainState:
  """Shapes and shardings of the state that `init_state` makes, same arguments.

  A checkpoint is restored into this, on whatever mesh there is by then.
  """
  boxed = language_model.abstract(model)
  # a key by its shape too: the mesh may be of devices that are not here
  key = jax.eval_shape(lambda: _key(0))
  begin = functools.partial(_begun, tx, memory)
  state = jax.eval_shape(begin, nn.unbox(boxed), key)
  whole = meshes.replicated(mesh)
  layout = TrainState(
    step=whole,
    params=axes.shardings(mesh, boxed),
    opt_state=meshes.like_params(mesh, boxed, state.opt_state),
    memory=model_state.state_shardings(mesh, state.memory),
    key=whole,
    skipped=whole,
    bad=whole,
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    layout,
  )


def init_state(
  model,
  tx,
  mesh,
  seed: int,
  memory: Callable | None = None,
  params: dict | None = None,
) -> TrainState:
  """Makes the state at step 0, every array born in the shards it will have.

  Args:
    model: with `init(key, state, tokens)`.
    tx: the outer optimiser.
    mesh: the devices.
    seed: of the parameters and of everything random later.
    memory: without arguments gives the state of all rows of the global batch,
      for runs that carry it from batch to batch; None for those that do not.
    params: some or all of the parameters, on the host; the rest are fresh.
  """
  abstract = abstract_state(model, tx, mesh, memory)
  fresh = _fresh(model, tx, memory)
  layout = shardings(abstract)
  if params is None:
    return jax.jit(fresh, out_shardings=layout)(_key(seed))
  like = initial.fill(abstract.params, params)
  params = jax.tree.map(
    lambda x, like: None if x is like else _laid(x, like), like, abstract.params
  )
  return jax.jit(fresh, out_shardings=layout)(_key(seed), params)


def _laid(x, like):
  """An array of the host on the devices where it belongs, in its dtype."""
  return jax.make_array_from_callback(
    like.shape, like.sharding, lambda index: x[index].astype(like.dtype)
  )


def shardings(state):
  """The shardings of a state, or of its shapes, as a tree like it."""
  return jax.tree.map(lambda x: x.sharding, state)


def _key(seed: int) -> jax.Array:
  return jax.random.key(seed)


def _fresh(model, tx, memory):
  def fresh(key, given=None) -> TrainState:
    key, init_key = jax.random.split(key)
    tokens_BxL = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(model.init(init_key, None, tokens_BxL)['params'])
    if given is not None:
      params = jax.tree.map(
        lambda own, other: own if other is None else other, params, given
      )
    return _begun(tx, memory, params, key)

  return fresh


def _begun(tx, memory, params, key) -> TrainState:
  zero = jnp.zeros((), jnp.int32)
  state = None if memory is None else memory()
  return TrainState(zero, params, tx.init(params), state, key, zero, zero)


def batch_axes(memory: Callable[[int], Any]):
  """Finds the batch axis of every leaf of `memory(rows)`, without arrays."""
  two, three = (jax.eval_shape(lambda n=n: memory(n)) for n in (2, 3))
  return jax.tree.map(
    lambda a, b: [m != n for m, n in zip(a.shape, b.shape)].index(True),
    two,
    three,
  )


def _split(x, axis: int, parts: int):
  """Cuts an axis into interleaved microbatches, on a new first axis.

  Interleaved, because devices hold contiguous rows: each keeps its own.
  """
  shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def _join(x, axis: int):
  """Undoes `_split`."""
  x = jnp.moveaxis(x, 0, axis + 1)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def scorer(model, piece: int = 0):
  """Makes `(params, memory, batch) -> (loss.Sums, memory)`.

  Args:
    model: with `apply(variables, state, tokens, reset)`.
    piece: positions of a row whose logits exist at once, see `loss.in_pieces`,
      of a `LanguageModel`; 0 for all.
  """

  def whole(params, memory, batch):
    memory, logits_BxLxV = model.apply(
      {'params': params}, memory, batch['tokens'], batch['reset']
    )
    return loss.sums(logits_BxLxV, batch), memory

  def by_pieces(params, memory, batch):
    weights = {'params': params}
    memory, x_BxLxD = model.apply(
      weights, memory, batch['tokens'], batch['reset'], method='trunk'
    )
    head = functools.partial(model.apply, weights, method='logits')
    return loss.in_pieces(head, x_BxLxD, batch, piece), memory

  return by_pieces if piece else whole


def _gradients(score, lay, params, memory, batch, parts: int, rows_axes):
  """Sums of the loss, its gradient, and the memory after the batch.

  `lay` puts a gradient where its parameter lies, at every microbatch.
  """
  weight = batch['weights'].sum()
  weight = jnp.where(weight > 0, weight, 1.0)

  def objective(params, memory, batch):
    total, memory = score(params, memory, batch)
    # By the weight of the whole batch: microbatches then simply add up.
    return total.nats / weight, (total, memory)

  grad = jax.grad(objective, has_aux=True)
  if parts == 1:
    grads, (total, memory) = grad(params, memory, batch)
    return total, lay(grads), memory

  def one(carry, part):
    grads, (total, memory) = grad(params, *part)
    return jax.tree.map(jnp.add, carry, (total, lay(grads))), memory

  batch = jax.tree.map(lambda x: _split(x, 0, parts), batch)
  memory = jax.tree.map(lambda x, a: _split(x, a, parts), memory, rows_axes)
  zeros = (loss.zero(), lay(jax.tree.map(jnp.zeros_like, params)))
  (total, grads), memory = jax.lax.scan(one, zeros, (memory, batch))
  return total, grads, jax.tree.map(_join, memory, rows_axes)


def _all_finite(tree) -> jax.Array:
  return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def train_step(
  model,
  tx,
  schedule,
  layout,
  parts: int = 1,
  rows_axes=None,
  frozen=None,
  piece: int = 0,
):
  """Makes the step `(state, batch) -> (state, metrics)`, jitted, state donated.

  If the loss, the norm of its gradient, the new parameters or the carried
  memory are not finite, the whole step is skipped: parameters, optimiser and
  memory keep every bit, and the step is counted in `skipped` and `bad`.

  Args:
    model: with `apply(variables, state, tokens, reset)`.
    tx: the outer optimiser, clipping included.
    schedule: number of updates -> learning rate, for the metrics.
    layout: shardings of the state, which leaves a step as it came in.
    parts: microbatches, one after the other; the result is that of one batch.
    rows_axes: from `batch_axes`, where the state carries memory.
    frozen: bool for every parameter; where True its gradient is taken for 0,
      and nothing is computed for it.
    piece: see `scorer`.

  Returns:
    The step; its metrics are float32 scalars `loss` (nats), `bits_per_byte`,
    `grad_norm`, `learning_rate` and int32 `skipped`, `bad`.
  """

  score = scorer(model, piece)

  def lay(grads):
    return jax.lax.with_sharding_constraint(grads, layout.params)

  def step(state: TrainState, batch):
    total, grads, memory = _gradients(
      score, lay, state.params, state.memory, batch, parts, rows_axes
    )
    if frozen is not None:
      grads = jax.tree.map(
        lambda g, no: jnp.zeros_like(g) if no else g, grads, frozen
      )
    norm = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    good = jnp.isfinite(total.nats) & jnp.isfinite(norm)
    # A finite gradient can still lead out of the numbers there are.
    good &= _all_finite((params, memory))
    rate = schedule(state.step - state.skipped)

    def keep(new, old):
      return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    state = TrainState(
      step=state.step + 1,
      params=keep(params, state.params),
      opt_state=keep(opt_state, state.opt_state),
      memory=keep(memory, state.memory),
      key=state.key,
      skipped=state.skipped + ~good,
      bad=jnp.where(good, 0, state.bad + 1),
    )
    metrics = loss.means(total) | {
      'grad_norm': norm,
      'learning_rate': rate,
      'skipped': state.skipped,
      'bad': state.bad,
    }
    return state, metrics

  return jax.jit(step, donate_argnums=0, out_shardings=(layout, None))


def eval_step(model, piece: int = 0):
  """Makes `(params, batch) -> (loss.Sums, Telemetry)`, jitted.

  Every row is a new sequence; the telemetry is of the levels at their end, of
  rows that are no padding.
  `piece` is that of `scorer`.
  """
  score = scorer(model, piece)

  def step(params, batch):
    if not model.cfg.stream:
      return score(params, None, batch)[0], telemetry.none()
    (_, logits_BxLxV), said = model.apply(
      {'params': params},
      None,
      batch['tokens'],
      batch['reset'],
      mutable=['telemetry'],
    )
    real_B = (batch['weights'] > 0).any(1)
    return loss.sums(logits_BxLxV, batch), telemetry.sown(said, real_B)

  return jax.jit(step)
