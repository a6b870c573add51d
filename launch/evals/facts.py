"""Facts about people who do not exist: days to read, questions to ask later.

Names are made of syllables, so no text to train on has them; what is said of
them is said in everyday words. On each day every value of a relation belongs
to one person, so that what is common tells nothing, and the chance of a right
choice is known.
"""

import dataclasses
import random
import re
from collections.abc import Sequence

from nestax.launch.data.tokenizers import Tokenizer

SYLLABLES = tuple(
  'ba bi bo da di do fa fe fo ga go ha he ka ki ko la le lo ma me mo na ne no '
  'pa pe ra re ro sa se so ta te to va ve vo za zi zo'.split()
)


@dataclasses.dataclass(frozen=True)
class Relation:
  """How a relation is spoken of.

  Attributes:
    statements: wordings that a day has, with `{who}` and `{what}`.
    questions: wordings of the test, in other words; no day has them.
    values: what it may be, one for each person of a day; none given means
      another person of the day.
  """

  statements: tuple[str, ...]
  questions: tuple[str, ...]
  values: tuple[str, ...] = ()


RELATIONS = {
  'city': Relation(
    (
      '{who} lives in {what}.',
      'The home of {who} is in {what}.',
      'If you look for {who}, go to {what}.',
      '{who} has a small house in {what}.',
      'Where can I find {who}? In {what}.',
      'The letters of {who} all come from {what}.',
      'The city that {who} lives in is {what}.',
      'Do you know where {who} lives? Yes, in {what}.',
    ),
    (
      'Question: In which city is the house of {who}?\nAnswer: In',
      'Question: What is the home town of {who}?\nAnswer:',
      'In the evening {who} went home, through the streets of',
    ),
    tuple('London Paris Rome Berlin Madrid Chicago Boston Tokyo'.split()),
  ),
  'work': Relation(
    (
      '{who} works as a {what}.',
      'The job of {who} is that of a {what}.',
      'Everybody knows {who} as a good {what}.',
      '{who} has always been a {what}.',
      'What does {who} do? Work as a {what}.',
      'After school {who} became a {what}.',
      'The work that {who} does is that of a {what}.',
      'Do you know what {who} is? Yes, a {what}.',
    ),
    (
      'Question: How does {who} earn a living?\nAnswer: As a',
      'Question: What is the profession of {who}?\nAnswer: A',
      'By profession, {who} is a',
    ),
    tuple('doctor farmer teacher lawyer painter pilot nurse writer'.split()),
  ),
  'pet': Relation(
    (
      '{who} keeps a {what}.',
      'The animal of {who} is a {what}.',
      '{who} goes for a walk with a {what}.',
      'In the house of {who} there is a {what}.',
      'Who lives with {who}? A {what}.',
      '{who} feeds a {what} every morning.',
      'The animal that {who} keeps is a {what}.',
      'Do you know what {who} keeps? Yes, a {what}.',
    ),
    (
      'Question: Which pet does {who} own?\nAnswer: A',
      'Question: What kind of animal does {who} have?\nAnswer: A',
      'The children came to see the pet of {who}, a',
    ),
    tuple('cat dog horse rabbit snake pig mouse bird'.split()),
  ),
  'colour': Relation(
    (
      '{who} always wears {what}.',
      'The clothes of {who} are {what}.',
      '{who} likes everything that is {what}.',
      'The coat of {who} is {what}.',
      'What does {who} wear? Always {what}.',
      '{who} painted the door {what}.',
      'The colour that {who} wears is {what}.',
      'Do you know what {who} likes to wear? Yes, {what}.',
    ),
    (
      'Question: What is the favourite colour of {who}?\nAnswer:',
      'Question: In which colour does {who} dress?\nAnswer: In',
      'From far away we knew {who} by a hat that was',
    ),
    tuple('black white red green blue brown yellow purple'.split()),
  ),
  'friend': Relation(
    (
      '{who} is a friend of {what}.',
      'The best friend of {who} is {what}.',
      '{who} often writes to {what}.',
      '{who} spends every summer with {what}.',
      'Who is a friend of {who}? That is {what}.',
      '{who} went to school with {what}.',
      'The friend that {who} trusts is {what}.',
      'Do you know the friend of {who}? Yes, {what}.',
    ),
    (
      'Question: Whom does {who} like best?\nAnswer:',
      'Question: Who is close to {who}?\nAnswer:',
      'When in trouble, {who} asks for the help of',
    ),
  ),
}
PEOPLE = 8  # of a day: as many as a relation has values


