"""A row out of its last token: MAD's compression task.

The trunk of a language model reads the row; what stands at the last token is
all that the decoder sees, added to each position's sines and cosines: twice
norm, square linear map, GELU, then norm and linear map to logits, as in
github.com/athms/mad-lab (Poli et al. 2024, section B).
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from nestax.launch.evals import problems
from nestax.models import language_model
from nestax.models.config import ModelConfig


def positions(length: int, D: int) -> np.ndarray:
  """Sines and cosines of every position, `[L, D]`, float32."""
  half = D // 2
  omega = 10_000.0 ** (-np.arange(half) / max(half - 1, 1))
  angle = np.arange(length)[:, None] * omega[None]
  return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


class Decoder(nn.Module):
  """`code_BxD, length -> logits_BxLxV`, each position by itself."""

  V: int

  @nn.compact
  def __call__(self, code_BxD, length: int):
    D = code_BxD.shape[-1]
    places_LxD = jnp.asarray(positions(length, D))
    x_BxLxD = code_BxD[:, None].astype(jnp.float32) + places_LxD[None]
    for _ in range(2):
      x_BxLxD = nn.gelu(nn.Dense(D)(nn.RMSNorm()(x_BxLxD)), approximate=False)
    return nn.Dense(self.V)(nn.RMSNorm()(x_BxLxD))


def net(cfg: ModelConfig) -> problems.Net:
  """The trunk of a language model and the decoder, trained together.

  Raises:
    ValueError: for levels that learn inside a sequence, or an odd width.
  """
  if cfg.stream:
    raise ValueError(
      f'cms.blocks={cfg.cms.blocks!r}: levels learn by predicting the next '
      "token, which compression does not; give cms.blocks='none'"
    )
  if cfg.D % 2:
    raise ValueError(f'D={cfg.D}: half of it are sines, half cosines')
  model, decoder = language_model.LanguageModel(cfg), Decoder(cfg.V)

  def init(key, tokens_BxL):
    trunk = model.init(key, None, tokens_BxL, method='trunk')['params']
    code_BxD = jnp.zeros((1, cfg.D))
    head = decoder.init(key, code_BxD, 1)['params']
    return {'trunk': nn.unbox(trunk), 'decoder': head}

  def apply(params, tokens_BxL):
    trunk = {'params': params['trunk']}
    _, x_BxLxD = model.apply(trunk, None, tokens_BxL, method='trunk')
    head = {'params': params['decoder']}
    return decoder.apply(head, x_BxLxD[:, -1], tokens_BxL.shape[1])

  return problems.Net(init, apply)
