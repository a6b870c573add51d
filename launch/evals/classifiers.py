"""Three ways to learn classes stage after stage, for `incremental`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestax.launch import trained
from nestax.launch.evals import asking, classes, contexts
from nestax.models import language_model, segments
from nestax.models.config import ModelConfig
from nestax.models.continuum import Segment
from nestax.sleep import distributions
from nestax.sleep import reader as readers
from nestax.sleep.reader import Said


@dataclasses.dataclass(frozen=True)
class How:
  """How a stage is learned, and classes are asked for.

  Attributes:
    passes: over a stage's examples.
    rate: of Adam, where weights are tuned.
    rows: of a batch, tuned or asked.
    window: tokens that attention sees of a stream, about as many as an example
      of CLINC has: with more it finds the classes among the examples before,
      and what levels learn is to have it look there. Longer texts want more.
    alone: instead of a window, attention is emptied before every call of a
      stream, which holds as many whole examples as the first period has room
      for, and sees all of the call.
    prior: a name's likelihood is divided by what it has after no text at all
      (Zhao et al. 2021, 'Calibrate Before Use'), which takes off how likely
      the names of the last stage are whatever is asked.
  """

  passes: int = 1
  rate: float = 1e-4
  rows: int = 16
  window: int = 32
  alone: bool = False
  prior: bool = False

  def __post_init__(self):
    for name in ('passes', 'rows', 'window'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: at least 1')


class Method(NamedTuple):
  """One way to go through the stages.

  Attributes:
    learn: `(memory, stage, rng) -> memory`.
    choose: `(memory, names of all classes so far, texts) -> chosen names`.
    memory: before the first stage.
  """

  learn: Callable[[Any, classes.Stage, Any], Any]
  choose: Callable[[Any, Sequence[str], Sequence[str]], list[str]]
  memory: Any


def said(label: str) -> str:
  """A class's name as it is written."""
  return f' {label.replace("_", " ")}\n'


def put(text: str) -> str:
  """A text before its class's name."""
  return f'Text: {text}\nClass:'


def _likeliest(made, how, names, texts, params, context=None) -> list[str]:
  encode, first = made.tokenizer.encode, _first(made)
  answers = [made.tokenizer.encode_after(said(name)) for name in names]
  nothing = [''] if how.prior else []
  prompts = [first + encode(put(text)) for text in [*texts, *nothing]]
  asked = asking.Asked(made.model.cfg, params, how.rows, context=context)
  pairs = [(prompt, answer) for prompt in prompts for answer in answers]
  logs = np.array([score.log for score in asking.score(asked, pairs)])
  logs = logs.reshape(len(prompts), len(names))
  if how.prior:
    logs = logs[:-1] - logs[-1:]
  return [names[i] for i in logs.argmax(1)]


def _first(made: trained.Trained) -> list[int]:
  return [made.tokenizer.bos] if made.tokenizer.adds_bos else []


