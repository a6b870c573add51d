"""DeltaNet, at a size: 30m, 135m, 340m, 760m or 1_3b.

`nestax-train --config=deltanet:340m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import sizes

# hidden widths that make the parameters those of the Transformer of that size
F = {'30m': 1408, '135m': 2368, '340m': 2752, '760m': 4352, '1_3b': 5632}


def get_config(size: str = '30m'):
  config = sizes.config('deltanet', size)
  config.model.F = F[size]
  return config
