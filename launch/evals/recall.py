"""What a model knows of facts with no text in context, asked in other words.

Each question is put alone, to fresh mixers and caches. Of the answers that are
right for somebody of that day the model is to prefer the right one, by the
log-probability of its tokens; a model that knows nothing is right by chance.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch.data.tokenizers import Tokenizer
from nestax.launch.evals.facts import Fact
from nestax.sleep import distributions
from nestax.sleep import reader as readers
from nestax.sleep.reader import Reader, Said


class Questions(NamedTuple):
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


def begin(tokenizer: Tokenizer) -> list[int]:
  """What a text begins with."""
  return [tokenizer.bos] if tokenizer.adds_bos else []


def ask(tokenizer: Tokenizer, facts: Sequence[Fact]) -> Questions:
  """Makes rows of all questions about some facts."""
  found, first = [], begin(tokenizer)
  pairs = [(fact, q) for fact in facts for q in fact.questions]
  for number, (fact, question) in enumerate(pairs):
    prompt = first + tokenizer.encode(question)
    for i, answer in enumerate(fact.candidates):
      found.append((prompt, tokenizer.encode(answer), number, i == 0))
  L = max(len(q) + len(a) for q, a, _, _ in found)
  L = -(-L // 8) * 8  # few lengths, few programs
  tokens = np.full((len(found), L), tokenizer.pad, np.int32)
  for row, (q, a, _, _) in zip(tokens, found):
    row[: len(q) + len(a)] = q + a
  start = np.array([len(q) for q, _, _, _ in found], np.int32)
  length = np.array([len(q) + len(a) for q, a, _, _ in found], np.int32)
  chance = float(np.mean([1 / len(fact.candidates) for fact, _ in pairs]))
  return Questions(
    Said(tokens, start, length),
    np.array([number for _, _, number, _ in found]),
    np.array([right for _, _, _, right in found]),
    chance,
  )


@functools.partial(jax.jit, static_argnums=0)
def _logs(reader: Reader, params, context, rows: Said):
  logits = readers.score(reader, params, context, rows.tokens_BxL)
  mask = rows.said_BxL[:, 1:]
  return distributions.log_chance(logits, rows.tokens_BxL[:, 1:], mask)


def right(
  reader: Reader, params, context, asked: Questions, rows: int = 64
) -> np.ndarray:
  """Which questions are answered rightly, bool `[Q]`.

  Args:
    reader: of the model.
    params: its parameters.
    context: what its levels have written, of one owner; None for nothing.
    asked: the questions.
    rows: read at a time; the last batch is filled up.
  """
  N = len(asked.question_N)
  logs = []
  for start in range(0, N, rows):
    index = np.arange(start, start + rows) % N
    part = Said(*(jnp.asarray(x[index]) for x in asked.rows))
    logs.append(_logs(reader, params, context, part))
  logs_N = np.concatenate([np.asarray(x) for x in logs])[:N]
  best_Q = np.full(asked.question_N[-1] + 1, -np.inf)
  others_N = np.where(asked.right_N, -np.inf, logs_N)
  np.maximum.at(best_Q, asked.question_N, others_N)
  # a tie is no knowledge, and NaN none either
  return logs_N[asked.right_N] > best_Q
