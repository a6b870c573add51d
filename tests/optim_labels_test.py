"""Every parameter gets exactly one label, or the error says which do not."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from nestax.optim import labels

PARAMS = {
  'blocks': {
    'query': {'kernel': np.zeros((2, 3))},
    'norm': {'scale': np.ones(3)},
  },
  'embed': {'embedding': np.zeros((5, 3))},
}
RULES = (
  (r'.*/kernel', 'matrix'),
  (r'.*/scale', 'vector'),
  (r'embed/.*', 'embedding'),
)


def test_each_parameter_gets_the_label_of_its_rule():
  assert labels.label(PARAMS, RULES) == {
    'blocks': {'query': {'kernel': 'matrix'}, 'norm': {'scale': 'vector'}},
    'embed': {'embedding': 'embedding'},
  }


def test_left_out_parameters_are_all_listed():
  with pytest.raises(labels.LabelError) as error:
    labels.label(PARAMS, RULES[:1])
  assert 'blocks/norm/scale' in str(error.value)
  assert 'embed/embedding' in str(error.value)
  assert 'query' not in str(error.value)


def test_parameters_claimed_twice_are_listed_with_both_rules():
  with pytest.raises(labels.LabelError) as error:
    labels.label(PARAMS, (*RULES, ('blocks/norm/.*', 'other')))
  assert 'blocks/norm/scale' in str(error.value)
  assert "'.*/scale' -> vector" in str(error.value)
  assert "'blocks/norm/.*' -> other" in str(error.value)


def test_a_rule_has_to_match_the_whole_path():
  with pytest.raises(labels.LabelError, match='blocks/query/kernel'):
    labels.label({'blocks': {'query': {'kernel': 0}}}, (('blocks', 'matrix'),))


def test_boxes_of_logical_axes_do_not_show_in_the_path():
  boxed = {
    'a': {'kernel': nn.LogicallyPartitioned(np.zeros((2, 3)), ('x', 'y'))}
  }
  assert labels.paths(boxed) == ['a/kernel']
  names = labels.label(boxed, (('a/kernel', 'matrix'),))
  assert jax.tree.structure(names) == jax.tree.structure(boxed)


def test_lists_are_named_by_their_index():
  assert labels.paths({'levels': [{'w': 0}, {'w': 1}]}) == [
    'levels/0/w',
    'levels/1/w',
  ]


def test_describe_counts_arrays_and_numbers():
  assert 'embedding: 1 arrays, 15 numbers' in labels.describe(PARAMS, RULES)


def test_an_expression_that_is_none_is_named():
  with pytest.raises(labels.LabelError, match=r"'embed/\(' -> e is no regular"):
    labels.label(PARAMS, (*RULES, ('embed/(', 'e')))
