"""Titans with memory as layer below attention over 512 tokens, at a size.

`nestax-train --config=titans_mal:340m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import sizes

# hidden widths that make the parameters those of the Transformer of that size
F = {'30m': 576, '135m': 896, '340m': 832, '760m': 1408, '1_3b': 1856}


def get_config(size: str = '30m'):
  config = sizes.config('titans_mal', size)
  config.model.F = F[size]
  config.model.persistent = 16
  config.model.window = 512
  config.model.memory.chunk_mem = 16
  config.model.memory.depth_mem = 2
  config.model.memory.chunk_rest = config.model.memory.chunk_mem
  return config
