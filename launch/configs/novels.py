"""A byte-level Hope-Attention for novels; its last block learns as it reads.

`nestax-train --config=novels --config.data.path='books/*.txt'`, or, with no,
one, two and three learning levels beside each other,
`python -m nestax.launch.evals.levels --config.data.path='books/*.txt'
--novel=another.txt`.
"""

from nestax.launch.configs import common


def get_config():
  config = common.defaults()
  config.name = 'novels'
  config.model.family = 'hope_attention'
  config.model.D = 256
  config.model.N = 4
  config.model.H = 4
  config.model.F = 768
  config.model.cms.blocks = 'last_quarter'
  config.model.remat = 'full'
  config.data.source = 'text'
  config.data.length = 4096
  config.train.steps = 600
  config.optimizer = 'adamw'  # what the table in BUILD_NOTES.md is from
  config.opt.lr = 2e-3
  config.checkpoint.every = 0
  config.eval.every = 200
  return config
