"""Needle in a haystack: small models trained for it, or trained ones asked.

Families are trained on a mix of all kinds of `haystack.KINDS` in rows of up to
`length` tokens (bytes), and tested at each of `lengths`. With `shortest` most
rows hold several shorter questions one after another, from which retrieval is
learned long before it is from long ones alone, and with `early` the first steps
read short rows only. Text that is no answer weighs little (`background`): the
more it weighs, the later a model begins to retrieve. Paths of runs or of
pretrained files are asked as they are, in their own tokens; seeds then draw the
rows. A value counts if all of its tokens are the likeliest ones after what is
right before them, which is what greedy decoding says; of several values asked
for at once each counts for its share. With --set=needle.score=generated trained
models answer freely, and a value counts if it stands in what they say.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import sampling, trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import (
  entrants,
  haystack,
  needle_rows,
  problems,
  suite,
  trials,
)
from nestax.models import model_state
from nestax.models.config import FAMILIES

SCORES = ('forced', 'generated')
PIECE = 512  # tokens that a trained model reads at once
VOCABULARY = 272  # of bytes and their specials, rounded up
# Options that say nothing about the others: of models that are trained here,
# and of trained ones.
TRAINED_ONLY = ('length', 'shortest', 'early', 'share', 'background')
ASKED_ONLY = ('rows', 'score')


@dataclasses.dataclass(frozen=True)
class Options:
  """What is hidden where.

  Attributes:
    length: most tokens of a row to train on.
    lengths: of the rows to test on, commas between.
    shortest: tokens of the shortest questions to train on: a row has as many
      as it holds of `length` tokens, or half, a quarter... down to this, and
      where there is room left, shorter ones. 0: a row is one question.
    early: tokens of the rows that the first steps train on, commas between
      several: as many more rows a step as they are shorter, of the kinds that
      have room in them. '': of `length` from the first step on.
    share: of the steps that are of `early` rows, about as many of each: whole
      stretches between two evaluations.
    haystack: a UTF-8 file; '' for generated sentences.
    prompt: 'ruler', or 'short' for small lengths.
    background: weight in training of tokens that are no answer.
    rows: that a trained model is asked, of every kind and length.
    score: 'forced' or 'generated', of trained models.
    train: how small models are trained.
  """

  length: int = 1024
  lengths: str = '1024,2048,4096'
  shortest: int = 0
  early: str = ''
  share: float = 0.5
  haystack: str = ''
  prompt: str = 'ruler'
  background: float = 0.02
  rows: int = 100
  score: str = 'forced'
  train: trials.Training = trials.Training(
    D=128,
    N=4,
    H=2,
    steps=5000,
    batch=32,
    examples=20_000,
    tests=256,
    rates=(1e-3, 2e-3, 4e-3),
  )

  def __post_init__(self):
    if self.score not in SCORES:
      raise ValueError(f'score={self.score!r}: one of {", ".join(SCORES)}')
    if not 0 <= self.background < float('inf'):
      raise ValueError(f'background={self.background}: 0 or above, and finite')
    if not 0 < self.share < 1:
      raise ValueError(f'share={self.share}: above 0 and below 1')
    if self.rows < 1:
      raise ValueError(f'rows={self.rows}: at least 1')
    _ = self.length_list, self.early_list

  def check_lengths(self):
    """Raises a ValueError for lengths to train on that do not go together.

    Not as options are set, which happens one after another.
    """
    if not 0 <= self.shortest <= self.length:
      raise ValueError(
        f'shortest={self.shortest}: 0 or up to length={self.length}'
      )
    for early in self.early_list:
      if not max(self.shortest, 1) <= early <= self.length:
        raise ValueError(
          f'early={self.early!r}: from shortest={self.shortest} up to '
          f'length={self.length}'
        )

  @property
  def length_list(self) -> list[int]:
    return self._numbers('lengths')

  @property
  def early_list(self) -> list[int]:
    return self._numbers('early') if self.early else []

  def _numbers(self, name: str) -> list[int]:
    words = getattr(self, name)
    try:
      return [int(word) for word in words.split(',')]
    except ValueError:
      raise ValueError(
        f'{name}={words!r}: whole numbers with commas between'
      ) from None


def problem(options: Options) -> problems.Problem:
  """The mix, and every kind at every length, in bytes.

  Raises:
    ValueError: for lengths that do not go together or have no room.
  """
  options.check_lengths()
  text = _text(options)
  hay = haystack.make(tokenizers.load('bytes'), text, options.prompt)

  def test(kind, L):
    return lambda rng, many: needle_rows.batch_of(
      [[haystack.row(hay, kind, L, rng)] for _ in range(many)], L, 0.0
    )

  def mixed(L, every):
    return needle_rows.mixture(
      hay, L, options.background, options.shortest, every
    )

  return problems.Problem(
    '',
    VOCABULARY,
    mixed(options.length, True),
    {
      f'{name} {L}': test(kind, L)
      for name, kind in haystack.KINDS.items()
      for L in options.length_list
    },
    needle_rows.values_said,
    _key(options, text, but=ASKED_ONLY),
    early=[mixed(L, False) for L in options.early_list],
    share=options.share,
  )


def _text(options: Options) -> str:
  if not options.haystack:
    return ''
  text = sampling.read_prompt('', options.haystack, '--set=needle.haystack')
  if not text.strip():
    raise ValueError(f'haystack={options.haystack}: the file holds no text')
  return text


def _key(options: Options, text: str, but: Sequence[str]) -> dict:
  """What results depend on: all options but the training's, and some."""
  key = dataclasses.asdict(options) | {'haystack': haystack.digest(text)}
  return {name: x for name, x in key.items() if name not in ('train', *but)}


