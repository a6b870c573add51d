"""Times decoding: `nestax-bench decode --config=hope_135m`.

One token after the other, the likeliest each time, every one waited for as a
reader would; far into a stream and near its start. Far means that the state's
clocks say so: they are set to the last boundary of all periods before the
position, and the tokens from there on are read. An attention's cache has room
for all that it may see, and costs the same filled or empty. A window of tokens
is a whole number of periods, so that what levels learn at their ends is in the
mean.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from nestax.launch.benches import settings, timing
from nestax.models import language_model, model_state
from nestax.models.attention import AttentionState
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
_POSITIONS = flags.DEFINE_list(
  'positions', ['1000', '1000000'],
  'Tokens that a stream has read before, several to compare.',
  flag_values=FLAGS,
)  # fmt: skip
_BATCH = flags.DEFINE_integer(
  'batch', 1,
  'Sequences that are decoded at once.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_LEVELS = flags.DEFINE_list(
  'levels', ['frozen', 'first_order'],
  'How levels learn as they read: frozen (not), first_order or full.',
  flag_values=FLAGS,
)  # fmt: skip
_BLOCKS = flags.DEFINE_string(
  'blocks', 'last_quarter',
  'Blocks whose levels learn, where a config names none.',
  flag_values=FLAGS,
)  # fmt: skip
_TOKENS = flags.DEFINE_integer(
  'tokens', 0,
  'Tokens of a window that is timed; 0: as many as the longest period.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_REPEATS = flags.DEFINE_integer(
  'repeats', 3,
  'Windows of tokens that are timed.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_string(
  'json', '',
  'File that the results are appended to, as lines of JSON.',
  flag_values=FLAGS,
)  # fmt: skip


class Case(NamedTuple):
  """One stream to time."""

  config: str
  levels: str
  position: int

  @property
  def name(self) -> str:
    return f'{self.config} {self.levels} @{self.position}'


def cases(names, changes, positions, levels, blocks) -> dict:
  """All streams that are asked for, checked: `Case -> ModelConfig`.

  Raises:
    ValueError: in words, for a mode, a position or a config that cannot be.
  """
  made = {}
  for name in names:
    config = settings.load(name, changes)
    cfg = ModelConfig.from_dict(config.model)
    for mode in settings.modes(cfg, levels):
      for word in positions:
        if not word.isdecimal():
          raise ValueError(f'--positions={word}: a whole number of tokens')
        learning = settings.with_levels(cfg, mode, blocks)
        made[Case(name, mode, int(word))] = learning
  return made


def period(cfg: ModelConfig) -> int:
  """Tokens after which everything periodic in a model has come round."""
  periods = [cfg.rule.chunks[1] if cfg.rule else 1]
  if cfg.stream:
    periods += cfg.stream.periods
  return math.lcm(*periods)


def at(cfg: ModelConfig, params, batch: int, position: int, room: int):
  """State of sequences that have read `position` tokens.

  Args:
    cfg: the model.
    params: its parameters.
    batch: sequences.
    position: tokens read.
    room: tokens that will be read from there.
  """
  state = model_state.init_state(cfg, batch, position + room)
  rest = position % period(cfg)
  state = _shift(state, position - rest)
  if not rest:
    return state
  model = language_model.LanguageModel(cfg)
  tokens = jax.random.randint(jax.random.key(2), (batch, rest), 0, cfg.V)
  read = jax.jit(lambda p, s, t: model.apply({'params': p}, s, t)[0])
  return read(params, state, tokens)


def _shift(state: model_state.ModelState, tokens: int):
  """Sets all clocks on by a whole number of periods."""

  def on(blocks):
    mixer = blocks.mixer
    if not isinstance(mixer, AttentionState):
      return blocks  # a memory only knows where it is in its chunk
    mixer = mixer._replace(clock_B=mixer.clock_B + tokens)
    return blocks._replace(mixer=mixer)

  levels = state.levels
  if levels is not None:
    levels = levels._replace(
      clock_B=levels.clock_B + tokens, boundary=on(levels.boundary)
    )
  return state._replace(blocks=on(state.blocks), levels=levels)


def prepare(cfg: ModelConfig, batch: int, position: int, room: int):
  """A function that decodes one token, and GiB that the program needs."""

  def init(key):
    tokens = jnp.zeros((1, 1), jnp.int32)
    model = language_model.LanguageModel(cfg)
    return nn.unbox(model.init(key, None, tokens)['params'])

  params = jax.jit(init)(jax.random.key(0))
  state = at(cfg, params, batch, position, room)
  held = [(state, jnp.zeros((batch,), jnp.int32))]
  shapes, tree = jax.tree.flatten(jax.eval_shape(lambda: (params, *held[0])))
  compiled = _compiled(cfg, tuple(shapes), tree)

  def run():
    held.append(compiled(params, *held.pop()))
    return held[0][1]

  return run, timing.compiled_peak(compiled) / 2**30


@functools.cache
def _compiled(cfg: ModelConfig, shapes, tree):
  """The same program at every position, where the state has the same shape."""
  model = language_model.LanguageModel(cfg)

  def step(params, state, tokens_B):
    state, logits = model.apply({'params': params}, state, tokens_B[:, None])
    return state, jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

  args = jax.tree.unflatten(tree, shapes)
  return jax.jit(step, donate_argnums=1).lower(*args).compile()


def measure(made, batch: int, tokens: int, repeats: int) -> list[dict]:
  """Times all streams in one process, in turn.

  Args:
    made: as `cases` gives them.
    batch: sequences at once.
    tokens: of a window; 0 takes the longest period.
    repeats: windows that are timed.

  Returns:
    Rows: ms a token (the mean of a window, the median of them; the median and
    the dearest token), ratios to the same stream at the first position and to
    the same without learning, GiB that the step needs.
  """
  window = tokens or max(period(cfg) for cfg in made.values())
  runs, peaks = {}, {}
  for case, cfg in made.items():
    room = window * (repeats + 1)
    timing.say(f'compiling {case.name}, and reading {window} tokens')
    runs[case.name], peaks[case.name] = prepare(cfg, batch, case.position, room)
    jax.block_until_ready(runs[case.name]())
  timing.say(
    f'{len(runs)} streams, {repeats} windows of {window} tokens each: '
    f'{len(runs) * repeats * window} tokens, one after the other '
    '(--tokens and --repeats make it shorter)'
  )
  seconds = timing.interleaved(runs, repeats, window, warmup=0)
  ms = {name: timing.median_ms(times) for name, times in seconds.items()}
  first = {}
  table = []
  for case in made:
    name, times = case.name, seconds[case.name] * 1e3
    start = first.setdefault(case[:2], name)
    frozen = ms.get(case._replace(levels='frozen').name)
    table.append({
      'name': name,
      'ms': ms[name],
      'median token': float(np.median(times)),
      'dearest token': float(times.max()),
      'time / first position': ms[name] / ms[start],
      'time / frozen': frozen and ms[name] / frozen,
      'peak GiB': peaks[name],
    })  # fmt: skip
  return table


def main() -> None:
  """Prints the table, and adds it to a file where one is named."""
  made = cases(
    _CONFIG.value, _SET.value, _POSITIONS.value, _LEVELS.value, _BLOCKS.value
  )
  rows = measure(made, _BATCH.value, _TOKENS.value, _REPEATS.value)
  timing.show(rows, f'ms a token, {_BATCH.value} at once; {timing.device()}')
  if _JSON.value:
    timing.append(rows, _JSON.value)
