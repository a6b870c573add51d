"""What tests of two-layer memories on GPUs have in common."""

import jax
import jax.numpy as jnp
import memory_cases as cases

from nestax.models.memory import api, pallas_gpu

C = 16
LENGTH = 2 * C + 5  # the last chunk is not filled


def everything(cfg, initial, state, inputs, dtype, implementation):
  """Outputs, end state and gradients of all that is real."""

  @jax.jit
  def run(initial, start, streams):
    def values(initial, start, streams):
      here = inputs._replace(**streams)
      begin = None
      if state is not None:
        fast, momentum = start
        begin = state._replace(boundary=fast, running=fast, momentum=momentum)
      if implementation == 'gpu':
        end, out = pallas_gpu.run(
          cfg, initial, begin, here, dtype, aligned=True
        )
      else:
        end, out = api.run(
          cfg, initial, begin, here, dtype=dtype, implementation=implementation
        )
      return out, end and end[:3]

    got, back = jax.vjp(values, initial, start, streams)
    return got, back(jax.tree.map(lambda x: jnp.cos(3 * x), got))

  start = None if state is None else (state.running, state.momentum)
  streams = inputs._replace(reset=None)._asdict()
  streams = {name: x for name, x in streams.items() if x is not None}
  return run(initial, start, streams)


def check(cfg, initial, state, inputs, dtype, tolerance):
  """Kernels, interpreted, against the token rule."""
  args = cfg, initial, state, inputs, dtype
  got = everything(*args, 'gpu')
  cases.assert_close(got, everything(*args, 'token'), tolerance)