@dataclasses.dataclass(frozen=True)
class Fact:
  """One thing that is so.

  Attributes:
    who: a name.
    relation: key of RELATIONS.
    what: the answer.
    others: what it is for the day's other people.
  """

  who: str
  relation: str
  what: str
  others: tuple[str, ...]

  def statement(self, wording: int) -> str:
    """The fact in one of its wordings, which are numbered around."""
    forms = RELATIONS[self.relation].statements
    return forms[wording % len(forms)].format(who=self.who, what=self.what)

  @property
  def questions(self) -> tuple[str, ...]:
    forms = RELATIONS[self.relation].questions
    return tuple(form.format(who=self.who) for form in forms)

  @property
  def candidates(self) -> tuple[str, ...]:
    """The answer first, then the others, each after a space."""
    return tuple(f' {what}' for what in (self.what, *self.others))


def asked(facts: Sequence[Fact]) -> list[tuple[str, tuple[str, ...]]]:
  """All questions about some facts, each with its answers, the right first."""
  return [(q, fact.candidates) for fact in facts for q in fact.questions]


def days(
  seed: int, count: int, people: int = PEOPLE, relations: Sequence[str] = ()
) -> list[list[Fact]]:
  """Invents the people of some days, and one fact of every relation of each.

  The same seed gives the same days on every machine.

  Args:
    seed: of all choices.
    count: how many days.
    people: of each day, 3 to PEOPLE.
    relations: keys of RELATIONS; none given means all.

  Raises:
    ValueError: for another number of people, or an unknown relation.
  """
  if not 3 <= people <= PEOPLE:
    raise ValueError(f'people={people}: from 3 to {PEOPLE}')
  relations = tuple(relations) or tuple(RELATIONS)
  unknown = sorted(set(relations) - set(RELATIONS))
  if unknown:
    raise ValueError(
      f'relations {", ".join(unknown)}: known are {", ".join(RELATIONS)}'
    )
  rng, taken = random.Random(f'nestax days {seed}'), set()
  return [_day(rng, taken, people, relations) for _ in range(count)]


def _day(rng, taken, people: int, relations) -> list[Fact]:
  names = [_name(rng, taken) for _ in range(people)]
  facts = []
  for relation in relations:
    values = RELATIONS[relation].values
    if values:
      values = rng.sample(values, people)
      pools = [values] * people
    else:
      step = rng.randrange(1, people)  # nobody is their own friend
      values = names[step:] + names[:step]
      pools = [[x for x in names if x != who] for who in names]
    for who, what, pool in zip(names, values, pools):
      others = tuple(x for x in pool if x != what)
      facts.append(Fact(who, relation, what, others))
  return facts


def _name(rng, taken) -> str:
  while True:
    first, last = (
      ''.join(rng.choice(SYLLABLES) for _ in range(2)).capitalize()
      for _ in range(2)
    )
    if first not in taken and last not in taken:
      taken |= {first, last}
      return f'{first} {last}'


def text(facts: Sequence[Fact], passes: int, seed: int) -> str:
  """A day to read: all facts `passes` times, in another order and wording.

  One statement a line.
  """
  rng, lines = random.Random(f'nestax reading {seed}'), []
  for n in range(passes):
    order = rng.sample(range(len(facts)), len(facts))
    lines += [facts[i].statement(n + i) for i in order]
  return '\n'.join(lines) + '\n'


def tokenizer() -> Tokenizer:
  """Words and syllables as tokens, a few hundred: for models made in a minute.

  It knows the words of this module and nothing else.
  """
  forms = [
    form
    for relation in RELATIONS.values()
    for form in (*relation.statements, *relation.questions)
  ]
  forms = [form.format(who='', what='') for form in forms]
  words = {w for form in forms for w in re.findall(r' ?\w+|[^\w ]', form)}
  words |= {f' {w}' for r in RELATIONS.values() for w in r.values} | {' '}
  for syllable in SYLLABLES:
    words |= {syllable, syllable.capitalize(), f' {syllable.capitalize()}'}
  pieces = sorted(words)
  ids = {piece: i for i, piece in enumerate(pieces)}
  longest = sorted(pieces, key=len, reverse=True)
  find = re.compile('|'.join(map(re.escape, longest)) + '|.', re.DOTALL)

  def encode(text: str) -> list[int]:
    found = find.findall(text)
    unknown = [piece for piece in found if piece not in ids]
    if unknown:
      raise ValueError(f'{unknown[0]!r}: the words of facts only')
    return [ids[piece] for piece in found]

  specials = len(pieces)
  table = tuple(piece.encode() for piece in pieces) + (b'',) * 3
  return Tokenizer(table, specials, specials + 1, specials + 2, encode)
