"""Small language models of every family on the same tokens of your text.

    nestax-evaluate --suite=language --set='language.text=books/*.txt' \\
      --models=hope,transformer,gated_deltanet --seeds=3

All files in a row are the text, but for the last twentieth of each, which is
held out: windows of it are what is tested. A byte costs `bits`, less is better.
Rows are windows of the text, those of one seed the same for all families; every
family has the Transformer's parameters, by the hidden width of its MLPs. Of
several rates the best is picked on windows of the same held-out text. Tokens a
second are of all runs together and with evaluation in it, without compilation:
compare those of one machine with nothing else on it.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import loss
from nestax.launch.data import tokenizers
from nestax.launch.evals import babi, entrants, haystack, suite, trials
from nestax.models import language_model
from nestax.models.config import ModelConfig

HELD_OUT = 20  # the last of so many parts of a file
# As in the configs of that size.
OWN = {
  'titans': {'memory': {'chunk_mem': 16, 'chunk_rest': 16, 'depth_mem': 2}}
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
  )

  def __post_init__(self):
    if self.length < 2:
      raise ValueError(f'length={self.length}: at least 2 tokens')
    if self.train.enough:
      raise ValueError(
        f'train.enough={self.train.enough}: is of scores in %, and bits a '
        'byte are none: leave it at 0'
      )


def read(options: Options) -> tuple[np.ndarray, np.ndarray, str]:
  """The text to train on and that to test on, and a short name of both.

  Returns:
    int32 `[2, tokens]` each: ids, and the bytes they stand for.

  Raises:
    ValueError: for no files, or less text than a row.
  """
  tokenizer = tokenizers.load(options.tokenizer)
  parts, whole = ([], []), []
  for path in babi.find(options.text, 'language.text'):
    try:
      text = pathlib.Path(path).read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'{path}: no UTF-8 text: {error}') from error
    whole.append(text)
    at = len(text) - len(text) // HELD_OUT
    for part, piece in zip(parts, (text[:at], text[at:])):
      part.append(tokenizer.document(piece))
  train, test = (np.concatenate(part, 1) for part in parts)
  if test.shape[1] <= options.length:
    raise ValueError(
      f'--set=language.text={options.text}: {test.shape[1]} tokens are held '
      f'out, one in {HELD_OUT}; a row wants {options.length + 1}'
    )
  return train, test, haystack.digest('\0'.join(whole))


def windows(text: np.ndarray, L: int, starts: np.ndarray) -> trials.Batch:
  """Rows of L tokens, their next ones and the bytes of these."""
  at = starts[:, None] + np.arange(L + 1)[None]
  tokens = text[0][at]
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones(tokens[:, 1:].shape, np.float32),
    'bytes': text[1][at[:, 1:]],
  }


def anywhere(text: np.ndarray, L: int) -> trials.Draw:
  """Windows that begin at any token."""

  def draw(rng: np.random.Generator, rows: int) -> trials.Batch:
    return windows(text, L, rng.integers(0, text.shape[1] - L, rows))

  return draw


def apart(text: np.ndarray, L: int) -> trials.Draw:
  """Windows that share no target, as many as there are at most."""
  starts = np.arange(0, text.shape[1] - L, L)

  def draw(rng: np.random.Generator, rows: int) -> trials.Batch:
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


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """One cell a model."""
  train, test, name = read(options)
  V = -(-tokenizers.load(options.tokenizer).vocab_size // 16) * 16
  training = options.train.asked(asked)
  training = dataclasses.replace(
    training, examples=training.steps * training.batch
  )
  L = options.length
  key = {'text': name, 'tokenizer': options.tokenizer, 'length': L}
  problem = trials.Problem(
    '',
    V,
    anywhere(train, L),
    {'bits a byte': apart(test, L)},
    bits,
    key | {'match': options.match},
    own=own(options, V, asked.models),
    less=True,
  )
  together = asked.seeds * len(training.rates)
  for cell in trials.cells([problem], training, asked):
    run = functools.partial(_timed, cell.run, training.batch * L * together)
    yield cell._replace(run=run)


def _timed(run, tokens: int, say) -> list[dict]:
  """Adds thousands of tokens a second to the scores of every seed."""
  rows = run(say)
  for row in rows:
    speed = tokens / row['step_ms'] if row['step_ms'] else None
    row['scores']['thousand tokens/s'] = speed
  return rows


EVALUATION = suite.Evaluation(
  'language',
  Options(),
  cells,
  'Bits a byte of held-out text, less is better; thousands of tokens a second, '
  'of all seeds side by side.',
  decimals=3,
  mixed=True,
)
