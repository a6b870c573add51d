"""What a life knows of its questions, before and after each of its nights."""

import time
from collections.abc import Callable

import numpy as np

from nestax.launch import quiz, report
from nestax.launch.life import Being, Past
from nestax.launch.plans import Plan
from nestax.sleep import cycle, owners


class Known:
  """Puts a plan's questions to a life's owners; says how far it is."""

  def __init__(
    self, plan: Plan, past: Past, show: report.Show, stop: Callable[[], None]
  ):
    """`stop` is called between questions of a night, and may raise."""
    self.plan, self.past = plan, past
    self.show, self.stop = show, stop

  def dusk(self, being: Being, about: quiz.About) -> dict:
    """What is known before the night, if there are questions; and seconds."""
    begun, start = self._begun(), time.perf_counter()
    if not begun:
      return {}
    params, state = being.params, being.state
    periods = len(self.plan.made.model.cfg.stream.periods)
    total = quiz.dusk_asks(periods) * quiz.count(begun)
    who = self._who(params, self.plan.tools.compute(params, state), total)
    known = quiz.dusk(who, begun, about)
    return known | {'seconds': time.perf_counter() - start}

  def morning(
    self, slept: cycle.Night, known: dict, about: quiz.About
  ) -> tuple[cycle.Night, dict | None]:
    """The night with what is known after it, and the same for its row.

    Args:
      slept: the night, or what stands for one before the first.
      known: from `dusk`; nothing before the first night.
      about: what was slept on.
    """
    asked, start = self.plan.asked, time.perf_counter()
    if not asked:
      return slept, None
    used = owners.used(self.plan.tools.cfg, slept.params, slept.state)
    begun = self._begun()
    total = quiz.count(asked) + np.count_nonzero(used) * quiz.count(begun)
    who = self._who(slept.params, slept.state, total)
    spent = known.get('seconds', 0.0)
    known = {name: x for name, x in known.items() if name != 'seconds'}
    known['morning'] = quiz.morning(who, asked, about)
    known['without'] = quiz.without(who, begun, about, used)
    slept = slept._replace(
      metrics=slept.metrics | quiz.numbers(known, asked, about),
      seconds=slept.seconds
      | {'questions': spent + time.perf_counter() - start},
    )
    return slept, quiz.row(known, asked)

  def _begun(self) -> list[quiz.Part]:
    """Questions of the days so far, and those of none."""
    days = self.plan.days[: len(self.past.marks)]
    names = {'', *(day.name for day in days)}
    return [part for part in self.plan.asked if part.day in names]

  def _who(self, params, state, total: int) -> quiz.Who:
    plan, past, done = self.plan, self.past, [0]
    cfg, names = plan.made.model.cfg, past.names

    def tell(count: int) -> None:
      done[0] += count
      self.show.update('questions', done[0], total)
      if past.dusk:  # before the first checkpoint there is nothing to go on
        self.stop()

    return quiz.Who(cfg, plan.tools.reader, params, state, names, tell)
