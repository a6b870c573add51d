"""Batches that do not depend on how many processes read them.

The documents are dealt to `data.shards` shards, and each shard gives the same
number of neighbouring rows of every batch. A process reads the shards that
hold rows of its own and leaves out the others' rows, so what a batch is, and
what a place in the data means, is the config's business alone. With a shard a
process, or more, nothing is read twice.
"""

import grain
import numpy as np


class Rows(grain.DatasetIterator):
  """Some rows of the batches of all shards, in the order of their numbers."""

  def __init__(self, open_shard, rows, per_shard: int, shards: int):
    """Opens the shards that hold the rows.

    Args:
      open_shard: number of a shard -> grain.DatasetIterator of its rows.
      rows: numbers of the rows wanted, rising.
      per_shard: rows that a shard has of a batch.
      shards: how many there are.
    """
    super().__init__()
    rows, self._of = np.asarray(rows), shards
    self._wanted = {
      int(number): rows[rows // per_shard == number] % per_shard
      for number in np.unique(rows // per_shard)
    }
    self._shards = {number: open_shard(number) for number in self._wanted}

  def __next__(self):
    batches = {number: next(shard) for number, shard in self._shards.items()}
    parts = [
      {key: array[self._wanted[number]] for key, array in batch.items()}
      for number, batch in batches.items()
    ]
    return {
      key: np.concatenate([part[key] for part in parts]) for key in parts[0]
    }

  def get_state(self):
    """JSON-able: the place of every shard that this process reads."""
    places = {str(k): shard.get_state() for k, shard in self._shards.items()}
    return {'shards': places, 'of': self._of}

  def set_state(self, state):
    """Goes to a place, of this process or of several joined by `join`.

    Raises:
      ValueError: in words, for the place of another corpus or other shards.
    """
    if 'shards' not in state:  # from before there were any
      state = {'shards': {'0': state}, 'of': 1}
    if state['of'] != self._of:
      raise ValueError(
        f'the data position is of {state["of"]} shards, and data.shards is '
        f'{self._of}'
      )
    missing = sorted(self._wanted.keys() - {int(k) for k in state['shards']})
    if missing:
      raise ValueError(f'the data position lacks the shards {missing}')
    for number, shard in self._shards.items():
      shard.set_state(state['shards'][str(number)])

  def start_prefetch(self):
    for shard in self._shards.values():
      shard.start_prefetch()

  def close(self):
    super().close()
    for shard in self._shards.values():
      shard.close()


def join(states: list[dict]) -> dict:
  """Joins what the processes of a run have saved into one place."""
  if len(states) == 1:
    return states[0]
  places = {}
  for state in states:
    places |= state['shards']
  return {'shards': places, 'of': states[0]['of']}
