"""Times the memory beside attention: `nestax-bench kernel --length=4096`.

The recurrence alone, by implementation, and `jax.nn.dot_product_attention`
(cuDNN's where there is a GPU and bfloat16) of as many tokens, heads and
widths. Forward, and forward with the gradients of all inputs. FLOPs are those
of the chunk form's matmuls, three times with the backward pass; bytes are
inputs, outputs and their gradients once; the floor is what either takes at
the device's peak, whichever is longer.

With `--tpu-topology=v5e:2x2` nothing runs: see `benches/tpu.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from nestax.launch import metrics
from nestax.launch.benches import settings, timing, tpu
from nestax.models.memory import api, cost
from nestax.models.memory.types import GATES, Inputs, MemoryConfig

ATTENTION = 'attention'
# HBM bytes/s of one device, by the beginning of its kind.
PEAK_BYTES = (
  ('NVIDIA H100', 3.35e12),
  ('NVIDIA H200', 4.8e12),
  ('NVIDIA A100', 2.04e12),
  ('TPU v4', 1.23e12),
  ('TPU v5 lite', 0.82e12),
  ('TPU v5e', 0.82e12),
  ('TPU v5', 2.77e12),
  ('TPU v6', 1.64e12),
)
# In a row: what a host takes to start one would be in the time of a short one.
CALLS = 5
BIASES = {'eta': -2.0, 'alpha': 5.0}  # of the gates' logits
FLAGS = flags.FlagValues()
_BATCH = flags.DEFINE_integer(
  'batch', 1,
  'Sequences that are read at once.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_HEADS = flags.DEFINE_integer(
  'heads', 2,
  'Heads of the memory and of attention.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_WIDTH = flags.DEFINE_integer(
  'width', 64,
  'Width of a head, of keys and of values.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_CHUNK = flags.DEFINE_integer(
  'chunk', 64,
  'Tokens of a chunk of the memory.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_LENGTH = flags.DEFINE_list(
  'length', ['512'],
  'Tokens of a sequence, several to compare.',
  flag_values=FLAGS,
)  # fmt: skip
_DTYPE = flags.DEFINE_enum(
  'dtype', 'bfloat16', ['bfloat16', 'float32'],
  'Type of the inputs and the matmuls.',
  flag_values=FLAGS,
)  # fmt: skip
_SET = flags.DEFINE_multi_string(
  'set', [],
  "Key of the memory's rule to change, such as momentum=True",
  flag_values=FLAGS,
)  # fmt: skip
_IMPLEMENTATIONS = flags.DEFINE_list(
  'implementations', [],
  'What to time, of scan, pallas, attention; all if not given, pallas '
  'only on an accelerator (elsewhere it is interpreted).',
  flag_values=FLAGS,
)  # fmt: skip
_REPEATS = flags.DEFINE_integer(
  'repeats', 10,
  'Rounds in which each is timed.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_string(
  'json', '',
  'File that the results are appended to, as lines of JSON.',
  flag_values=FLAGS,
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_string(
  'tpu-topology', '',
  'TPU to compile for, with nothing run, such as v5e:2x2.',
  flag_values=FLAGS,
)  # fmt: skip


class Shape(NamedTuple):
  """Of the inputs, `[B, T, H, K]`."""

  B: int
  T: int
  H: int
  K: int
  dtype: str


def rule(chunk: int, changes: Sequence[str]) -> MemoryConfig:
  """The rule with some options changed, such as `momentum=True`.

  Raises:
    ValueError: in words, for an option or a value that cannot be.
  """
  config = {'rule': dataclasses.asdict(MemoryConfig(chunk, chunk))}
  for change in changes:
    settings.change(config, f'rule.{change}', f'--set={change}')
  return MemoryConfig(**config['rule'])


def initial_values(cfg: MemoryConfig, H: int, K: int, key):
  """First values as a model has them, see `models.hope.InitialValues`."""
  keys = iter(jax.random.split(key, 16))
  F = K * cfg.expansion

  def normal(*shape, gain=0.1):
    return gain * shape[-1] ** -0.5 * jax.random.normal(next(keys), shape)

  initial = {}
  for box in cfg.boxes:
    if box in cfg.deep:
      initial[box] = {'inner': normal(H, F, K, gain=1.0)}
      initial[box]['outer'] = normal(H, K, F)
    else:
      initial[box] = {'kernel': normal(H, K, K)}
  for gate in GATES:
    if gate not in cfg.given:
      bias = jnp.full((H,), BIASES[gate])
      initial[gate] = {'kernel': normal(H, K), 'bias': bias}
  return initial


def functions(cfg: MemoryConfig, shape: Shape, names) -> dict[str, Callable]:
  """Name -> `(initial, Inputs) -> output`."""

  def memory(name):
    def run(initial, inputs):
      return api.run(
        cfg, initial, None, inputs, dtype=jnp.dtype(shape.dtype),
        implementation=name,
      )[1]  # fmt: skip

    return run

  fused = jax.default_backend() == 'gpu' and shape.dtype == 'bfloat16'

  def attention(initial, inputs):
    del initial
    how = 'cudnn' if fused else 'xla'
    return jax.nn.dot_product_attention(
      *inputs[:3], is_causal=True, implementation=how
    )

  return {
    name: attention if name == ATTENTION else memory(name) for name in names
  }


def _inputs(cfg: MemoryConfig, shape: Shape):
  keys = jax.random.split(jax.random.key(0), 8)
  size = (shape.B, shape.T, shape.H, shape.K)
  q, k, v, g = (jax.random.normal(k, size, shape.dtype) for k in keys[:4])

  def log_gate(key, bias=0.0):
    return jax.nn.log_sigmoid(jax.random.normal(key, size[:3]) + bias)

  inputs = Inputs(q, k, v, log_gate(keys[4]) if cfg.momentum else None, None)
  if 'eta' in cfg.given:
    eta = cfg.eta_max * jnp.exp(log_gate(keys[6], BIASES['eta']))
    inputs = inputs._replace(eta=eta)
  if 'alpha' in cfg.given:
    log_alpha = log_gate(keys[7], BIASES['alpha'])
    inputs = inputs._replace(log_alpha=log_alpha)
  return (initial_values(cfg, shape.H, shape.K, keys[5]), inputs), g


def measure(cfg: MemoryConfig, shape: Shape, names, repeats: int) -> list[dict]:
  """Times the implementations in one process, in turn.

  Args:
    cfg: the rule.
    shape: of the inputs.
    names: of implementations; one may be ATTENTION.
    repeats: rounds.

  Returns:
    Rows by implementation and pass ('forward', 'both'): ms, its ratio to
    attention's, TFLOP/s, GB/s, and the floor's ms where the device is known.
  """
  args, g = _inputs(cfg, shape)
  runs = {}
  for name, run in functions(cfg, shape, names).items():

    def both(args, g, run=run):
      y, back = jax.vjp(run, *args)
      return y, back(g.astype(y.dtype))

    forward, both = jax.jit(run), jax.jit(both)
    runs[f'{name} forward'] = _in_a_row(forward, *args)
    runs[f'{name} both'] = _in_a_row(both, args, g)
  seconds = timing.interleaved(runs, repeats)
  ms = {name: timing.median_ms(x) / CALLS for name, x in seconds.items()}
  return [_row(cfg, shape, name, ms) for name in runs]


def _in_a_row(run: Callable, *args) -> Callable:
  def calls():
    for _ in range(CALLS):
      last = run(*args)
    return last

  return calls


def _row(cfg: MemoryConfig, shape: Shape, run: str, ms) -> dict:
  name, part = run.split()
  flops, moved = work(cfg, shape, name == ATTENTION, part == 'both')
  peer = ms.get(f'{ATTENTION} {part}')
  kind = jax.devices()[0].device_kind
  peaks = metrics.peak_flops(kind), peak_bytes(kind)
  floor = None
  if all(peaks) and shape.dtype == 'bfloat16':
    floor = 1e3 * max(flops / peaks[0], moved / peaks[1])
  return {
    'name': run,
    'T': shape.T,
    'ms': ms[run],
    f'/ {ATTENTION}': peer and ms[run] / peer,
    'TFLOP/s': flops / ms[run] / 1e9,
    'GB/s': moved / ms[run] / 1e6,
    'floor ms': floor,
    '/ floor': floor and ms[run] / floor,
  }


def work(cfg: MemoryConfig, shape: Shape, attention: bool, backward: bool):
  """(FLOPs, bytes) that have to be."""
  itemsize = jnp.dtype(shape.dtype).itemsize
  flops = cost.flops_per_token(cfg, shape.K)
  moved = cost.bytes_per_token(shape.K, itemsize, backward)
  if attention:
    flops = 4.0 * shape.K * shape.T / 2
    moved = (11 if backward else 4) * shape.K * itemsize
  heads = shape.B * shape.T * shape.H
  return heads * flops * (3 if backward else 1), heads * moved


def peak_bytes(device_kind: str) -> float | None:
  """Peak bytes/s of a device's memory, or None where it is not known."""
  for kind, rate in PEAK_BYTES:
    if device_kind.startswith(kind):
      return rate
  return None


