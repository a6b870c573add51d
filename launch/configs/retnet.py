"""RetNet, at a size: 30m, 135m, 340m, 760m or 1_3b.

`nestax-train --config=retnet:340m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import sizes

# hidden widths that make the parameters those of the Transformer of that size
F = {'30m': 1280, '135m': 2112, '340m': 2432, '760m': 3840, '1_3b': 4928}


def get_config(size: str = '30m'):
  config = sizes.config('retnet', size)
  config.model.F = F[size]
  return config
