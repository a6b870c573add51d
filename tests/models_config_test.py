"""Configs at the border: what fits is kept, what does not is named."""

import dataclasses
import re

import ml_collections
import numpy as np
import pytest

from nestax.cms.schedule import Level, Schedule, split_width
from nestax.models.config import CMSConfig, ModelConfig
from nestax.models.memory.types import MemoryConfig


def refuses(values, *words):
  with pytest.raises(ValueError) as error:
    ModelConfig.from_dict(values)
  for word in words:
    assert word in str(error.value), (word, str(error.value))


@pytest.mark.parametrize(
  'values,words',
  [
    ({'width': 8}, ['model: unknown width', 'known: family, V, D']),
    ({'memory': {'chunk': 8}}, ['model.memory: unknown chunk', 'chunk_mem']),
    ({'cms': {'period': 8}}, ['model.cms: unknown period', 'periods']),
    (
      {'cms': {'remat': 'dots'}},
      ["model.cms: remat='dots'", 'groups'],
    ),
    ({'a': 1, 'b': 2}, ['unknown a, b']),
  ],
)
def test_an_unknown_key_is_refused_by_its_path(values, words):
  refuses(values, *words)


@pytest.mark.parametrize(
  'values,words',
  [
    ({'D': '128'}, ["model.D='128'", 'int is wanted', 'not a str']),
    ({'D': 128.0}, ['model.D=128.0', 'int is wanted', 'not a float']),
    ({'D': None}, ['model.D=None', 'not a NoneType']),
    ({'N': True}, ['model.N=True', 'int is wanted', 'not a bool']),
    ({'tied': 1}, ['model.tied=1', 'bool is wanted', 'not a int']),
    ({'rope_base': True}, ['model.rope_base=True', 'float is wanted']),
    ({'dtype': 32}, ['model.dtype=32', 'str is wanted']),
    ({'memory': 3}, ['model.memory=3', 'mapping']),
    ({'memory': {'eta_max': '1'}}, ["model.memory.eta_max='1'", 'float']),
    ({'memory': {'delta': 0}}, ['model.memory.delta=0', 'bool']),
    ({'memory': {'adaptive': 'k'}}, ["model.memory.adaptive='k'", 'tuple']),
    ({'cms': {'periods': 128}}, ['model.cms.periods=128', 'tuple']),
    ({'cms': {'periods': (8, 1.5)}}, ['model.cms.periods=1.5', 'int']),
    ({'cms': {'periods': (True,)}}, ['model.cms.periods=True', 'bool']),
  ],
)
def test_a_value_of_another_type_is_refused(values, words):
  refuses(values, *words)


@pytest.mark.parametrize(
  'make,values,words',
  [
    (ModelConfig, {'D': 32.0}, ['D=32.0', 'an int is wanted, not a float']),
    (ModelConfig, {'tied': 1}, ['tied=1', 'a bool is wanted']),
    (ModelConfig, {'dtype': float}, ["dtype=<class 'float'>", 'a str']),
    (ModelConfig, {'memory': {}}, ['memory={}', 'a MemoryConfig is wanted']),
    (ModelConfig, {'cms': None}, ['cms=None', 'a CMSConfig is wanted']),
    (MemoryConfig, {'chunk_mem': '8'}, ["chunk_mem='8'", 'an int']),
    (MemoryConfig, {'adaptive': 'k'}, ["adaptive='k'", 'a tuple of str']),
    (CMSConfig, {'periods': 8}, ['periods=8', 'a tuple of int is wanted']),
    (CMSConfig, {'periods': [8, 16]}, ['periods=[8, 16]', 'a tuple of int']),
    (CMSConfig, {'periods': (8, 16.0)}, ['periods=(8, 16.0)', 'of int']),
    (CMSConfig, {'periods': (8, True)}, ['periods=(8, True)', 'of int']),
    (CMSConfig, {'rate': (0.1, 0.2)}, ['rate=(0.1, 0.2)', 'a float']),
    (CMSConfig, {'blocks': (0, 1)}, ['blocks=(0, 1)', 'a str is wanted']),
    (CMSConfig, {'optimizer': None}, ['optimizer=None', 'a str is wanted']),
  ],
)
def test_a_keyword_of_another_type_is_refused(make, values, words):
  with pytest.raises(ValueError) as error:
    make(**values)
  for word in words:
    assert word in str(error.value), (word, str(error.value))


