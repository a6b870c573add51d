"""Transformer++ of 135 million parameters, 5.2 billion tokens of 4096 a row.

`nestax-train --config=transformer_135m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import common


def get_config():
  config = common.defaults()
  config.name = 'transformer_135m'
  config.model.family = 'transformer'
  config.model.V = 32_000
  config.model.D = 768
  config.model.N = 14
  config.model.H = 12
  config.model.F = 2368
  config.model.remat = 'kernels'
  config.data.length = 4096
  config.data.workers = 4
  config.train.steps = 10_000
  config.train.batch = 128
  config.opt.lr = 8e-4
  config.opt.warmup = 500
  config.checkpoint.every = 1000
  config.eval.every = 1000
  return config
