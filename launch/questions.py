"""A file of questions about what is read, a JSON object a line.

    {"question": "Where does Ann live?", "answer": "Paris",
     "choices": ["Rome", "Oslo"], "day": "monday", "owner": "ann"}

`choices` are answers that are wrong: the model is to prefer the right one.
Without them it has to say the right one by itself. `day` is the file, folder or
number of the day that says it; without one the question is of no day, such as
about what is to stay known. `owner` is whose levels are asked, and may be left
out where only one reads. A question that ends in a question mark is put as
`Question: ...` and `Answer:`; what else there is is gone on from as it is.
"""

import dataclasses
import json
from collections.abc import Sequence

from nestax.launch import days as days_
from nestax.launch import sampling
from nestax.sleep.tasks import recall_prompt


@dataclasses.dataclass(frozen=True)
class Question:
  """One question.

  Attributes:
    question: what is asked, or the beginning of a sentence.
    answer: the right one.
    choices: wrong ones; none if the model has to say the right one itself.
    day: name of the day that it is of; '' for none.
    owner: whose levels are asked.
  """

  question: str
  answer: str
  choices: tuple[str, ...] = ()
  day: str = ''
  owner: str = ''

  @property
  def prompt(self) -> str:
    """What the answer comes after."""
    text = self.question
    return recall_prompt(text) if text.endswith('?') else text

  @property
  def answers(self) -> tuple[str, ...]:
    """All answers, the right one first, each with the space before it."""
    space = '' if self.prompt[-1].isspace() else ' '
    return tuple(
      text if text[0].isspace() else space + text
      for text in (self.answer, *self.choices)
    )


KEYS = tuple(field.name for field in dataclasses.fields(Question))


def load(
  path: str, days: Sequence[days_.Day], flag: str = '--questions'
) -> tuple[Question, ...]:
  """Reads the questions of a file; empty lines are left out.

  Args:
    path: of the file.
    days: that are read; questions are about them and put to their readers.
    flag: that names the file, for messages.

  Raises:
    OSError: if it cannot be read.
    ValueError: naming the file, the line, what is wrong and what would be
      right.
  """
  found, text = [], sampling.read_prompt('', path, flag)
  lines = text.split('\n')  # splitlines would cut a text at its U+2028
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      found.append(_question(line, days))
    except ValueError as error:
      raise ValueError(f'{flag}={path}, line {number}: {error}') from None
  if not found:
    raise ValueError(
      f'{flag}={path}: no question in it; give lines such as '
      '{"question": "Where does Ann live?", "answer": "Paris", "choices": '
      '["Rome", "Oslo"], "day": "monday"}'
    )
  return tuple(found)


def _question(line: str, days: Sequence[days_.Day]) -> Question:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'not JSON ({error}): a question is one line, {{"question": ..., '
      '"answer": ...}'
    ) from None
  if not isinstance(row, dict):
    raise ValueError(
      f'{line.strip()[:40]} is no object: {{"question": ..., "answer": ...}}'
    )
  for key in row:
    if key not in KEYS:
      raise ValueError(f'no key {key!r}; there are {", ".join(KEYS)}')
  for key in ('question', 'answer'):
    if key not in row:
      raise ValueError(f'no {key!r}: every line has a question and an answer')
  choices = row.get('choices', [])
  if not isinstance(choices, list):
    raise ValueError(f'choices={choices!r}: a list of wrong answers')
  words = {key: row[key] for key in KEYS if key in row and key != 'choices'}
  for key, value in [*words.items(), *[('choices', x) for x in choices]]:
    if not isinstance(value, str) or not value.strip():
      raise ValueError(f'{key}: {value!r} is no text in quotation marks')
  asked = Question(**words | {'choices': tuple(choices)})
  for i, text in enumerate(asked.answers):
    if text in asked.answers[:i]:
      raise ValueError(
        f'{text.strip()!r} is among the answers twice; choices are wrong '
        'answers only, each of them once'
      )
  return dataclasses.replace(asked, owner=_owner(asked, days))


def _owner(asked: Question, days: Sequence[days_.Day]) -> str:
  """Whose levels are asked, of those who read the day."""
  names = [day.name for day in days]
  if asked.day and asked.day not in names:
    raise ValueError(
      f'no day {asked.day!r} is read; there are {", ".join(names)}'
    )
  about = [day for day in days if asked.day in ('', day.name)]
  readers = days_.owners(about)
  if asked.owner and asked.owner not in readers:
    raise ValueError(
      f'no owner {asked.owner!r} reads'
      + (f' on day {asked.day}' if asked.day else '')
      + f'; there are {", ".join(readers)}'
    )
  if not asked.owner and len(readers) > 1:
    raise ValueError(
      f'whose levels are asked? Give "owner": one of {", ".join(readers)}'
    )
  return asked.owner or readers[0]
