"""Transformer++ of 30 million parameters, 1.3 billion tokens of 2048 a row.

`nestax-train --config=transformer_30m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import common


def get_config():
  config = common.defaults()
  config.name = 'transformer_30m'
  config.model.family = 'transformer'
  config.model.V = 32_000
  config.model.D = 384
  config.model.N = 8
  config.model.H = 6
  config.model.F = 1408
  config.model.remat = 'none'
  config.data.length = 2048
  config.data.workers = 4
  config.train.steps = 10_000
  config.train.batch = 64
  config.opt.lr = 1e-3
  config.opt.warmup = 500
  config.checkpoint.every = 1000
  config.eval.every = 1000
  return config
