"""Titans with memory as gate of attention over 512 tokens, at a size.

`nestax-train --config=titans_mag:340m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import sizes

# hidden widths that make the parameters those of the Transformer of that size
F = {'30m': 832, '135m': 1408, '340m': 1536, '760m': 2432, '1_3b': 3200}


def get_config(size: str = '30m'):
  config = sizes.config('titans_mag', size)
  config.model.F = F[size]
  config.model.persistent = 16
  config.model.window = 512
  config.model.memory.chunk_mem = 16
  config.model.memory.depth_mem = 2
  config.model.memory.chunk_rest = config.model.memory.chunk_mem
  return config
