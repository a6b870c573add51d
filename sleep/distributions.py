"""Next-token distributions: how far apart two are, and a text's chance."""

import jax
import jax.numpy as jnp

DIVERGENCES = ('forward_kl', 'reverse_kl', 'jsd')


def divergence(name: str, teacher_BxLxV, student_BxLxV):
  """Of two next-token distributions given by logits, nats, `[B, L]`."""
  t = jax.nn.log_softmax(teacher_BxLxV)
  s = jax.nn.log_softmax(student_BxLxV)

  def kl(p, q):
    return (jnp.exp(p) * (p - q)).sum(-1)

  if name == 'forward_kl':
    return kl(t, s)
  if name == 'reverse_kl':
    return kl(s, t)
  middle = jnp.logaddexp(t, s) - jnp.log(2.0)
  return 0.5 * kl(t, middle) + 0.5 * kl(s, middle)


def log_chance(logits_BxLxV, tokens_BxL, mask_BxL):
  """Log-probability of each row's masked tokens together, `[B]`."""
  logs = jax.nn.log_softmax(logits_BxLxV)
  picked = jnp.take_along_axis(logs, tokens_BxL[..., None], -1)[..., 0]
  return jnp.where(mask_BxL, picked, 0.0).sum(1)
