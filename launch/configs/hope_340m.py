"""Hope of 340 million parameters, 14.7 billion tokens of 4096 a row.

`nestax-train --config=hope_340m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import common


def get_config():
  config = common.defaults()
  config.name = 'hope_340m'
  config.model.family = 'hope'
  config.model.V = 32_000
  config.model.D = 1024
  config.model.N = 24
  config.model.H = 16
  config.model.F = 2304
  config.model.cms.multiple = 64
  config.model.remat = 'kernels'
  config.data.length = 4096
  config.data.workers = 4
  config.train.steps = 28_000
  config.train.batch = 128
  config.mesh.fsdp = 0  # of a model too large to lie whole on each device
  config.opt.lr = 6e-4
  config.opt.warmup = 1_400
  config.checkpoint.every = 1000
  config.eval.every = 1000
  return config
