"""Every packaged config: complete, valid, and of the size in its name."""

import importlib
import pathlib

import pytest

from nestax.launch import configs
from nestax.launch.configs import common
from nestax.models import language_model
from nestax.models.config import ModelConfig

NAMES = sorted(
  {p.stem for p in pathlib.Path(configs.__file__).parent.glob('*.py')}
  - {'__init__', 'common'}
)
SIZES = {
  '30m': 30e6,
  '135m': 135e6,
  '340m': 340e6,
  '760m': 760e6,
  '1_3b': 1.3e9,
}


def load(name):
  return importlib.import_module(f'nestax.launch.configs.{name}').get_config()


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_valid_and_carries_its_own_name(name):
  config = load(name)
  common.check(config)
  ModelConfig.from_dict(config.model)
  assert config.name == name
  assert config.is_locked


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('family', ['hope', 'transformer'])
def test_parameter_count_is_within_3_percent_of_the_name(family, size):
  config = load(f'{family}_{size}')
  assert config.model.family == family
  count = language_model.parameter_count(ModelConfig.from_dict(config.model))
  print(f'{config.name}: {count:,}')
  assert abs(count / SIZES[size] - 1) < 0.03, f'{count:,}'
