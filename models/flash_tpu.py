"""Softmax attention over documents and windows on TPUs: JAX's own kernels.

Splash attention never holds more than a block of logits and visits no block of
keys that the mask hides. A row's documents are its segments.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from nestax.models.memory.types import SAVED

BLOCKS = (512, 256, 128)  # tokens of a block; lengths are made multiples of one


def unfit(dtype) -> str:
  """Why the kernels do not take such arrays, in words; '' if they do."""
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    return f'attention in {jnp.dtype(dtype)}: bfloat16 or float32'
  return ''


def attention(
  q, k, v, start_BxL=None, *, window: int = 0, interpret: bool = False
):
  """Causal softmax attention, `[B, L, H, K]` of q's dtype.

  Args:
    q: `[B, L, H, K]`, bfloat16 or float32.
    k, v: `[B, L, G, K]`, H a multiple of G.
    start_BxL: int32, the same for all tokens of a document and another for
      those of the next; None for rows of one document.
    window: tokens that a query sees, itself one of them; 0 for all.
    interpret: runs on any machine, slowly.
  """
  L, H, K = q.shape[1:]
  block = _block(L)
  more = -L % block
  if more:
    # padded keys come after all queries that count
    wide = (0, 0), (0, more), (0, 0), (0, 0)
    q, k, v = (jnp.pad(x, wide) for x in (q, k, v))
  kernel = _kernel(L + more, H, window, block, interpret)
  heads_first = (jnp.moveaxis(x, 2, 1) for x in (q * K**-0.5, k, v))
  ids = None
  if start_BxL is not None:
    id_BxL = jnp.pad(start_BxL, ((0, 0), (0, more)), mode='edge')
    ids = splash.SegmentIds(id_BxL, id_BxL)
  o_BxHxLxK = jax.vmap(kernel)(*heads_first, ids)
  return jnp.moveaxis(o_BxHxLxK, 1, 2)[:, :L]


def _block(L: int) -> int:
  """The largest block that fills a row up by less than a quarter."""
  fits = (size for size in BLOCKS if -L % size <= L // 4)
  return next(fits, BLOCKS[-1])


def _kernel(L: int, H: int, window: int, block: int, interpret: bool):
  mask = splash.CausalMask((L, L))
  if window:
    mask = splash.LocalMask((L, L), (window - 1, 0), offset=0)
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * H),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=SAVED,
    interpret=interpret,
  )
