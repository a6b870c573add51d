"""A model made in two minutes that can read and answer, and knows some people.

It has learned the facts of people of its own world, in all wordings and
questions that there are, so it knows what a name, a statement and a question
are. Of the people it will be taught about later it has read nothing.
"""

import pathlib
import random
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestax.launch.data.tokenizers import Tokenizer
from nestax.launch.evals import facts
from nestax.models import language_model
from nestax.models.config import ModelConfig

WORLD = 1_000  # the seed of its people, of whom the tests know nobody
_LENGTH, _ROWS = 64, 32
_GROUPS = 8
_CORE = 7  # one line of so many is of the core set; wordings repeat after 8, 3


class Pupil(NamedTuple):
  """The model, and texts about what it knows."""

  cfg: ModelConfig
  params: dict
  tokenizer: Tokenizer
  core: np.ndarray  # int32 `[n, L]`, of its world, of lines kept for it


def texts(
  tokenizer: Tokenizer,
  rows: int,
  seed: int,
  groups: int = _GROUPS,
  core: bool | None = None,
):
  """Statements and answered questions about its world, rows of tokens.

  Args:
    tokenizer: of facts.
    rows: how many.
    seed: of their order.
    groups: of people.
    core: of the core set's lines alone, or of none of them; None for all.
  """
  known = [f for day in facts.days(WORLD, groups) for f in day]
  lines = [fact.statement(i) for fact in known for i in range(8)]
  lines += [q + f.candidates[0] for f in known for q in f.questions]
  lines = [
    tokenizer.encode(f'{line}\n')
    for i, line in enumerate(lines)
    if core is None or core == (i % _CORE == 0)
  ]
  rng, out = random.Random(f'nestax pupil {seed}'), []
  for _ in range(rows):
    row = [tokenizer.bos]
    while len(row) < _LENGTH:
      row += rng.choice(lines)
    out.append(row[:_LENGTH])
  return np.array(out, np.int32)


def make(
  steps: int = 500,
  groups: int = _GROUPS,
  D: int = 96,
  N: int = 2,
  seed: int = 0,
) -> Pupil:
  """Trains it.

  Args:
    steps: updates of 32 rows of 64 tokens.
    groups: of eight people that it gets to know.
    D: width.
    N: blocks.
    seed: of its first weights.
  """
  tokenizer = facts.tokenizer()
  cfg = ModelConfig(
    family='transformer',
    V=tokenizer.vocab_size,
    D=D,
    N=N,
    H=4,
    F=8 * D // 3,
    dtype='float32',
  )
  model = language_model.LanguageModel(cfg)
  first = jnp.zeros((1, 8), jnp.int32)
  params = nn.unbox(model.init(jax.random.key(seed), None, first)['params'])
  warm = steps // 10 + 1
  rate = optax.warmup_cosine_decay_schedule(0, 3e-3, warm, steps + warm + 1)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.05)
  )

  @jax.jit
  def step(params, opt_state, rows_BxL):
    def loss(params):
      _, logits = model.apply({'params': params}, None, rows_BxL[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, rows_BxL[:, 1:]
      ).mean()

    grads = jax.grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  data = texts(tokenizer, 4_000, 0, groups)
  rng, opt_state = np.random.default_rng(seed), tx.init(params)
  for _ in range(steps):
    rows = data[rng.integers(0, len(data), _ROWS)]
    params, opt_state = step(params, opt_state, rows)
  core = texts(tokenizer, 32, 1, groups, core=True)
  return Pupil(cfg, params, tokenizer, core)


def kept(path: pathlib.Path, **options) -> Pupil:
  """The pupil in a file, made and put there if there is none."""
  if not path.exists():
    pupil = make(**options)
    leaves = map(np.asarray, jax.tree.leaves(pupil.params))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix('.tmp.npz')
    np.savez(fresh, **{f'{i:03d}': x for i, x in enumerate(leaves)})
    fresh.replace(path)
    return pupil
  pupil = make(**options | {'steps': 0})
  with np.load(path) as file:
    leaves = [jnp.asarray(file[name]) for name in sorted(file.files)]
  tree = jax.tree.structure(pupil.params)
  return pupil._replace(params=jax.tree.unflatten(tree, leaves))