def test_fewer_blocks_than_groups_are_refused_by_the_keys():
  cms = {'assign': 'groups', 'blocks': 'last_quarter', 'periods': (8, 16)}
  refuses(
    {'N': 4, 'cms': cms},
    "cms.assign='groups'",
    'the 2 of cms.periods=(8, 16)',
    "cms.blocks='last_quarter' lets 1 learn",
  )
  assert len(ModelConfig.from_dict({'N': 8, 'cms': cms}).groups) == 2


def test_whole_numbers_will_do_for_floats_and_those_of_numpy_too():
  cfg = CMSConfig(rate=1, periods=(np.int64(8), 16))
  assert cfg == CMSConfig(rate=1.0, periods=(8, 16))
  assert hash(ModelConfig(D=np.int32(32))) == hash(ModelConfig(D=32))


@pytest.mark.parametrize(
  'values,words',
  [
    ({'family': 'mamba'}, ["family='mamba'", 'hope', 'transformer']),
    ({'dtype': 'float16'}, ["dtype='float16'", 'bfloat16', 'float32']),
    ({'remat': 'some'}, ["remat='some'", 'none', 'dots', 'full', 'offload']),
    *(
      ({name: 0}, [f'{name}=0', 'at least 1'])
      for name in ('V', 'D', 'N', 'H', 'F', 'taps', 'unroll')
    ),
    *(({name: -1}, [f'{name}=-1', '0 or more']) for name in 'KG'),
    ({'window': -4}, ['window=-4', '0 or more']),
    ({'rope_base': 0}, ['rope_base=0.0', 'above 0']),
    ({'epsilon': 0}, ['epsilon=0.0', 'above 0']),
    ({'epsilon': 1.5}, ['epsilon=1.5', 'below 1']),
    ({'D': 100, 'H': 3}, ['D=100', 'H=3', 'multiple']),
    ({'H': 4, 'G': 3}, ['H=4', 'G=3', 'divide']),
    ({'H': 2, 'G': 4}, ['H=2', 'G=4', 'divide']),
    ({'family': 'transformer', 'K': 5}, ['head width 5', 'even']),
    ({'family': 'hope_attention', 'D': 6, 'H': 2}, ['head width 3', 'even']),
  ],
)
def test_sizes_that_do_not_fit_are_refused(values, words):
  refuses(values, 'model: ', *words)


@pytest.mark.parametrize(
  'values,words',
  [
    ({'chunk_mem': 0}, ['chunk_mem=0', 'at least 1']),
    ({'chunk_mem': 6, 'chunk_rest': 4}, ['chunk_mem=6', 'chunk_rest=4']),
    ({'depth_mem': 3}, ['depth_mem=3', '1 or 2']),
    ({'depth_rest': 0}, ['depth_rest=0', '1 or 2']),
    ({'read': 'chunk'}, ["read='chunk'", 'token', 'boundary']),
    ({'anchor': 'one'}, ["anchor='one'", 'initial', 'zero']),
    ({'objective': 'l1'}, ["objective='l1'", 'l2', 'dot']),
    ({'adaptive': ('k', 'mem')}, ['adaptive', "['mem']", 'alpha']),
    ({'identity': ('eta',)}, ['identity', "['eta']", 'mem']),
    ({'generated': False}, ['generated=False', 'eta', 'alpha']),
    ({'given': ('mem',)}, ['given', "['mem']", 'alpha']),
    ({'given': ('eta',)}, ["given=('eta',)", 'adaptive', 'no memory']),
    (
      {'given': ('alpha',), 'adaptive': (), 'retention': False},
      ["given=('alpha',)", 'retention=False', 'no alpha'],
    ),
    ({'expansion': 0}, ['expansion=0', 'at least 1']),
    ({'stride': 0}, ['stride=0', 'at least 1']),
    ({'stride': -4}, ['stride=-4', 'at least 1']),
    ({'eta_max': 0}, ['eta_max=0.0', 'above 0']),
    ({'eta_max': 1.5}, ['eta_max=1.5', 'at most 1']),
    ({'eta_max': float('nan')}, ['eta_max=nan']),
  ],
)
def test_a_memory_that_does_not_fit_is_refused(values, words):
  refuses({'memory': values}, 'model.memory: ', *words)


