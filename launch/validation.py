"""What a model is worth on the validation batches."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from nestax.launch import goodput, loss, metrics
from nestax.models import language_model
from nestax.models.config import ModelConfig


def evaluate(
  cfg: ModelConfig,
  step: Callable,
  batches: Callable[[], Iterable[dict]],
  stopped: Callable[[], int],
  spent: goodput.Goodput,
  params,
) -> tuple[dict[str, float] | None, int]:
  """Means over all validation batches, summed in float64.

  A signal ends it early: gives nothing, then, and the signal's number.

  Args:
    cfg: of the model.
    step: of `step.eval_step`.
    batches: gives the batches, on the devices, from the first again.
    stopped: the signal that all processes have agreed on, 0 for none.
    spent: where the time goes.
    params: of the model.
  """
  total = loss.Sums(*np.zeros(len(loss.Sums._fields)))
  levels = []
  for batch in batches():
    spent.call('evaluation', 'evaluate')
    fresh = step(params, batch)
    spent.turn('evaluate')
    sums, moved = jax.device_get(fresh)
    total = jax.tree.map(lambda a, b: a + np.float64(b), total, sums)
    levels.append(moved)
    if stop := stopped():
      return None, stop
  numbers = {name: float(value) for name, value in loss.means(total).items()}
  rates = jax.device_get(language_model.inner_rates(cfg, params))
  return numbers | metrics.of_levels(levels, rates), 0
