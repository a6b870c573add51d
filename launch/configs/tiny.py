"""The smallest Hope that still learns; a minute on a laptop.

`nestax-train --config=tiny`
"""

from nestax.launch.configs import common


def get_config():
  config = common.defaults()
  config.name = 'tiny'
  config.model.dtype = 'float32'
  config.model.D = 64
  config.model.F = 192
  config.data.length = 256
  config.data.valid_batches = 4
  config.train.steps = 300
  config.opt.lr = 0.012
  config.opt.warmup = 30
  config.checkpoint.every = 100
  config.eval.every = 100
  return config
