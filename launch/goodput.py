"""Where the time of a run goes: every moment of it belongs to one kind."""

import time

# Other is what comes before the first step and after the last: opening data,
# making or restoring the state, plots. Compile is the first call of a program.
KINDS = ('other', 'compile', 'compute', 'data', 'evaluate', 'checkpoint')


class Goodput:
  """Seconds of each kind, of this process, since it was made."""

  def __init__(self):
    self._seconds = dict.fromkeys(KINDS, 0.0)
    self._read = dict(self._seconds)
    self._kind, self._since = 'other', time.perf_counter()
    self._called: set[str] = set()

  def turn(self, kind: str) -> None:
    """Begins to spend time on something else."""
    assert kind in KINDS, kind
    now = time.perf_counter()
    self._seconds[self._kind] += now - self._since
    self._kind, self._since = kind, now

  def call(self, program: str, kind: str) -> None:
    """Begins a call of a compiled program, whose first compiles it."""
    self.turn(kind if program in self._called else 'compile')
    self._called.add(program)

  def read(self) -> dict[str, float]:
    """Fractions since the last `read`, named `time_compute` and so on."""
    self.turn(self._kind)
    spent = {k: s - self._read[k] for k, s in self._seconds.items()}
    self._read = dict(self._seconds)
    return {f'time_{k}': v for k, v in _fractions(spent).items()}

  def words(self) -> str:
    """All time so far: `93.1% compute, 4.0% compile, ...`, most first."""
    self.turn(self._kind)
    parts = sorted(_fractions(self._seconds).items(), key=lambda kv: -kv[1])
    return ', '.join(f'{part:.1%} {kind}' for kind, part in parts)


def _fractions(seconds: dict[str, float]) -> dict[str, float]:
  whole = sum(seconds.values()) or 1.0
  return {kind: part / whole for kind, part in seconds.items()}
