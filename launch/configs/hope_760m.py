"""Hope of 760 million parameters, 29.9 billion tokens of 4096 a row.

`nestax-train --config=hope_760m --config.data.source=jsonl
--config.data.path='corpus/*.jsonl' --config.data.tokenizer=tokenizer.json`
"""

from nestax.launch.configs import common


def get_config():
  config = common.defaults()
  config.name = 'hope_760m'
  config.model.family = 'hope'
  config.model.V = 32_000
  config.model.D = 1536
  config.model.N = 24
  config.model.H = 12
  config.model.F = 3840
  config.model.cms.multiple = 64
  config.model.remat = 'dots'
  config.data.length = 4096
  config.data.workers = 4
  config.train.steps = 57_000
  config.train.batch = 128
  config.mesh.fsdp = 0  # of a model too large to lie whole on each device
  config.opt.lr = 4e-4
  config.opt.warmup = 2_000
  config.checkpoint.every = 1000
  config.eval.every = 1000
  return config
