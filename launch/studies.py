"""What is read as tasks to dream about: a piece of a day, questions about it.

A dream goes on from a piece of the day and must help with its questions. Those
of a day are shared out among equally many pieces, in the order of the file, so
that questions in the order of the text are asked about what they are of.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from nestax.launch import quiz
from nestax.launch.data.tokenizers import Tokenizer
from nestax.launch.days import Day
from nestax.launch.questions import Question
from nestax.sleep import task
from nestax.sleep.dream import DreamConfig
from nestax.sleep.replay import Piece

GROUP = 4  # questions a task, at most


@dataclasses.dataclass(frozen=True)
class Study:
  """A piece of what an owner read on a day, and questions about it.

  Attributes:
    name: for messages.
    owner, day: whose and what it is of.
    read: ids of the piece, after those that a text begins with.
    asked: ids of prompts and right answers.
  """

  name: str
  owner: str
  day: str
  read: tuple[int, ...]
  asked: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

  def context(self):
    return self.read

  def questions(self):
    return self.asked


def of(
  path: str,
  asked: Sequence[Question],
  days: Sequence[Day],
  tokenizer: Tokenizer,
  how: DreamConfig,
) -> tuple[Study, ...]:
  """Tasks of the questions of a file.

  Args:
    path: of the file, for messages.
    asked: its questions, each of a day.
    days: that are read.
    tokenizer: of the model.
    how: gives the length of rows, half of which the pieces may take.

  Raises:
    ValueError: for a question that is of no day, or does not fit its row.
  """
  groups: dict[tuple[str, str], list[Question]] = {}
  for one in asked:
    if not one.day:
      raise ValueError(
        f'dream={path}: {one.question!r} is of no day; give it the "day" that '
        'the dream is to be about'
      )
    groups.setdefault((one.owner, one.day), []).append(one)
  tokens = {day.name: day.tokens for day in days}
  found = []
  for (owner, day), some in groups.items():
    parts = np.array_split(np.array(some, object), -(-len(some) // GROUP))
    ids, size = tokens[day][owner], how.length // 2 - 1
    ids = ids[1:] if len(ids) and ids[0] == tokenizer.bos else ids
    starts = np.linspace(0, max(0, len(ids) - size), len(parts)).astype(int)
    for number, (part, start) in enumerate(zip(parts, starts)):
      piece = (tokenizer.bos, *map(int, ids[start : start + size]))
      found.append(
        Study(
          f'dream={path}, day {day} of {owner}, task {number}',
          owner,
          day,
          piece,
          tuple(_pair(tokenizer, one) for one in part),
        )
      )
  for one in found:
    task.prompt_row(one, how.length)
    task.question_rows(one, how.answer, GROUP)
  return tuple(found)


def among(studies: Sequence[Study], pieces: Iterable[Piece]) -> list[Study]:
  """Those whose text is slept on: none of what filters have left out."""
  texts: dict[tuple[str, str], list[int]] = {}
  for piece in pieces:
    texts.setdefault(quiz.day_of(piece), []).extend(piece.tokens)
  return [
    one
    for one in studies
    if _holds(texts.get((one.owner, one.day), ()), one.read[1:])
  ]


def _holds(tokens: Sequence[int], some: tuple[int, ...]) -> bool:
  starts = range(len(tokens) - len(some) + 1)
  return any(tuple(tokens[i : i + len(some)]) == some for i in starts)


def _pair(tokenizer: Tokenizer, one: Question):
  prompt = [tokenizer.bos, *tokenizer.encode(one.prompt)]
  answer = tokenizer.encode_after(one.answers[0])
  return tuple(prompt), tuple(answer)
