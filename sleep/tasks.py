"""Two tasks to dream about: facts with questions, and ARC-type grids."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Sequence

from nestax.sleep.task import TaskError, Tokens

Encode = Callable[[str], list[int]]

_ONSETS = 'b br d dr f g gr h j k kl l m n p pr r s sk t tr v z'.split()
_VOWELS = 'a e i o u ai or en'.split()
# relation -> (as a statement, other statements, questions, values or kind)
_RELATIONS = {
  'city': (
    ('{who} lives in {what}.', 'The home of {who} is the town of {what}.'),
    ('Where does {who} live?', 'In which town is the home of {who}?'),
    'place',
  ),
  'work': (
    ('{who} works as a {what}.', 'By trade, {who} is a {what}.'),
    ('What is the job of {who}?', 'How does {who} earn a living?'),
    tuple('baker carpenter doctor farmer judge painter pilot sailor'.split()),
  ),
  'pet': (
    ('{who} keeps a {what}.', 'The animal in the house of {who} is a {what}.'),
    ('Which animal does {who} have?', 'What pet does {who} own?'),
    tuple('cat dog goat horse parrot rabbit snake turtle'.split()),
  ),
  'colour': (
    ('{who} always wears {what}.', 'All clothes of {who} are {what}.'),
    ('What colour does {who} wear?', 'Which colour are the clothes of {who}?'),
    tuple('black blue brown green orange purple red white'.split()),
  ),
  'friend': (
    ('{who} is a friend of {what}.', 'The best friend of {who} is {what}.'),
    ('Who is the friend of {who}?', 'Whom does {who} like best?'),
    'person',
  ),
}


@dataclasses.dataclass(frozen=True)
class Fact:
  """One thing that is so about somebody who does not exist.

  Attributes:
    who: an invented name.
    relation: a key of the table of relations.
    what: the answer.
    others: answers of the same kind that are wrong here.
  """

  who: str
  relation: str
  what: str
  others: tuple[str, ...]

  @property
  def statements(self) -> tuple[str, ...]:
    """The fact in words, in more than one way."""
    return self._fill(_RELATIONS[self.relation][0])

  @property
  def questions(self) -> tuple[str, ...]:
    """Questions for it, in words that the statements do not use."""
    return self._fill(_RELATIONS[self.relation][1])

  def _fill(self, templates) -> tuple[str, ...]:
    return tuple(t.format(who=self.who, what=self.what) for t in templates)


def _invent(rng: random.Random, taken: set[str], syllables: int) -> str:
  while True:
    parts = [
      rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)
    ]
    word = ''.join(parts).capitalize()
    if word not in taken:
      taken.add(word)
      return word


def facts(seed: int, people: int, relations: Sequence[str] = ()) -> list[Fact]:
  """Invents people and one fact of every relation about each.

  Names of two words of three syllables are not in any text to train on, other
  than by chance. The same seed gives the same facts on every machine.

  Args:
    seed: of all choices.
    people: how many.
    relations: keys of the table of relations; none given means all.

  Raises:
    TaskError: for fewer than two people, or a relation that is not known.
  """
  relations = tuple(relations) or tuple(_RELATIONS)
  unknown = sorted(set(relations) - set(_RELATIONS))
  if unknown:
    raise TaskError(
      f'unknown relation {", ".join(unknown)}: there are '
      f'{", ".join(_RELATIONS)}'
    )
  if people < 2:
    raise TaskError(f'{people} people: at least 2, to have friends')
  rng, taken = random.Random(f'nestax facts {seed}'), set()
  names = [
    f'{_invent(rng, taken, 3)} {_invent(rng, taken, 3)}' for _ in range(people)
  ]
  places = [_invent(rng, taken, 2) for _ in range(max(4, people))]
  found = []
  for who in names:
    for relation in relations:
      kind = _RELATIONS[relation][2]
      pool = {'place': places, 'person': names}.get(kind, kind)
      pool = [x for x in pool if x != who]
      what = rng.choice(pool)
      others = tuple(x for x in pool if x != what)
      found.append(Fact(who, relation, what, others))
  return found


def recall_prompt(question: str) -> str:
  """How a question is put to a model that only goes on writing."""
  return f'Question: {question}\nAnswer:'


@dataclasses.dataclass(frozen=True)
class FactsTask:
  """Facts to be read, and questions about them in other words.

  Attributes:
    facts: what to know.
    encode: text to tokens, without specials.
    bos: id that every text begins with.
  """

  facts: tuple[Fact, ...]
  encode: Encode
  bos: int
  name: str = 'facts'

  def text(self) -> str:
    """What is read: the first statement of every fact."""
    return ' '.join(fact.statements[0] for fact in self.facts)

  def context(self) -> Tokens:
    return [self.bos, *self.encode(f'{self.text()}\nIn other words:')]

  def questions(self) -> list[tuple[Tokens, Tokens]]:
    return [
      ([self.bos, *self.encode(recall_prompt(q))], self.encode(f' {fact.what}'))
      for fact in self.facts
      for q in fact.questions
    ]


Grid = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class ArcTask:
  """Grids that follow one rule: pairs to learn it from, pairs to apply it to.

  Attributes:
    name: of the task.
    train: pairs of grids, colours 0 to 9.
    test: the same, asked.
    encode: text to tokens, without specials.
    bos: id that every text begins with.
  """

  name: str
  train: tuple[tuple[Grid, Grid], ...]
  test: tuple[tuple[Grid, Grid], ...]
  encode: Encode
  bos: int

  def context(self) -> Tokens:
    text = ''.join(
      f'{_asked(given)}{_drawn(made)}\n' for given, made in self.train
    )
    return [self.bos, *self.encode(text)]

  def questions(self) -> list[tuple[Tokens, Tokens]]:
    return [
      ([self.bos, *self.encode(_asked(given))], self.encode(_drawn(made)))
      for given, made in self.test
    ]


def _drawn(grid: Grid) -> str:
  return '\n'.join(''.join(map(str, row)) for row in grid) + '\n'


def _asked(grid: Grid) -> str:
  return f'input:\n{_drawn(grid)}output:\n'


def _grid(value, where: str) -> Grid:
  try:
    grid = tuple(tuple(int(x) for x in row) for row in value)
  except (TypeError, ValueError):
    raise TaskError(f'{where}: not a list of rows of colours') from None
  widths = {len(row) for row in grid}
  if len(widths) != 1 or not 1 <= len(grid) <= 30 or not 1 <= max(widths) <= 30:
    raise TaskError(
      f'{where}: {len(grid)} rows of {sorted(widths)} cells; a grid has equal '
      'rows, at least 1 by 1 and at most 30 by 30'
    )
  wrong = sorted({x for row in grid for x in row} - set(range(10)))
  if wrong:
    raise TaskError(f'{where}: colour {wrong[0]}; colours are 0 to 9')
  return grid


def arc(path, encode: Encode, bos: int) -> ArcTask:
  """Reads one task of an ARC JSON file, `{"train": [...], "test": [...]}`.

  Raises:
    FileNotFoundError: if there is no such file.
    TaskError: saying what in it is no ARC task.
  """
  path = pathlib.Path(path)
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    halves = {
      half: tuple(
        tuple(
          _grid(pair[side], f'{path}, {half} {i}, {side}')
          for side in ('input', 'output')
        )
        for i, pair in enumerate(found[half])
      )
      for half in ('train', 'test')
    }
  except json.JSONDecodeError as error:
    raise TaskError(f'{path}: not JSON ({error})') from error
  except (KeyError, TypeError) as error:
    raise TaskError(
      f'{path}: not an ARC task, which has "train" and "test" lists of pairs '
      f'of "input" and "output" ({error})'
    ) from error
  if not halves['train'] or not halves['test']:
    raise TaskError(f'{path}: no pairs to learn from, or none to ask')
  return ArcTask(path.stem, halves['train'], halves['test'], encode, bos)