@pytest.mark.parametrize(
  'cms,words',
  [
    ({'periods': (128, 200)}, ['[128, 200]', '200', '128', 'multiple']),
    ({'periods': (128, 128)}, ['[128, 128]', 'larger multiple']),
    ({'periods': (512, 128)}, ['[512, 128]', 'fastest first']),
    ({'periods': (-8,)}, ['period -8', '0 (never) or more']),
    ({'periods': ()}, ['periods=()', 'at least one level']),
    ({'multiple': 0}, ['multiple=0', 'at least 1']),
    ({'multiple': 200}, ['F=384', '3 levels', '200', 'at least 600']),
  ],
)
def test_levels_that_do_not_fit_are_refused(cms, words):
  refuses({'cms': cms}, 'model: ', *words)


def test_a_level_without_width_is_refused():
  with pytest.raises(ValueError, match='hidden width 0.*at least 1'):
    Schedule((Level(8, 0),))


CONFIGS = {
  'default': ModelConfig(),
  'plain': ModelConfig('transformer', D=24, H=3, G=1, F=7, window=9),
  'nested': ModelConfig(
    memory=MemoryConfig(8, 4, depth_mem=2, adaptive=('q', 'eta'), eta_max=1.0),
    cms=CMSConfig((4, 0), multiple=1),
    tied=False,
  ),
}


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('mapping', [dict, ml_collections.ConfigDict])
def test_a_config_comes_back_from_its_mapping(name, mapping):
  cfg = CONFIGS[name]
  again = ModelConfig.from_dict(mapping(dataclasses.asdict(cfg)))
  assert again == cfg
  assert hash(again) == hash(cfg)


def test_a_list_becomes_a_tuple_and_an_int_a_float():
  cfg = ModelConfig.from_dict(
    {'rope_base': 500, 'cms': {'periods': [4, 8]}, 'memory': MemoryConfig()}
  )
  assert cfg.cms.periods == (4, 8)
  assert type(cfg.rope_base) is float
  hash(cfg)


def test_head_widths_and_heads_follow_from_the_rest_if_zero():
  cfg = ModelConfig(D=24, H=4)
  assert (cfg.head_width, cfg.kv_heads) == (6, 4)
  cfg = ModelConfig(D=25, H=4, K=8, G=2)
  assert (cfg.head_width, cfg.kv_heads) == (8, 2)


def test_a_transformer_has_one_level_that_never_commits():
  cfg = ModelConfig('transformer', F=10, cms=CMSConfig((3, 5)))
  assert cfg.schedule == Schedule((Level(0, 10),))


@pytest.mark.parametrize('F', [24, 25, 100, 384, 1001])
@pytest.mark.parametrize('periods', [(4,), (4, 8), (4, 8, 0)])
def test_levels_together_have_the_width_of_one_mlp(F, periods):
  levels = split_width(F, periods, 8).levels
  assert tuple(level.period for level in levels) == periods
  assert sum(level.F for level in levels) == F
  assert all(level.F % 8 == 0 for level in levels[:-1])
  assert levels[-1].F >= levels[0].F
  assert levels[-1].F - levels[0].F < 8 * len(periods)


def test_a_width_one_short_of_the_levels_is_refused():
  assert [level.F for level in split_width(16, (4, 8), 8).levels] == [8, 8]
  with pytest.raises(ValueError, match=re.escape('F=15')):
    split_width(15, (4, 8), 8)
