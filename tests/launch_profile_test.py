"""A trace of the steps asked for, and of no others."""

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from nestax.launch import profile


def train(workdir, done=0, last=4, **config):
  """Makes steps as the loop does; gives what was said."""
  said = []
  group = ml_collections.ConfigDict(config)
  traced = profile.Profile(group, workdir, done, said.append)
  step = jax.jit(lambda x: x + 1)
  x = jnp.zeros(())
  for number in range(done + 1, last + 1):
    with traced.step(number):
      x = step(x)
    traced.after(number, x)
  traced.close()
  return said


@pytest.mark.parametrize('steps', [1, 2, 9])
def test_the_steps_asked_for_are_traced(tmp_path, steps):
  said = train(tmp_path, start=3, steps=steps)
  assert said == [f'profile: steps from 3 on in {tmp_path / "profile"}']
  (trace,) = tmp_path.rglob('*.xplane.pb')
  numbers = {
    stat[1]
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
    for line in plane.lines
    for event in line.events
    if event.name == 'train'
    for stat in event.stats
    if stat[0] == 'step_num'
  }
  assert numbers == set(range(3, min(3 + steps, 5)))


def test_nothing_is_traced_unless_asked_for(tmp_path):
  assert train(tmp_path, start=1, steps=0) == []
  (said,) = train(tmp_path, done=3, start=3, steps=1)
  assert 'step 3 was made before (step 3 is done)' in said
  assert not list(tmp_path.iterdir())
