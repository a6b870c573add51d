"""Linear maps, norms, convolution and rotary angles that the families share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestax.models import axes


def _along_last(vector, x):
  """Shapes `[F]` like the last axis of `x` (rank promotion is an error)."""
  return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


class Linear(nn.Module):
  """`x @ kernel` over any axes, without bias, accumulated in float32.

  Attributes:
    equation: einsum of input and kernel, such as `bld,dhk->blhk`.
    shape: of the kernel.
    names: logical axes of the kernel.
    fan_in: the number of inputs that one output adds up.
    gain: multiplies the initial standard deviation `fan_in ** -0.5`.
    dtype: of the product.
  """

  equation: str
  shape: tuple[int, ...]
  names: tuple[str, ...]
  fan_in: int
  gain: float = 1.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(self.gain * self.fan_in**-0.5)
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(init, self.names),
      self.shape,
      jnp.float32,
    )
    kernel = kernel.astype(self.dtype)
    if x.shape[1] > 1:  # of one token, less is sent than of the weight
      kernel = axes.gathered(kernel, *self.names)
    return jnp.einsum(
      self.equation,
      x.astype(self.dtype),
      kernel,
      preferred_element_type=self.dtype,
    )


class RMSNorm(nn.Module):
  """Scales the last axes to unit root mean square, in float32.

  Attributes:
    shape: of the learned scale, the last axes of the input; the mean is over
      the very last axis only.
    names: logical axes of the scale.
    initial: the scale's first value.
    dtype: of the result.
    epsilon: added to the mean square.
  """

  shape: tuple[int, ...]
  names: tuple[str, ...]
  initial: float = 1.0
  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.constant(self.initial)
    scale = self.param(
      'scale',
      nn.with_logical_partitioning(init, self.names),
      self.shape,
      jnp.float32,
    )
    y = x.astype(jnp.float32)
    mean = jnp.mean(y * y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean + self.epsilon)
    return (y * _along_last(scale, y)).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits(equation: str, x, table):
  """`einsum(equation, x, table)` in float32, whose products are in one dtype.

  The gradient of float32 logits is cast to the dtype of `x` and `table` before
  it is multiplied; else the products of the backward pass, the largest of a
  model, would be of float32 operands.
  """
  return jnp.einsum(equation, x, table, preferred_element_type=jnp.float32)


def _logits_fwd(equation, x, table):
  return logits(equation, x, table), (x, table)


def _logits_bwd(equation, given, d_out):
  x, table = given
  operands, out = equation.split('->')
  a, b = operands.split(',')
  d_out = d_out.astype(table.dtype)
  d_x = jnp.einsum(f'{out},{b}->{a}', d_out, table)
  d_table = jnp.einsum(f'{out},{a}->{b}', d_out, x)
  return d_x.astype(x.dtype), d_table.astype(table.dtype)


logits.defvjp(_logits_fwd, _logits_bwd)


class Embedding(nn.Module):
  """Token embeddings `[V, D]`, also read as the tied output head."""

  V: int
  D: int
  dtype: jnp.dtype

  def setup(self):
    init = nn.initializers.normal(self.D**-0.5)
    self.embedding = self.param(
      'embedding',
      nn.with_logical_partitioning(init, ('vocab', 'embed')),
      (self.V, self.D),
      jnp.float32,
    )

  def __call__(self, tokens_BxL):
    # an id below 0 is none, and NaN as one beyond the table is
    ids_BxL = jnp.where(tokens_BxL < 0, self.V, tokens_BxL.astype(jnp.int32))
    x_BxLxD = axes.looked_up(self.embedding, ids_BxL).astype(self.dtype)
    return axes.constrain(x_BxLxD, 'batch', 'length', 'activation')

  def attend(self, x_BxLxD):
    table_VxD = self.embedding.astype(self.dtype)
    if x_BxLxD.shape[1] > 1:  # as in `Linear`
      table_VxD = axes.gathered(table_VxD, 'vocab', 'embed')
    return logits('bld,vd->blv', x_BxLxD, table_VxD)


LONG_AGO = -(1 << 30)  # the start of a document that began in an earlier call


def segment_starts(reset_BxL):
  """Index at which each token's document began, `LONG_AGO` if before."""
  index_1xL = jnp.arange(reset_BxL.shape[1], dtype=jnp.int32)[None, :]
  return jax.lax.cummax(jnp.where(reset_BxL, index_1xL, LONG_AGO), axis=1)


