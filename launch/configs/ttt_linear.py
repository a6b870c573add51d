"""TTT-Linear, mini-batches of 16 tokens, at a size.

`nestax-train --config=ttt_linear:340m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import sizes

# hidden widths that make the parameters those of the Transformer of that size
F = {'30m': 1280, '135m': 2112, '340m': 2368, '760m': 3776, '1_3b': 4928}


def get_config(size: str = '30m'):
  config = sizes.config('ttt_linear', size)
  config.model.F = F[size]
  config.model.memory.chunk_mem = 16
  config.model.memory.eta_max = 1.0
  config.model.memory.chunk_rest = config.model.memory.chunk_mem
  return config
