"""The sizes at which families are compared: those of the Transformers.

The family of a config at a size differs from `transformer_<size>` in the mixer
and, to have as many parameters, in the hidden width of its MLPs.
"""

import ml_collections

from nestax.launch.configs import (
  transformer_1_3b,
  transformer_30m,
  transformer_135m,
  transformer_340m,
  transformer_760m,
)

TRANSFORMERS = {
  '30m': transformer_30m,
  '135m': transformer_135m,
  '340m': transformer_340m,
  '760m': transformer_760m,
  '1_3b': transformer_1_3b,
}


def config(family: str, size: str) -> ml_collections.ConfigDict:
  """The Transformer's config of a size, under the name of another family.

  Raises:
    ValueError: for a size that is none.
  """
  if size not in TRANSFORMERS:
    raise ValueError(
      f'--config={family}:{size}: no such size; there are '
      f'{", ".join(TRANSFORMERS)}'
    )
  made = TRANSFORMERS[size].get_config()
  made.name = f'{family}_{size}'
  made.model.family = family
  return made