def last_start(start_BxL, length_B):
  """`segment_starts` of each row's last token; LONG_AGO for a row of none."""
  last_Bx1 = jnp.maximum(length_B - 1, 0)[:, None]
  start_B = jnp.take_along_axis(start_BxL, last_Bx1, axis=1)[:, 0]
  return jnp.where(length_B > 0, start_B, LONG_AGO)


class CausalConv(nn.Module):
  """Causal depthwise convolution over the last `taps` tokens of a stream.

  Call: `(tail, x_BxLxHxK, start_BxL, length_B) -> (tail, y)`, where `tail`
  holds the inputs of the `taps - 1` tokens before `x` (zeros at the start of a
  stream) and `start_BxL`, or None, the index of the token at which each token's
  document began: a tap that would reach past it reads zero. Of a row only the
  first `length_B` tokens reach the new tail, or all.
  """

  shape: tuple[int, int]
  taps: int = 4
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tail_BxTxHxK, x_BxLxHxK, start_BxL, length_B=None):
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(
        nn.initializers.normal(self.taps**-0.5), ('taps', 'heads', 'head_dim')
      ),
      (self.taps, *self.shape),
      jnp.float32,
    ).astype(self.dtype)
    before = self.taps - 1
    L = x_BxLxHxK.shape[1]
    seen = jnp.concatenate([tail_BxTxHxK.astype(self.dtype), x_BxLxHxK], axis=1)
    index_1xL = jnp.arange(L, dtype=jnp.int32)[None, :]
    y = jnp.zeros_like(x_BxLxHxK)
    for back in range(self.taps):
      shifted = jax.lax.slice_in_dim(
        seen, before - back, before - back + L, 1, 1
      )
      tap = kernel[self.taps - 1 - back][None, None]
      if start_BxL is not None and back:
        same = index_1xL - back >= start_BxL
        shifted = jnp.where(same[..., None, None], shifted, 0)
      y = y + shifted * tap
    return self._tail(seen, start_BxL, length_B), y

  def _tail(self, seen, start_BxL, length_B):
    """The inputs that the next call still reads, none of a past document."""
    before = self.taps - 1
    if length_B is None:
      length_B = jnp.full(seen.shape[:1], seen.shape[1] - before)
      tail = seen[:, seen.shape[1] - before :]
    else:
      cut = jax.vmap(
        lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, before)
      )
      tail = cut(seen, length_B)
    if start_BxL is not None:
      index_1xT = jnp.arange(-before, 0, dtype=jnp.int32)[None, :]
      index_BxT = index_1xT + length_B[:, None]
      keep = index_BxT >= last_start(start_BxL, length_B)[:, None]
      tail = jnp.where(keep[..., None, None], tail, 0)
    return tail.astype(jnp.float32)


def rotary(x_BxLxHxK, position_BxL, base: float):
  """Rotates pairs `(i, i + K/2)` by position-dependent angles (RoPE).

  Angles are counted modulo a turn, in parts of 2 ** -32 of it, so that they
  are as exact after ten million tokens as after ten: float32 has no digits
  left for the fraction of a turn behind so many.
  """
  half = x_BxLxHxK.shape[-1] // 2
  # numpy: a constant of the program, not arithmetic of every step
  turns = base ** (-np.arange(half) / half) / (2 * np.pi)
  step = (np.round(turns * 2.0**32) % 2.0**32).astype(np.uint32)
  phase = position_BxL.astype(jnp.uint32)[..., None] * step[None, None]
  phase = jax.lax.bitcast_convert_type(phase, jnp.int32)
  angle = phase.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)
  cos, sin = (f(angle)[:, :, None, :] for f in (jnp.cos, jnp.sin))
  a, b = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y.astype(x_BxLxHxK.dtype)
