"""Tasks become rows, or are refused in words."""

import dream_cases as cases
import pytest

from nestax.sleep import task
from nestax.sleep.task import TaskError


def test_an_answer_that_is_too_long_is_refused():
  with pytest.raises(TaskError, match='question 0 has 2 and its answer 1'):
    task.question_rows(cases.After(), 2, 2)
