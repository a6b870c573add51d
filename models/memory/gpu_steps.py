"""A walk over chunks in kernels of a chunk each, on a GPU.

With momentum the addresses, masks and tiles of a whole chunk are several times
the registers, and what is put aside and read again exceeds the caches. So a
chunk is cut into kernels and the loop is outside of them: the state goes
through memory, and what chunks leave is written into arrays that all share.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nestax.models.memory.gpu_layout import Shape


def like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


class Kernel(NamedTuple):
  """A kernel of a step, `(shape, step, *args, state, outs, new state)`."""

  run: Callable  # of references; `step` holds the number of the step, `[1]`
  name: str
  warps: int


def walk(kernels, shape: Shape, grid, args, state, outs, before):
  """Runs the kernels one after the other, n times.

  Args:
    kernels: of a step.
    shape: of the walk.
    grid: of every kernel.
    args: arrays that are only read.
    state: arrays handed from kernel to kernel; old and new are one.
    outs: shapes of arrays of which each step writes its own part.
    before: `(step, state) -> state`, between the steps.

  Returns:
    (outs, state).
  """

  def step(i, outs, state, made):
    state = before(i, state)
    for kernel in kernels:
      outs, state = _run(kernel, shape, grid, args, i, state, outs, made)
      made = True
    return outs, state

  # the first makes the arrays that the others write on into
  carry = step(jnp.int32(0), outs, state, False)
  return jax.lax.fori_loop(1, shape.n, lambda i, x: step(i, *x, True), carry)


def _run(kernel: Kernel, shape: Shape, grid, args, i, state, outs, made):
  everywhere = pl.BlockSpec(memory_space=pl.ANY)
  inputs = (jnp.reshape(i, (1,)), args, state, outs if made else None)
  results = jax.tree.map(like, (outs, state))

  def run(step, args, state, _, outs, new):
    kernel.run(shape, step, *args, state, outs, new)

  # the state and, once they are made, the arrays written are the same
  count = len(jax.tree.leaves(inputs))
  size, held = (len(jax.tree.leaves(x)) for x in (outs, state))
  first = count - held - (size if made else 0)
  aliases = {first + j: size + j for j in range(held)}
  if made:
    aliases |= {first + held + j: j for j in range(size)}
  return pl.pallas_call(
    run,
    grid=grid,
    in_specs=jax.tree.map(lambda _: everywhere, inputs),
    out_specs=jax.tree.map(lambda _: everywhere, results),
    out_shape=results,
    input_output_aliases=aliases,
    interpret=shape.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=kernel.warps, num_stages=1),
    name=kernel.name,
  )(*inputs)
