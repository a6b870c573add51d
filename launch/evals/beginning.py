"""Where MAD's models begin: small embeddings, and small linear maps.

github.com/athms/mad-lab draws all embeddings with a standard deviation of 0.02,
and those of its autoencoder's linear maps with it; families here begin with
1 / sqrt(D), as language models that are trained on text do. It decides how much
is learned of a map of few rows, and what the last token alone can hold: the
smaller linear maps begin, the more keys of 4,096 are said right after 400 steps
(BUILD_NOTES.md). The head is left as it is, smaller still.
"""

import re
from collections.abc import Callable

import jax

from nestax.launch.evals import problems
from nestax.models.config import ModelConfig
from nestax.optim import labels

_EMBEDDING = re.compile(r'.*embedding')
# projections and MLPs; gates per head, convolutions and what a memory begins
# with are families' own
_LINEAR = re.compile(
  r'.*embedding|decoder/.*kernel|.*(level_\d+|between)/(gate|up|down)'
  r'|.*/((memory_)?(query|key|value)|gate|out|mix|recall)/kernel'
)


def small(
  make: Callable[[ModelConfig], problems.Net], std: float, linear: bool
) -> Callable[[ModelConfig], problems.Net]:
  """`make` with embeddings that begin with a standard deviation.

  Args:
    make: what a config is trained as.
    std: of embeddings before training; they are scaled to it.
    linear: the kernels of projections, MLPs and a decoder as well.
  """
  chosen = _LINEAR if linear else _EMBEDDING

  def scaled(path, x):
    began = chosen.fullmatch(labels.path_of(path))
    return x * (std / x.std()) if began else x

  def begun(cfg: ModelConfig) -> problems.Net:
    net = make(cfg)

    def init(key, tokens_BxL):
      drawn = net.init(key, tokens_BxL)
      return jax.tree_util.tree_map_with_path(scaled, drawn)

    return problems.Net(init, net.apply)

  return begun
