"""Who attends in fresh sequences: cuDNN, kernels or plain XLA."""

import jax
import jax.numpy as jnp

from nestax.models import axes, blockwise, flash_gpu, flash_tpu
from nestax.models.memory.api import say_once
from nestax.models.persistent import attend, join


def read(window: int, fused: bool, q, k, v, start_BxL, persistent):
  """What each query reads, `[B, L, H, K]`.

  Args:
    window: tokens that a query sees, itself one of them; 0 for all.
    fused: whether a kernel may attend; it takes whole lengths.
    q: `[B, L, H, K]`, rotated.
    k, v: `[B, L, G, K]`, the keys rotated.
    start_BxL: position at which each token's document began, or None.
    persistent: tokens that all queries see, or None.
  """
  where = axes.platform()
  alone = start_BxL is None and persistent is None
  if where == 'gpu' and fused and alone and _cudnn(q):
    return _by_jax(window, q, k, v, 'cudnn')
  if where == 'gpu' and _fits(fused, flash_gpu.unfit(q.dtype, q.shape[-1])):
    return _gpu(window, q, k, v, start_BxL, persistent)
  if (
    where == 'tpu'
    and persistent is None
    and _fits(fused, flash_tpu.unfit(q.dtype))
  ):
    return flash_tpu.attention(q, k, v, start_BxL, window=window)
  if fused and q.shape[1] > blockwise.LONG:
    return blockwise.read(q, k, v, start_BxL, persistent, window=window)
  if alone:
    return _by_jax(window, q, k, v, 'xla')
  position = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
  if start_BxL is None:
    start_BxL = jnp.zeros((q.shape[0], 1), jnp.int32)
  start = start_BxL[..., None]
  mask = blockwise.visible(
    position[..., None], position[:, None], start, window
  )
  return attend(q, k, v, mask, persistent)


def _by_jax(window: int, q, k, v, implementation: str):
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    is_causal=True,
    local_window_size=(window - 1, 0) if window else None,
    implementation=implementation,
  )


def _cudnn(q) -> bool:
  """Whether cuDNN attends on a GPU.

  It refuses to differentiate odd lengths, and JAX some widths of heads and
  older GPUs.
  """
  L, _, K = q.shape[1:]
  fits = q.dtype == jnp.bfloat16 and L % 2 == 0 and K % 8 == 0 and K <= 128
  return fits and flash_gpu.bfloats()


def _fits(fused: bool, unfit: str) -> bool:
  """Whether a machine's kernels attend; says once why not."""
  if not fused:
    unfit = 'lengths are split over devices that heads do not divide over'
  if unfit:
    say_once(f'attention runs without kernels: {unfit}')
  return not unfit


def _gpu(window: int, q, k, v, start_BxL, persistent, interpret=False):
  """By our kernels for GPUs; see `flash_gpu.attention`."""
  first_BxL = jnp.zeros(q.shape[:2], jnp.int32)
  if start_BxL is not None:
    first_BxL = jnp.maximum(first_BxL, start_BxL)
  if window:
    oldest_L = jnp.arange(q.shape[1], dtype=jnp.int32) - (window - 1)
    first_BxL = jnp.maximum(first_BxL, oldest_L[None])
  o, lse_BxHxL = flash_gpu.attention(q, k, v, first_BxL, interpret=interpret)
  return o if persistent is None else join(o, lse_BxHxL, persistent)