def _names() -> list[str]:
  known = [*api.IMPLEMENTATIONS, ATTENTION]
  names = _IMPLEMENTATIONS.value or known[1:]
  if not _IMPLEMENTATIONS.value and jax.default_backend() == 'cpu':
    names.remove('pallas')
  for name in names:
    if name not in known:
      raise ValueError(f'--implementations={name}: of {", ".join(known)}')
  return names


def main() -> None:
  """Prints a table a length, and adds them to a file where one is named."""
  cfg = rule(_CHUNK.value, _SET.value)
  size = f'B{_BATCH.value} H{_HEADS.value} K{_WIDTH.value} C{_CHUNK.value}'
  for word in _LENGTH.value:
    if not word.isdecimal() or not int(word):
      raise ValueError(f'--length={word}: a whole number of tokens')
    shape = Shape(
      _BATCH.value, int(word), _HEADS.value, _WIDTH.value, _DTYPE.value
    )
    title = f'{size} {_DTYPE.value} {" ".join(_SET.value)}'.strip()
    if _TOPOLOGY.value:
      rows = tpu.measure(_TOPOLOGY.value, cfg, shape)
      title = f'{title} for {_TOPOLOGY.value}, per chunk of a head'
    else:
      rows = measure(cfg, shape, _names(), _REPEATS.value)
      title = f'{title}; {timing.device()}'
    timing.show(rows, title)
    if _JSON.value:
      timing.append(rows, _JSON.value)
