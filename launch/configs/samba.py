"""Samba: Mamba-2 and attention over 512 tokens in turn, at a size.

`nestax-train --config=samba:340m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import sizes

# hidden widths that make the parameters those of the Transformer of that size
F = {'30m': 1344, '135m': 2240, '340m': 2560, '760m': 4096, '1_3b': 5312}


def get_config(size: str = '30m'):
  config = sizes.config('samba', size)
  config.model.F = F[size]
  config.model.N //= 2  # each of its blocks is two of the others
  config.model.window = 512
  return config
