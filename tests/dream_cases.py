"""Tables that dream, and a task for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import sleep_cases

from nestax.sleep import dream, grow, task
from nestax.sleep.dream import DreamConfig

W = 5  # words of the tables
BOS = 4
CFG = DreamConfig(
  dreams=12, top=4, random=2, length=8, answer=3, inner_rate=0.3, steps=12,
  rate=0.1,
)  # fmt: skip


@dataclasses.dataclass
class After:
  """After 0 comes 1: all that a user has to write."""

  answer: int = 1
  before: tuple = (BOS, 3)

  def context(self):
    return self.before

  def questions(self):
    return [([BOS, 0], [self.answer]), ([0], [self.answer])]


def add(params, trained):
  return params + trained


def same(params, key):
  del key
  return params


def made(cfg=CFG, disturb=same):
  return dream.programs(cfg, sleep_cases.table_reader(), add, disturb, BOS)


def table(seed=0):
  return jax.random.normal(jax.random.key(seed), (W, W)).at[:, BOS].set(-9.0)


def prompt():
  return task.prompt_row(After(), CFG.length)


@functools.cache
def slotted():
  """A model with one used slot, one that is hidden and one that is empty."""
  cfg = sleep_cases.config(blocks='1', slots=3, rank=2)
  params = sleep_cases.params_of(cfg)
  for k in (0, 1):
    for index in (0, 1):
      params, _ = grow.grow(cfg, params, k)
      new = grow.take(cfg, params, k, index)
      new = new._replace(b_nxRxD=jnp.ones_like(new.b_nxRxD) * 0.1)
      params = grow.put(cfg, params, k, index, new)
    own = grow.slots(cfg, params, k)
    active = own.active_S.at[:, 1].set(0.0)
    params = grow.replace(cfg, params, k, own._replace(active_S=active))
  return cfg, params
