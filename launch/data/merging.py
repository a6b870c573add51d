"""Byte pair encoding by scores, as SentencePiece, llama.cpp and llama2.c do.

A text is cut into characters (those without a piece into bytes); then, as long
as two neighbours together are a piece, the pair with the highest score is
joined, the leftmost of equal ones first.
"""

import functools
import heapq
import re
from collections.abc import Sequence

# A word with the spaces before it. No piece of a usual vocabulary holds a
# space after another character, so no pair is ever joined across words.
_WORD = re.compile(' *[^ ]+| +')
_CROSSES = re.compile('[^ ] ')


class Merger:
  """Encodes texts with one vocabulary.

  Args:
    pieces: text of each id, with real spaces; None for ids that no text is
      encoded to (specials, bytes).
    scores: of each id; the higher, the sooner it is joined.
    bytes_: id of each of the 256 bytes, for characters without a piece.
    prefix: whether a space is put before a text.
  """

  def __init__(
    self,
    pieces: Sequence[str | None],
    scores: Sequence[float],
    bytes_: Sequence[int],
    prefix: bool,
  ):
    self._ids = {}
    for i, piece in enumerate(pieces):
      if piece:
        self._ids.setdefault(piece, i)
    self._scores = scores
    self._bytes = bytes_
    self._prefix = prefix
    self._by_word = not any(map(_CROSSES.search, self._ids))
    self._remember_words()

  def _remember_words(self):
    self._word = functools.lru_cache(1 << 16)(self._merged)

  def __getstate__(self):
    # workers of the data pipeline get copies, and a cache has none
    return {k: v for k, v in self.__dict__.items() if k != '_word'}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._remember_words()

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without specials; [] for an empty one."""
    if not text:
      return []
    text = ' ' + text if self._prefix else text
    words = _WORD.findall(text) if self._by_word else [text]
    return [i for word in words for i in self._word(word)]

  def _merged(self, text: str) -> tuple[int, ...]:
    ids, spelt = [], []
    for char in text:
      i = self._ids.get(char)
      own = [self._bytes[b] for b in char.encode()] if i is None else [i]
      ids += own
      spelt += [char if i is not None else None] * len(own)
    end = len(ids)
    after, before = list(range(1, end + 1)), list(range(-1, end - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left):
      right = after[left]
      if right < end and spelt[left] and spelt[right]:
        piece = spelt[left] + spelt[right]
        i = self._ids.get(piece)
        if i is not None:
          heapq.heappush(queue, (-self._scores[i], left, right, piece))

    for left in range(end):
      offer(left)
    while queue:
      _, left, right, piece = heapq.heappop(queue)
      # one of the two may have been joined to another meanwhile
      if after[left] != right or spelt[left] is None or spelt[right] is None:
        continue
      if spelt[left] + spelt[right] != piece:
        continue
      ids[left], spelt[left] = self._ids[piece], piece
      ids[right], spelt[right] = -1, None
      after[left] = after[right]
      if after[left] < end:
        before[after[left]] = left
      offer(left)
      if before[left] >= 0:
        offer(before[left])
    return tuple(i for i in ids if i >= 0)
