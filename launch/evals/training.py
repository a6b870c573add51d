"""How the small models of an evaluation are trained."""

import dataclasses
import math

from nestax.launch.evals import picking, suite, sweep

BEST = ('', 'valid', 'loss')


@dataclasses.dataclass(frozen=True)
class Training:
  """How small models are trained.

  Attributes:
    D, N, H: width, blocks and heads of all families.
    F: hidden width of the MLPs; 0 for 8/3 of D.
    dtype: that they compute in.
    steps: updates.
    batch: rows an update, and a batch of a test.
    examples: rows there are to train on, read again and again.
    tests: rows of every test; half as many to pick the rate by.
    rates: learning rates; --rates sets them.
    decay: weight decay of matrices, times the learning rate.
    evaluations: on the way, for the curves; fewer where they do not divide the
      steps.
    warmup: share of the steps in which the rate rises, before half a cosine.
    final: what is left of the rate in the end, as a share of its peak.
    b2: of AdamW, how slowly its second moments move; the first is 0.9.
    best: the scores are those of the evaluation on the way whose `valid` is
      best ('valid') or whose loss is lowest ('loss'); '': of the last one.
    enough: a run ends once its `valid` has been so much, in %; 0: never.
    patience: a run ends after so many evaluations none of which was better than
      the best one before; 0: never.
    apart: runs go one after another and are kept in the workdir, so that the
      same command goes on at the run where it stopped.
    trial: if apart, steps of shorter trainings, of the first seed alone, that
      the rate is picked by; 0: by the runs themselves, all rates and seeds.
  """

  D: int = 64
  N: int = 2
  H: int = 2
  F: int = 0
  dtype: str = 'float32'
  steps: int = 1000
  batch: int = 64
  examples: int = 10_000
  tests: int = 1024
  rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
  decay: float = 0.1
  evaluations: int = 8
  warmup: float = 0.1
  final: float = 0.1
  b2: float = 0.95
  best: str = ''
  enough: float = 0.0
  patience: int = 0
  apart: bool = False
  trial: int = 0

  def __post_init__(self):
    for name in ('D', 'N', 'H', 'steps', 'batch', 'examples', 'evaluations'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: at least 1')
    if self.tests < 2:
      raise ValueError(f'tests={self.tests}: at least 2')
    if not 0 <= self.enough <= 100:
      raise ValueError(f'enough={self.enough}: 0 to 100, in %')
    for name in ('warmup', 'final', 'b2'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: 0 or more, below 1')
    if self.best not in BEST:
      raise ValueError(f'best={self.best!r}: one of {BEST}')
    if self.patience < 0 or (self.patience and not self.best):
      raise ValueError(
        f'patience={self.patience}: evaluations that may pass without a better '
        "one, 0 or more, and only with best='valid' or best='loss'"
      )
    if not self.rates or not all(0 < r < math.inf for r in self.rates):
      raise ValueError(f'rates={self.rates}: one or more, above 0 and finite')
    if len(set(self.rates)) < len(self.rates):  # their rows would be one run's
      raise ValueError(f'rates={self.rates}: each of them once')

  def asked(self, asked: suite.Asked) -> 'Training':
    """The same with the command line's steps and rates.

    Raises:
      ValueError: if the trial does not go with the steps.
    """
    made = dataclasses.replace(
      self, steps=asked.steps or self.steps, rates=asked.rates or self.rates
    )
    made._check_trial()
    return made

  def _check_trial(self):
    if self.trial and not (self.apart and 0 < self.trial < self.steps):
      raise ValueError(
        f'trial={self.trial}: fewer than steps={self.steps}, above 0, and only '
        'with apart=true'
      )
    if self.trial % self.every:
      raise ValueError(
        f'trial={self.trial}: a multiple of {self.every}, the steps between '
        f'two of evaluations={self.evaluations}'
      )

  @property
  def rule(self) -> picking.Rule:
    """Which evaluation of a run counts."""
    return picking.Rule(self.best, self.enough, self.patience)

  @property
  def every(self) -> int:
    """Steps between two evaluations."""
    return sweep.stretch(self.steps, self.evaluations)

  def base(self, V: int) -> dict:
    """Config keys that all families share."""
    F = self.F or -(-8 * self.D // 3 // 8) * 8
    sizes = {'V': V, 'D': self.D, 'N': self.N, 'H': self.H, 'F': F}
    return sizes | {'dtype': self.dtype}
