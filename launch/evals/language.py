"""Small language models of every family on the same tokens of your text.

    nestax-evaluate --suite=language --set='language.text=books/*.txt' \\
      --models=hope,transformer,gated_deltanet --seeds=3

All files in a row are the text, but for the last twentieth of each, which is
held out: windows of its first half are for validation, and of several rates the
best there is picked; windows of its second half are what is tested. A byte
costs `bits`, less is better. Rows are windows of the text, those of one seed
the same for all families; every family has the Transformer's parameters, by the
hidden width of its MLPs.

Runs go one after another (`--set=language.train.apart=false`: side by side),
are kept in the workdir as they end, and the same command goes on there. With
--set=language.train.trial=200 the --rates are compared by trainings of 200
steps of one seed. Tokens a second are of training alone; compare those of one
machine with nothing else on it. (Side by side they are of all runs together,
and with evaluation in it.)
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import loss
from nestax.launch.data import tokenizers
from nestax.launch.evals import (
  babi,
  entrants,
  haystack,
  problems,
  suite,
  trials,
)
from nestax.models import language_model
from nestax.models.config import ModelConfig

HELD_OUT = 20  # the last of so many parts of a file, half of it to validate
# As in the configs of that size, but for `remat`: the states that the backward
# pass wants of all blocks' two-layer memories at once are more than a GPU has.
OWN = {
  'titans': {
    'memory': {'chunk_mem': 16, 'chunk_rest': 16, 'depth_mem': 2},
    'remat': 'full',
  }
}


@dataclasses.dataclass(frozen=True)
class Options:
  """What is read, and how models are trained on it.

  Attributes:
    text: files of UTF-8 text, a glob.
    tokenizer: 'bytes', or a file, see `tokenizers.load`.
    length: tokens of a row.
    match: whether all families get the Transformer's parameters.
    train: how models are trained; `examples` follows from the rest.
  """

  text: str = ''
  tokenizer: str = 'bytes'
  length: int = 2048
  match: bool = True
  train: trials.Training = trials.Training(
    D=384,
    N=14,
    H=6,
    dtype='bfloat16',
    steps=1000,
    batch=16,
    tests=128,
    rates=(2e-3,),
    evaluations=5,
    apart=True,
  )

  def __post_init__(self):
    if self.length < 2:
      raise ValueError(f'length={self.length}: at least 2 tokens')
    if self.train.enough:
      raise ValueError(
        f'train.enough={self.train.enough}: is of scores in %, and bits a '
        'byte are none: leave it at 0'
      )


class Text(NamedTuple):
  """int32 `[2, tokens]` each: ids, and the bytes they stand for."""

  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray


def read(options: Options) -> tuple[Text, str]:
  """The text in its three parts, and a short name of the whole.

  Raises:
    ValueError: for no files, or less text than a row.
  """
  tokenizer = tokenizers.load(options.tokenizer)
  parts, whole = Text([], [], []), []
  for path in babi.find(options.text, 'language.text'):
    try:
      text = pathlib.Path(path).read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'{path}: no UTF-8 text: {error}') from error
    whole.append(text)
    held_out = len(text) // HELD_OUT
    ends = len(text) - held_out, len(text) - held_out + held_out // 2
    pieces = text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]
    for part, piece in zip(parts, pieces):
      part.append(tokenizer.document(piece))
  made = Text(*(np.concatenate(part, 1) for part in parts))
  least = min(part.shape[1] for part in made)
  if least <= options.length:
    raise ValueError(
      f'--set=language.text={options.text}: {least} tokens to validate or test '
      f'on, one in {2 * HELD_OUT}; a row wants {options.length + 1}'
    )
  return made, haystack.digest('\0'.join(whole))


def windows(text: np.ndarray, L: int, starts: np.ndarray) -> problems.Batch:
  """Rows of L tokens, their next ones and the bytes of these."""
  at = starts[:, None] + np.arange(L + 1)[None]
  tokens = text[0][at]
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones(tokens[:, 1:].shape, np.float32),
    'bytes': text[1][at[:, 1:]],
  }


def anywhere(text: np.ndarray, L: int) -> problems.Draw:
  """Windows that begin at any token."""

  def draw(rng: np.random.Generator, rows: int) -> problems.Batch:
    return windows(text, L, rng.integers(0, text.shape[1] - L, rows))

  return draw


def apart(text: np.ndarray, L: int) -> problems.Draw:
  """Windows that share no target, as many as there are at most."""
  starts = np.arange(0, text.shape[1] - L, L)

  def draw(rng: np.random.Generator, rows: int) -> problems.Batch:
    return windows(text, L, rng.permutation(starts)[:rows])

  return draw


def bits(logits_BxLxV, batch):
  """Bits that the rows cost, and the bytes they stand for."""
  total = loss.sums(logits_BxLxV, batch)
  return total.nats / math.log(2), total.bytes


@functools.cache
def parameters(cfg: ModelConfig) -> int:
  """How many parameters one block has, with embedding and final norm."""
  cms = dataclasses.replace(cfg.cms, blocks='none')
  model = language_model.LanguageModel(dataclasses.replace(cfg, N=1, cms=cms))
  tokens = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), None, tokens))
  return sum(x.size for x in jax.tree.leaves(shapes))


def matched(cfg: ModelConfig, like: ModelConfig) -> int:
  """The hidden width that gives `cfg` the parameters of `like`.

  Raises:
    ValueError: if a mixer alone has more.
  """
  multiple = max(32, cfg.cms.multiple)
  wide = dataclasses.replace(cfg, F=cfg.F + multiple)
  a_step = parameters(wide) - parameters(cfg)
  missing = parameters(like) - parameters(cfg)
  F = cfg.F + multiple * round(missing / a_step)
  if F < multiple:
    raise ValueError(
      f'{cfg.family}: its mixers have more parameters than a block of the '
      'Transformer; give --set=language.match=false'
    )
  return F // multiple * multiple


def own(options: Options, V: int, words) -> dict:
  """The keys of each family alone."""
  found = {}
  base = options.train.base(V)
  like = entrants.config('transformer', base)
  for family in dict.fromkeys(word.partition(':')[0] for word in words):
    found[family] = dict(OWN.get(family, {}))
    if options.match:
      cfg = entrants.config(family, base, OWN)
      found[family]['F'] = matched(cfg, like)
  return found


def problem(options: Options, models) -> problems.Problem:
  """What is learned from which part of the text."""
  text, name = read(options)
  L = options.length
  V = -(-tokenizers.load(options.tokenizer).vocab_size // 16) * 16
  key = {'text': name, 'tokenizer': options.tokenizer, 'length': L}
  return problems.Problem(
    '',
    V,
    anywhere(text.train, L),
    {'bits a byte': apart(text.test, L)},
    bits,
    key | {'match': options.match},
    own=own(options, V, models),
    less=True,
    valid={'bits a byte': apart(text.valid, L)},
  )


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """One cell a model."""
  training = options.train.asked(asked)
  training = dataclasses.replace(
    training, examples=training.steps * training.batch
  )
  runs = 1 if training.apart else asked.seeds * len(training.rates)
  tokens = training.batch * options.length * runs
  made = problem(options, asked.models)
  for cell in trials.cells([made], training, asked, timed=True):
    run = functools.partial(_timed, cell.run, tokens)
    # side by side with fewer a step takes another time
    more = functools.partial(_timed, cell.more, tokens)
    yield cell._replace(run=run, more=more if training.apart else None)


def _timed(run, tokens: int, *given) -> list[dict]:
  """Adds thousands of tokens a second to the scores of every timed seed."""
  rows = run(*given)
  for row in rows:
    if row['step_ms']:  # not of a run of a single evaluation
      row['scores']['thousand tokens/s'] = tokens / row['step_ms']
  return rows


EVALUATION = suite.Evaluation(
  'language',
  Options(),
  cells,
  'Bits a byte of held-out text, less is better; thousands of tokens a second '
  'in training.',
  decimals=3,
  mixed=True,
)