def levels(made: trained.Trained, how: How) -> Method:
  """Reads the examples as a stream; its levels are all that stays.

  Raises:
    ValueError: for a model no level of which learns.
  """
  cfg = made.model.cfg
  if not cfg.stream:
    raise ValueError(
      'methods=levels: no level of this model learns; add :stack=groups to a '
      'pretrained file, or leave the method out'
    )
  encode, period = made.tokenizer.encode, cfg.stream.periods[0]
  piece = -(-128 // period) * period

  def examples(stage, rng) -> list[list[int]]:
    order = [rng.permutation(len(stage.train)) for _ in range(how.passes)]
    found = [stage.train[i] for i in np.concatenate(order)]
    return [encode(put(e.text) + said(e.label) + '\n') for e in found]

  def read(state, row, piece, window):
    row = np.array(row, np.int32)[None]
    return contexts.read(cfg, made.params, row, window, piece, state)

  def learn(state, stage, rng):
    if how.alone:
      every = [_first(made) + ids for ids in examples(stage, rng)]
      for row in _whole(every, period, encode('\n')[-1]):
        if state is not None:
          state = contexts.alone(cfg, len(row), state)
        state = read(state, row, len(row), len(row))
      return state
    ids = list(_first(made)) if state is None else []
    ids = np.array(sum(examples(stage, rng), ids))
    # whole calls, so that nothing waits: the first examples fill the last one
    row = np.resize(ids, -(-len(ids) // piece) * piece)
    return read(state, row, piece, how.window)

  def choose(state, names, texts):
    context = readers.learned(state)
    return _likeliest(made, how, names, texts, made.params, context)

  return Method(learn, choose, None)


def _whole(rows, period: int, filler: int) -> list[list[int]]:
  """Puts rows together while they fit in a period, and fills periods up."""
  found = [[]]
  for row in rows:
    if found[-1] and len(found[-1]) + len(row) > period:
      found.append([])
    found[-1] = found[-1] + row
  return [row + [filler] * (-len(row) % period) for row in found]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(cfg: ModelConfig, rate: float, params, opt_state, rows: Said):
  """A step of Adam on what is said in rows."""

  def loss(params):
    logits = readers.score(readers.of_model(cfg), params, None, rows.tokens_BxL)
    mask = rows.said_BxL[:, 1:]
    logs = distributions.log_chance(logits, rows.tokens_BxL[:, 1:], mask)
    return -logs.sum() / jnp.maximum(mask.sum(), 1)

  grads = jax.grad(loss)(params)
  updates, opt_state = optax.adam(rate).update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def tuning(made: trained.Trained, how: How) -> Method:
  """Tunes all weights on the classes' names, by Adam."""

  def learn(params, stage, rng):
    opt_state = optax.adam(how.rate).init(params)
    for _ in range(how.passes):
      order = rng.permutation(len(stage.train))
      for at in range(0, len(order), how.rows):
        part = [stage.train[i] for i in order[at : at + how.rows]]
        params, opt_state = _update(
          made.model.cfg, how.rate, params, opt_state, _rows(made, part, how)
        )
    return params

  def choose(params, names, texts):
    return _likeliest(made, how, names, texts, params)

  return Method(learn, choose, made.params)


def _rows(made, examples, how: How) -> Said:
  encode, first = made.tokenizer.encode, _first(made)
  prompts = [first + encode(put(example.text)) for example in examples]
  answers = [
    made.tokenizer.encode_after(said(example.label)) for example in examples
  ]
  whole = [prompt + answer for prompt, answer in zip(prompts, answers)]
  width = asking.size(max(map(len, whole)))
  tokens, length = asking.padded(whole, how.rows, width)
  start = np.ones(how.rows, np.int32)
  start[: len(prompts)] = [len(prompt) for prompt in prompts]
  return Said(tokens, start, length)


@functools.partial(jax.jit, static_argnums=0)
def features(cfg: ModelConfig, params, tokens_BxL, length_B):
  """Mean of the last block's normed output over each row's tokens, `[B, D]`."""
  model = language_model.LanguageModel(cfg)
  variables = {'params': params}
  x_BxLxD = model.apply(variables, tokens_BxL, method=lambda m, t: m.embed(t))
  _, x_BxLxD, _ = segments.run_blocks(
    cfg, params['blocks'], Segment(0, cfg.N, None), None, x_BxLxD, None
  )
  x_BxLxD = model.apply(variables, x_BxLxD, method=lambda m, x: m.final_norm(x))
  here_BxL = jnp.arange(tokens_BxL.shape[1])[None] < length_B[:, None]
  sum_BxD = jnp.where(here_BxL[..., None], x_BxLxD, 0.0).sum(1)
  return sum_BxD.astype(jnp.float32) / jnp.maximum(length_B, 1)[:, None]


def means(made: trained.Trained, how: How) -> Method:
  """The nearest class mean by cosine, from the middle of all means so far."""

  def of(texts) -> np.ndarray:
    encode, found = made.tokenizer.encode, []
    for at in range(0, len(texts), how.rows):
      part = [
        _first(made) + encode(f'Text: {text}')
        for text in texts[at : at + how.rows]
      ]
      width = asking.size(max(map(len, part)))
      tokens, length = asking.padded(part, how.rows, width)
      rows = features(made.model.cfg, made.params, tokens, length)
      found.append(np.asarray(rows)[: len(part)])
    return np.concatenate(found)

  def learn(memory, stage, rng):
    del rng
    rows = of([example.text for example in stage.train])
    labels = np.array([example.label for example in stage.train])
    return memory | {
      name: rows[labels == name].mean(0) for name in stage.labels
    }

  def choose(memory, names, texts):
    return nearest(memory, names, of(texts))

  return Method(learn, choose, {})


def nearest(means_: dict, names: Sequence[str], rows_NxD) -> list[str]:
  """Names of the nearest means."""
  table = np.stack([means_[name] for name in names])
  middle = table.mean(0)
  table, rows = table - middle, rows_NxD - middle

  def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

  return [names[i] for i in (unit(rows) @ unit(table).T).argmax(1)]
