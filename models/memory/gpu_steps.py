"""Walks over chunks on a GPU whose state goes through memory.

With momentum, and back over two layers, the addresses, masks and tiles of a
whole chunk are several times the registers, and what is put aside and read
again exceeds the caches. So a chunk is cut into kernels, each of several
programs a head, and the loop is outside of them (`Walk`); what chunks leave is
written into arrays that all share. Where the rest fits without the state, the
loop is in one kernel (`through`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory.gpu_layout import Shape
from nestax.models.memory.gpu_triton import triton


def like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


class Kernel(NamedTuple):
  """A kernel of a step, `(shape, step, *args, state, outs, new state)`."""

  run: Callable  # of references; `step` holds the number of the step, `[1]`
  name: str
  warps: int
  programs: int = 1  # a head: the grid's last axis


class Walk(NamedTuple):
  """What all kernels of a walk are called with."""

  shape: Shape
  grid: tuple[int, int]  # sequences and heads
  args: tuple  # arrays that are only read
  outs: tuple  # shapes of arrays of which each step writes its own part

  def run(self, kernels, state, before, last=None):
    """Runs the kernels one after the other, n times.

    Args:
      kernels: of a step.
      state: arrays handed from kernel to kernel; old and new are one.
      before: `(step, state) -> state`, between the steps.
      last: the one after the last, or None.

    Returns:
      (outs, state).
    """

    def steps(i, outs, state):
      state = before(i, state)
      for kernel in kernels:
        outs, state = self._run(kernel, i, outs, state)
      return outs, state

    # the first makes the arrays that the others write on into
    carry = steps(jnp.int32(0), None, state)
    carry = jax.lax.fori_loop(1, self.shape.n, lambda i, x: steps(i, *x), carry)
    if last is None:
      return carry
    return self._run(last, jnp.int32(self.shape.n), *carry)

  def _run(self, kernel: Kernel, i, outs, state):
    inputs = (jnp.reshape(i, (1,)), self.args, outs, state)
    # once they are made, the arrays written are the same
    made = 0 if outs is None else len(jax.tree.leaves(outs))

    def run(step, args, _, state, outs, new):
      kernel.run(self.shape, step, *args, state, outs, new)

    return _call(
      run, self.shape, (*self.grid, kernel.programs), inputs,
      (self.outs, state), made, kernel.name, kernel.warps,
    )  # fmt: skip


def through(kernel, shape: Shape, grid, args, outs, state, name, warps):
  """(outs, state) of a kernel `(shape, *args, outs, state)`, a walk in one.

  The state is handed on in place: written, and read again after `settle`.
  """

  def run(args, _, outs, state):
    kernel(shape, *args, outs, state)

  return _call(run, shape, grid, (args, state), (outs, state), 0, name, warps)


def _call(run, shape: Shape, grid, inputs, results, made: int, name, warps):
  """A Triton kernel `run(*inputs, *results)` over whole arrays.

  Args:
    run: of references.
    shape: of the walk.
    grid: of programs.
    inputs: a tuple, the state its last.
    results: (outs, state), or what is like them; the state is that of inputs.
    made: how many leaves of outs are those before the state in inputs, too.
    name: of the kernel.
    warps: of a program.
  """
  everywhere = pl.BlockSpec(memory_space=pl.ANY)
  results = jax.tree.map(like, results)
  size, held = (len(jax.tree.leaves(x)) for x in results)
  first = len(jax.tree.leaves(inputs)) - held
  aliases = {first + j: size + j for j in range(held)}
  aliases |= {first - made + j: j for j in range(made)}
  return pl.pallas_call(
    run,
    grid=grid,
    in_specs=jax.tree.map(lambda _: everywhere, inputs),
    out_specs=jax.tree.map(lambda _: everywhere, results),
    out_shape=results,
    input_output_aliases=aliases,
    interpret=shape.interpret,
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    name=name,
  )(*inputs)


def settle(shape: Shape) -> None:
  """What the program's threads have written, all of them read after this."""
  if not shape.interpret:
    triton.debug_barrier()


def each_program(*bodies) -> None:
  """Of a head's programs, each runs its own body."""
  for j, body in enumerate(bodies):
    pl.when(pl.program_id(2) == j)(body)


def each_chunk(*bodies) -> None:
  """Runs `body((b, h, i))`, each body of a chunk in a program of its own.

  The grid is of heads, sequences and, bodies times chunks, programs.
  """
  h, b, j = (pl.program_id(axis) for axis in range(3))
  count = len(bodies)
  at = b, h, j // count
  for which, body in enumerate(bodies):
    if count == 1:
      body(at)
    else:
      pl.when(j % count == which)(functools.partial(body, at))
