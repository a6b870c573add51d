"""Compiles the memory's kernels ahead of time: a process that `tpu` starts.

`python -m nestax.launch.benches.tpu_compile JSON`, with `topology`, `rule`
(of `MemoryConfig`), `shape` (B, T, H, K, dtype) and `documents`, true where
rows may hold several. It prints nothing: what the compiler has to say is in the
dump that LIBTPU_INIT_ARGS names.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from nestax.models.memory import api
from nestax.models.memory.types import GATES, Inputs, MemoryConfig


def main(words: str) -> None:
  asked = json.loads(words)
  rule = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in asked['rule'].items()
  }
  cfg = MemoryConfig(**rule)
  B, T, H, K, dtype = asked['shape']
  described = topologies.get_topology_desc(
    platform='tpu', topology_name=asked['topology']
  )
  place = jax.sharding.SingleDeviceSharding(described.devices[0])

  def array(*shape, dtype='float32'):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  flat, F = {'kernel': array(H, K, K)}, K * cfg.expansion
  deep = {'inner': array(H, F, K), 'outer': array(H, K, F)}
  initial = {box: deep if box in cfg.deep else flat for box in cfg.boxes} | {
    gate: {'kernel': array(H, K), 'bias': array(H)}
    for gate in GATES
    if gate not in cfg.given
  }
  tokens = array(B, T, H, K, dtype=dtype)

  def gate(is_there):
    return array(B, T, H) if is_there else None

  reset = array(B, T, dtype=bool) if asked['documents'] else None
  inputs = Inputs(
    tokens, tokens, tokens, gate(cfg.momentum), reset,
    *(gate(name in cfg.given) for name in GATES),
  )  # fmt: skip

  def forward(initial, inputs):
    return api.run(
      cfg, initial, None, inputs,
      dtype=jnp.dtype(dtype), implementation='pallas',
    )[1]  # fmt: skip

  def both(initial, inputs, d_out):
    out, back = jax.vjp(forward, initial, inputs)
    return out, back(d_out)

  jax.jit(forward).lower(initial, inputs).compile()
  jax.jit(both).lower(initial, inputs, array(B, T, H, K)).compile()


if __name__ == '__main__':
  main(sys.argv[1])
