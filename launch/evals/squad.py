"""Passages with questions, and how SQuAD scores answers.

Files are SQuAD's own (version 1.1 or 2.0: `data`, `paragraphs`, `qas`; what has
no answer is left out), or SEAL's, a list of objects of `context` and
`questions`, each with a `question` and an `answer`.

Scores: an answer and those that are right are put into lower case, without
punctuation, the articles a, an, the, and spaces beyond one; then they are the
same (exact match), or F1 is taken of their words as bags. Of several right
answers the best counts (Rajpurkar et al. 2016, arXiv 1606.05250).
"""

import collections
import json
import pathlib
import re
import string
from collections.abc import Sequence
from typing import NamedTuple


class Question(NamedTuple):
  """One question, and all that is right."""

  text: str
  answers: tuple[str, ...]


class Passage(NamedTuple):
  """A text to read, and what is asked of it."""

  title: str
  text: str
  questions: tuple[Question, ...]


def read(path) -> list[Passage]:
  """Reads the passages of a file that have questions with answers.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the passage, from 1, that is none of these formats.
  """
  text = pathlib.Path(path).expanduser().read_text(encoding='utf-8')
  try:
    rows = _rows(json.loads(text))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}: not JSON ({error})') from None
  except (KeyError, TypeError, AttributeError):
    rows = None
  if rows is None:
    raise ValueError(
      f'{path}: neither SQuAD (an object with `data`) nor a list of passages'
    )
  passages = []
  for number, row in enumerate(rows, 1):
    try:
      passages.append(_passage(*row))
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f'{path}, passage {number}: needs context and questions with answers '
        f'as SQuAD or SEAL have them ({type(error).__name__}: {error})'
      ) from None
  passages = [passage for passage in passages if passage.questions]
  if not passages:
    raise ValueError(f'{path}: no passage with a question that has an answer')
  return passages


def _rows(found) -> list[tuple[str, dict]]:
  """Titles and paragraphs."""
  if isinstance(found, dict):
    return [
      (article.get('title', ''), paragraph)
      for article in found['data']
      for paragraph in article['paragraphs']
    ]
  return [(row.get('title', ''), row) for row in found]


def _passage(title: str, row: dict) -> Passage:
  asked = row['qas'] if 'qas' in row else row['questions']
  questions = []
  for one in asked:
    if 'answers' in one:
      answers = [answer['text'] for answer in one['answers']]
    else:
      answers = [one['answer']]
    answers = tuple(dict.fromkeys(a.strip() for a in answers if a.strip()))
    if answers:
      questions.append(Question(one['question'].strip(), answers))
  return Passage(title, row['context'].strip(), tuple(questions))


_ARTICLES = re.compile(r'\b(a|an|the)\b')


def normalise(answer: str) -> str:
  """An answer as it is compared."""
  kept = ''.join(c for c in answer.lower() if c not in string.punctuation)
  return ' '.join(_ARTICLES.sub(' ', kept).split())


def exact(said: str, answers: Sequence[str]) -> float:
  """1 if what was said is one of the answers, else 0."""
  return float(normalise(said) in [normalise(answer) for answer in answers])


def f1(said: str, answers: Sequence[str]) -> float:
  """Harmonic mean of precision and recall of words, with the best answer."""
  return max(_f1(normalise(said), normalise(answer)) for answer in answers)


def _f1(said: str, answer: str) -> float:
  mine, theirs = said.split(), answer.split()
  if not mine or not theirs:
    return float(mine == theirs)
  shared = (collections.Counter(mine) & collections.Counter(theirs)).total()
  return 2 * shared / (len(mine) + len(theirs))
