"""A small Hope learns the standard library's source text, byte by byte.

Runs some five minutes on two CPU cores and ends below the bigram entropy of
the validation bytes: `nestax-train`.
"""

from nestax.launch.configs import common


def get_config():
  config = common.defaults()
  config.name = 'quickstart'
  config.model.dtype = 'float32'
  config.train.steps = 300
  config.opt.warmup = 30
  config.checkpoint.every = 100
  config.eval.every = 100
  return config
