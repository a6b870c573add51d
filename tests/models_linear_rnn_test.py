"""Linear recurrences as mixers, against plain loops over their equations."""

import pytest
import recurrence_cases as cases

from nestax.models import linear_rnn

PLAIN = {
  'deltanet': cases.deltanet,
  'gated_deltanet': cases.gated_deltanet,
  'retnet': cases.retnet,
  'mamba2': cases.mamba2,
  'titans': cases.titans,
  'ttt_linear': cases.ttt,
  'ttt_mlp': cases.ttt,
}


@pytest.mark.parametrize('family', PLAIN)
def test_a_mixer_is_its_equations_token_by_token(family):
  mixer = linear_rnn.LinearRNN(cases.config(family))
  cases.assert_is_its_equations(mixer, PLAIN[family])