def ask(
  made: trained.Trained, options: Options, seed: int, say: suite.Say
) -> dict[str, float]:
  """Asks a trained model; gives the share of values said, %, by kind and L."""
  hay = haystack.make(made.tokenizer, _text(options), options.prompt)
  score = _forced if options.score == 'forced' else _generated
  todo = [(n, L) for n in haystack.KINDS for L in options.length_list]
  scores = {}
  for done, (name, L) in enumerate(todo):
    say(done, len(todo))
    rng = np.random.default_rng([seed, L, *name.encode()])
    rows = [
      haystack.row(hay, haystack.KINDS[name], L, rng)
      for _ in range(options.rows)
    ]
    scores[f'{name} {L}'] = 100 * float(
      np.mean([score(made, row, L) for row in rows])
    )
  return scores


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _likeliest(model, params, state, tokens_1xL):
  state, logits_1xLxV = model.apply({'params': params}, state, tokens_1xL)
  return state, logits_1xLxV.argmax(-1)


def _forced(made: trained.Trained, row: haystack.Row, L: int) -> float:
  """Reads the row in pieces, in constant memory but for attention's caches."""
  length = -(-L // PIECE) * PIECE  # one shape for all rows
  tokens = np.zeros(length, np.int32)
  tokens[: len(row.tokens)] = row.tokens
  state = model_state.init_state(made.model.cfg, 1, length)
  said = []
  for start in range(0, length, PIECE):
    piece = jnp.asarray(tokens[None, start : start + PIECE])
    state, likeliest_1xL = _likeliest(made.model, made.params, state, piece)
    said.append(np.asarray(likeliest_1xL[0]))
  right = np.concatenate(said)[: len(row.tokens) - 1] == row.tokens[1:]
  points, _ = needle_rows.shares(right[None], row.span[None, 1:])
  return float(points)


def _generated(made: trained.Trained, row: haystack.Row, L: int) -> float:
  """Lets the model answer, half as long again as the answer is."""
  del L
  many = (len(row.tokens) - row.answer) * 3 // 2 + 8
  allowed = np.zeros(made.model.cfg.V, bool)
  allowed[: made.tokenizer.vocab_size] = made.tokenizer.byte_lengths > 0
  greedy = sampling.Sampling(temperature=0.0)
  prefix = row.tokens[: row.answer]
  ids = sampling.stream(made.model, made.params, prefix, many, greedy, allowed)
  text = made.tokenizer.decode(list(ids))
  return sum(value in text for value in row.values) / len(row.values)


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """Families are trained, the models of paths asked."""
  paths = [word for word in asked.models if entrants.is_trained(word)]
  families = tuple(word for word in asked.models if word not in paths)
  for word in families:
    _check_family(word)
  if families:
    named = dataclasses.replace(asked, models=families)
    for cell in trials.cells([problem(options)], options.train, named):
      yield cell._replace(check=lambda: _check_room(options))
  for path in paths:

    def run(say, path=path):
      made = entrants.load(path)
      return [
        {'seed': seed, 'scores': ask(made, options, seed, say)}
        for seed in range(asked.seeds)
      ]

    key = _key(options, _text(options), but=TRAINED_ONLY)
    key |= {'seeds': asked.seeds}

    def check(path=path):
      _check_room(options, entrants.tokenizer(path))

    yield suite.Cell('', path, key, run, check)


def _check_room(options: Options, tokenizer=None) -> None:
  """Refuses rows too short for a trained model's tokens, or for small ones."""
  lengths = {'lengths': options.length_list}
  if tokenizer is None:
    tokenizer = tokenizers.load('bytes')
    lengths = {'length': [options.length], **lengths}
  hay = haystack.make(tokenizer, '.', options.prompt)
  needle_rows.check_room(hay, lengths)


def _check_family(word: str) -> None:
  name, _, changes = word.partition(':')
  if name in FAMILIES:
    return
  if entrants.is_trained(name):
    raise ValueError(
      f'--models={word}: needle asks a trained model as it is: leave out '
      f':{changes}'
    )
  raise ValueError(
    f'--models={word}: no such run or file; or give a family, of '
    f'{", ".join(FAMILIES)}'
  )


def _paper(rows: str) -> dict[str, float]:
  """Scores of the six kinds in order, each at 4K, 8K and 16K."""
  columns = [
    f'{name} {L}' for name in haystack.KINDS for L in (4096, 8192, 16384)
  ]
  return dict(zip(columns, map(float, rows.replace('/', ' ').split())))


EVALUATION = suite.Evaluation(
  'needle',
  Options(),
  cells,
  'Values said, %, by kind and tokens of the row.',
  {
    'Transformer': _paper(
      '88.6/76.4/79.8 100/98.8/94.2 78.0/69.2/40.8 79.4/83.0/61.4 '
      '58.9/48.0/29.8 37.5/34.1/21.5'
    ),
    'Hope-Attention': _paper(
      '100/100/100 100/98.4/94.4 76.8/68.8/42.4 80.2/84.8/60.8 '
      '60.4/47.8/30.6 35.2/34.4/24.8'
    ),
    'RWKV-7': _paper(
      '100/100/99.6 93.8/44.8/12.6 63.8/13.2/5.8 21.4/18.8/9.6 '
      '20.4/14.8/8.6 16.2/13.4/6.8'
    ),
    'Comba': _paper(
      '100/100/99.4 92.6/47.2/13.4 62.4/13.8/7.4 21.4/19.4/8.2 '
      '21.8/15.2/6.4 16.5/13.5/7.2'
    ),
    'DLA': _paper(
      '96.4/71.2/44.0 79.6/42.6/28.2 18.2/8.8/4.0 27.4/20.0/11.8 '
      '26.4/22.0/6.4 25.6/12.8/9.6'
    ),
    'Titans': _paper(
      '100/100/100 99.6/84.6/75.4 74.2/42.8/21.2 26.4/23.6/8.2 '
      '22.8/19.8/9.4 24.6/15.1/8.2'
    ),
    'Hope': _paper(
      '100/100/100 99.2/88.4/78.2 73.2/46.2/24.8 29.4/24.8/14.8 '
      '31.7/24.8/14.2 31.4/17.2/11.4'
    ),
  },
  'NL, Table 1',
  'tokens',
)
