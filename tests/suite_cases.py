"""An evaluation of two tasks, made up."""

import dataclasses

from nestax.launch.evals import suite


@dataclasses.dataclass(frozen=True)
class Options:
  bonus: float = 0.0


class Stopped(Exception):
  pass


def evaluation(done, stop_at=None, **fields):
  """Two tasks; `done` gathers what was worked at."""

  def make(options, asked):
    for task in ('easy', 'hard'):
      for model in asked.models:

        def run(say, task=task, model=model):
          if (task, model) == stop_at:
            raise Stopped
          done.append((task, model))
          say(1, 2)
          level = {'easy': 90.0, 'hard': 50.0}[task] + options.bonus
          scores = {'short': level}
          if task == 'hard':
            scores['long'] = float('nan') if model == 'b' else level - 10
          return [
            {'seed': s, 'scores': {k: x + s for k, x in scores.items()}}
            for s in range(asked.seeds)
          ]

        key = {'bonus': options.bonus, 'seeds': asked.seeds}
        yield suite.Cell(task, model, key, run)

  fields = {'words': 'Made up, %.'} | fields
  return suite.Evaluation('made', Options(), make, **fields)
