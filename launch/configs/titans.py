"""Titans' neural memory (LMM) of two layers, at a size.

`nestax-train --config=titans:340m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import sizes

# hidden widths that make the parameters those of the Transformer of that size
F = {'30m': 1088, '135m': 1920, '340m': 2240, '760m': 3456, '1_3b': 4608}


def get_config(size: str = '30m'):
  config = sizes.config('titans', size)
  config.model.F = F[size]
  config.model.memory.chunk_mem = 16
  config.model.memory.depth_mem = 2
  config.model.memory.chunk_rest = config.model.memory.chunk_mem
  return config
