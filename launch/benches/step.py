"""Times training steps: `nestax-bench step --config=hope_135m`.

A step is that of nestax-train, optimiser included, on random tokens.
nestax-train says where documents start; rows here are of one document, which
takes shorter paths, unless `--documents` gives their mean length. A config's
levels are frozen inside the sequence, or learn (`--levels`); a Transformer has
none and is timed once. `--repeats=0` compiles only, for compile time and
memory. MFU counts the matmuls of the model with its levels frozen, attention
inside documents: what learning adds is overhead, and so is recomputation.
`--top=10` traces one step of each and shows the ten dearest operations.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from nestax.launch import mesh as meshes
from nestax.launch import metrics, optimizer
from nestax.launch import step as steps
from nestax.launch.benches import settings, timing, trace
from nestax.launch.configs import common
from nestax.launch.prepare import Plan
from nestax.models import language_model
from nestax.models.config import ModelConfig

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_list(
  'config', ['tiny'], 'Configs to time, by name or file.', flag_values=FLAGS
)
_SET = flags.DEFINE_multi_string(
  'set', [],
  'Key of all configs to change, such as model.D=64',
  flag_values=FLAGS,
)  # fmt: skip
_LENGTH = flags.DEFINE_list(
  'length', [],
  "Tokens of a row, several to compare; the config's if not given.",
  flag_values=FLAGS,
)  # fmt: skip
_BATCH = flags.DEFINE_integer(
  'batch', 4, 'Rows that a step trains on.', lower_bound=1, flag_values=FLAGS
)
_DOCUMENTS = flags.DEFINE_integer(
  'documents', 0,
  'Mean tokens of a document; 0: each row is one document.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_LEVELS = flags.DEFINE_list(
  'levels', ['frozen'],
  'How levels learn inside a row: frozen (not), first_order or full.',
  flag_values=FLAGS,
)  # fmt: skip
_BLOCKS = flags.DEFINE_string(
  'blocks', 'last_quarter',
  'Blocks whose levels learn, where a config names none.',
  flag_values=FLAGS,
)  # fmt: skip
_PEER = flags.DEFINE_string(
  'peer', '',
  'Config that the ratios are to; the last one if not given.',
  flag_values=FLAGS,
)  # fmt: skip
_REPEATS = flags.DEFINE_integer(
  'repeats', 5,
  'Rounds in which each step is timed; 0: compile only.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_PEAK = flags.DEFINE_float(
  'peak_flops', 0.0,
  'Peak FLOP/s of a device, for MFU; 0: from our table.',
  flag_values=FLAGS,
)  # fmt: skip
_TOP = flags.DEFINE_integer(
  'top', 0, 'Operations to show of each step; on a GPU with '
  'XLA_FLAGS=--xla_gpu_enable_command_buffer= in the environment.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_string(
  'json', '',
  'File that the results are appended to, as lines of JSON.',
  flag_values=FLAGS,
)  # fmt: skip


class Step(NamedTuple):
  """A compiled step.

  Attributes:
    run: makes one and returns its metrics; None where no state was made.
    devices: that it runs on.
    seconds: that compiling took.
    peak: bytes that it needs.
    hlo: gives the optimised program's text.
  """

  run: Callable | None
  devices: int
  seconds: float
  peak: int
  hlo: Callable[[], str]


class Case(NamedTuple):
  """One step to time."""

  config: str
  levels: str
  length: int

  @property
  def name(self) -> str:
    return f'{self.config} {self.levels} {self.length}'


def cases(names, changes, lengths, levels, blocks, batch: int):
  """All steps that are asked for, checked: `Case -> (ConfigDict, model)`.

  Raises:
    ValueError: in words, for a mode, a length or a config that cannot be.
  """
  made = {}
  for name in names:
    config = settings.load(name, changes)
    cfg = ModelConfig.from_dict(config.model)
    for word in lengths or [str(config.data.length)]:
      if not word.isdecimal() or not int(word):
        raise ValueError(f'--length={word}: a whole number of tokens')
      for mode in settings.modes(cfg, levels):
        config = settings.load(name, changes)
        config.train.batch, config.data.length = batch, int(word)
        common.check(config)
        learning = settings.with_levels(cfg, mode, blocks)
        made[Case(name, mode, int(word))] = config, learning
  return made


def random_batch(cfg: ModelConfig, rows: int, length: int, documents: int = 0):
  """Random tokens as the pipeline would give them.

  A document starts at one of `documents` tokens, at random; 0 is one document
  a row, of which nothing is said.
  """
  shape = (rows, length)
  tokens, targets = jax.random.randint(
    jax.random.key(1), (2, *shape), 0, cfg.V, jnp.int32
  )
  return {
    'tokens': tokens,
    'targets': targets,
    'weights': jnp.ones(shape, jnp.float32),
    'bytes': jnp.ones(shape, jnp.int32),
    # None, so that attention may take its fused path
    'reset': _starts(shape, documents) if documents else None,
  }


def _starts(shape, documents: int):
  return jax.random.bernoulli(jax.random.key(2), 1 / documents, shape)


def read_length(rows: int, length: int, documents: int) -> float:
  """Length of a row of one document whose tokens see as many, in mean."""
  if not documents:
    return length
  token_L, reset_BxL = np.arange(length), _starts((rows, length), documents)
  start_BxL = np.maximum.accumulate(np.where(reset_BxL, token_L, 0), axis=1)
  return 2 * float(np.mean(token_L - start_BxL + 0.5))


def prepare(config, cfg: ModelConfig, keep: bool, documents: int = 0) -> Step:
  """Compiles a step.

  Args:
    config: ConfigDict of the run.
    cfg: the model, levels as they shall learn.
    keep: whether to make the state and `run`.
    documents: see `random_batch`.
  """
  rows, length = config.train.batch, config.data.length
  mesh = meshes.make(config.mesh, rows // config.train.accumulate, length)
  model = language_model.LanguageModel(cfg)
  params = nn.unbox(language_model.abstract(model))
  tx, schedule = optimizer.build(config, params, mesh)
  # of fresh sequences, and with nothing frozen, whatever the config says
  plan = Plan(config, model, mesh, tx, schedule, None, None, None)
  with jax.set_mesh(mesh):
    abstract, step = plan.program()
    part = meshes.part(mesh, rows)
    batch = random_batch(cfg, rows, length, documents)
    reset = {} if documents else {'reset': batch.pop('reset')}
    batch = meshes.put(mesh, jax.device_get(batch), part) | reset
    start = time.perf_counter()
    compiled = step.lower(abstract, batch).compile()
    seconds = time.perf_counter() - start
    peak = timing.compiled_peak(compiled)
    if not keep:
      return Step(None, mesh.size, seconds, peak, compiled.as_text)
    held = [steps.init_state(model, tx, mesh, config.seed)]

  def run():
    state, numbers = compiled(held.pop(), batch)
    held.append(state)
    return numbers

  return Step(run, mesh.size, seconds, peak, compiled.as_text)


def measure(
  made,
  repeats: int,
  peer: str,
  peak_flops: float,
  top: int = 0,
  documents: int = 0,
) -> tuple[list[dict], dict[str, list[dict]]]:
  """Times all steps in one process, in turn.

  Args:
    made: as `cases` gives them.
    repeats: rounds; 0 to compile only.
    peer: config whose frozen tokens/s the others are held against.
    peak_flops: of a device; 0 takes the table's.
    top: operations to name of each step, see `trace.top`.
    documents: see `random_batch`.

  Returns:
    Rows and, for each case by name, the rows of its operations. A row: mean
    tokens of a document, ms a step, tokens/s, ratios of time to the same
    config frozen and of speed to the peer at the same length, MFU, seconds to
    compile, GiB that the compiled step needs. None where not known.
  """
  runs, texts, rows, dearest = {}, {}, [], {}
  for case, (config, cfg) in made.items():
    timing.say(f'compiling {case.name}')
    made_step = prepare(config, cfg, repeats > 0, documents)
    runs[case.name], texts[case.name] = made_step.run, made_step.hlo
    tokens = config.train.batch * case.length
    flops = 3 * language_model.flops_per_token(
      settings.with_levels(cfg, 'frozen', ''),
      read_length(config.train.batch, case.length, documents),
    )
    rows.append({
      'name': case.name,
      'document': documents or case.length,
      'tokens': tokens,
      'flops': flops * tokens / made_step.devices,
      'compile s': made_step.seconds,
      'peak GiB': made_step.peak / 2**30,
    })  # fmt: skip
  times = timing.interleaved(runs, repeats) if repeats else {}
  ms = {name: timing.median_ms(seconds) for name, seconds in times.items()}
  if repeats and top:
    dearest = {
      name: trace.top(run, texts[name](), top) for name, run in runs.items()
    }
  peak_flops = peak_flops or metrics.peak_flops(jax.devices()[0].device_kind)
  table = []
  for case, row in zip(made, rows):
    frozen = case._replace(levels='frozen').name
    other = case._replace(config=peer, levels='frozen').name
    table.append(_numbers(row, ms, frozen, other, peer, peak_flops))
  return table, dearest


def _numbers(row, ms, frozen: str, other: str, peer: str, peak_flops) -> dict:
  own = ms.get(row['name'])

  def ratio(above, below):
    return above / below if above and below else None

  second = own and own / 1e3
  flops = ratio(row['flops'], second)
  return {
    'name': row['name'],
    'document': row['document'],
    'ms': own,
    'tokens/s': ratio(row['tokens'], second),
    'time / frozen': ratio(own, ms.get(frozen)),
    f'speed / {peer}': ratio(ms.get(other), own),
    'MFU': ratio(flops, peak_flops),
    'compile s': row['compile s'],
    'peak GiB': row['peak GiB'],
  }


def main() -> None:
  """Prints the table, and adds it to a file where one is named."""
  names: Sequence[str] = _CONFIG.value
  made = cases(
    names, _SET.value, _LENGTH.value, _LEVELS.value, _BLOCKS.value,
    _BATCH.value,
  )  # fmt: skip
  if _PEER.value and _PEER.value not in names:
    raise ValueError(f'--peer={_PEER.value}: none of --config={names}')
  rows, dearest = measure(
    made, _REPEATS.value, _PEER.value or names[-1], _PEAK.value, _TOP.value,
    _DOCUMENTS.value,
  )  # fmt: skip
  documents = f' of documents of {_DOCUMENTS.value} tokens'
  title = f'{_BATCH.value} rows a step{documents if _DOCUMENTS.value else ""}'
  timing.show(rows, f'{title}; {timing.device()}')
  for name, operations in dearest.items():
    if operations:
      timing.show(operations, f'\n{name}: operations of one step')
    else:
      print(f'\n{name}: the profiler names no operations here')
  peak = timing.peak_bytes()
  if peak and _REPEATS.value:
    print(f'\nall steps together held {peak / 2**30:.1f} GiB at most')
  if _JSON.value:
    timing.append(rows, _JSON.value)
