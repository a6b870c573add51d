"""What a model knows with no text in context: answers preferred to others.

Each question is put alone, to fresh mixers and caches. Of the answers that it
may be, the model is to prefer the right one, by the log-probability of its
tokens; a model that knows nothing is right by chance. A question without wrong
answers is answered if the right one is what the model would say by itself.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch.data.tokenizers import Tokenizer
from nestax.sleep import distributions
from nestax.sleep import reader as readers
from nestax.sleep.reader import Reader, Said


class Sheet(NamedTuple):
  """N answers to Q questions as token rows, the right ones first.

  Attributes:
    rows: question and answer each, numpy.
    question_N: which question a row answers.
    right_N: whether its answer is the right one.
    chance: share of right choices of somebody who knows nothing.
  """

  rows: Said
  question_N: np.ndarray
  right_N: np.ndarray
  chance: float

  @property
  def count(self) -> int:
    """Questions."""
    return int(self.question_N[-1]) + 1

  @property
  def length(self) -> int:
    """Tokens a row."""
    return self.rows.tokens_BxL.shape[1]

  def filled(self, length: int, pad: int) -> 'Sheet':
    """With rows of `length` tokens, for sheets that share a program."""
    more = (0, 0), (0, length - self.length)
    tokens = np.pad(self.rows.tokens_BxL, more, constant_values=pad)
    return self._replace(rows=self.rows._replace(tokens_BxL=tokens))


def begin(tokenizer: Tokenizer) -> list[int]:
  """What a text begins with."""
  return [tokenizer.bos] if tokenizer.adds_bos else []


def ask(
  tokenizer: Tokenizer, asked: Sequence[tuple[str, Sequence[str]]]
) -> Sheet:
  """Makes rows of questions.

  Args:
    tokenizer: of the model.
    asked: at least one prompt with its answers, the right one first.
  """
  found, first = [], begin(tokenizer)
  for number, (question, answers) in enumerate(asked):
    prompt = first + tokenizer.encode(question)
    for i, answer in enumerate(answers):
      found.append((prompt, tokenizer.encode_after(answer), number, i == 0))
  L = max(len(q) + len(a) for q, a, _, _ in found)
  L = -(-L // 8) * 8  # few lengths, few programs
  tokens = np.full((len(found), L), tokenizer.pad, np.int32)
  for row, (q, a, _, _) in zip(tokens, found):
    row[: len(q) + len(a)] = q + a
  start = np.array([len(q) for q, _, _, _ in found], np.int32)
  size = np.array([len(q) + len(a) for q, a, _, _ in found], np.int32)
  return Sheet(
    Said(tokens, start, size),
    np.array([number for _, _, number, _ in found]),
    np.array([right for _, _, _, right in found]),
    float(np.mean([_chance(len(answers)) for _, answers in asked])),
  )


def _chance(answers: int) -> float:
  return 1 / answers if answers > 1 else 0.0


@functools.partial(jax.jit, static_argnums=0)
def _judged(reader: Reader, params, context, rows: Said):
  logits = readers.score(reader, params, context, rows.tokens_BxL)
  mask, said = rows.said_BxL[:, 1:], rows.tokens_BxL[:, 1:]
  itself = ((logits.argmax(-1) == said) | ~mask).all(1)
  return distributions.log_chance(logits, said, mask), itself


def right(
  reader: Reader, params, context, asked: Sheet, rows: int = 64
) -> np.ndarray:
  """Which questions are answered rightly, bool `[Q]`.

  Args:
    reader: of the model.
    params: its parameters.
    context: what its levels have written, of one owner; None for nothing.
    asked: the questions.
    rows: read at a time; the last batch is filled up.
  """
  N, Q = len(asked.question_N), asked.count
  judged = []
  for start in range(0, N, rows):
    index = np.arange(start, start + rows) % N
    part = Said(*(jnp.asarray(x[index]) for x in asked.rows))
    judged.append(_judged(reader, params, context, part))
  logs_N, itself_N = (
    np.concatenate([np.asarray(x) for x in each])[:N] for each in zip(*judged)
  )
  best_Q = np.full(Q, -np.inf)
  others_N = np.where(asked.right_N, -np.inf, logs_N)
  np.maximum.at(best_Q, asked.question_N, others_N)
  alone_Q = np.bincount(asked.question_N, minlength=Q) == 1
  finite_Q = np.isfinite(logs_N[asked.right_N])
  # a tie is no knowledge, and NaN none either
  preferred_Q = logs_N[asked.right_N] > best_Q
  return np.where(alone_Q, itself_N[asked.right_N] & finite_Q, preferred_Q)
