"""Best rates by width: what is varied, where the best lies, what is written."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from nestax.launch import optimizer
from nestax.launch.evals import widths

PARAMS = {
  'blocks': {'level_0': {'up': jnp.ones((1, 8, 24))}},
  'embed': {'embedding': jnp.ones((16, 8))},
}


def make_config(rms):
  opt = optimizer.default_opt() | {
    'lr': 1.0,
    'warmup': 1,
    'consistent_rms': rms,
  }
  return ml_collections.ConfigDict(
    {'optimizer': 'm3', 'opt': opt, 'train': {'steps': 20}}
  )


def first_update(rms, rate):
  tx = widths.make(make_config(rms), PARAMS, rest=0.5)(rate)
  return jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])(PARAMS)


def test_the_rate_is_that_of_the_matrices_alone():
  a, b = first_update(0.2, 0.01), first_update(0.2, 0.03)
  up = [x['blocks']['level_0']['up'] for x in (a, b)]
  np.testing.assert_allclose(up[1], 3 * up[0], rtol=1e-5)
  for x in (a, b):
    # AdamW's first step is as long as its rate
    np.testing.assert_allclose(x['embed']['embedding'], -0.5, rtol=1e-3)


@pytest.mark.parametrize('width', [32, 64])
def test_configs_differ_in_width_and_form_alone(width):
  a, b = (widths.make_config(width, rms, 50) for rms in (0.2, 0.0))
  assert a.model.D == width and a.model.F == 3 * width
  a.opt.consistent_rms = 0.0
  assert a.to_dict() == b.to_dict()


def test_the_parabola_finds_the_best_rate_in_the_log():
  rates = [0.01 * 2**i for i in range(5)]
  means = [(np.log(rate / 0.03)) ** 2 for rate in rates]
  np.testing.assert_allclose(widths.optimum(rates, means), 0.03, rtol=1e-6)
  assert widths.optimum(rates, [1, 2, 3, 4, 5]) == rates[0]
  assert widths.optimum(rates, [2, 1, np.nan, 3, 3]) == rates[1]


def rows_of(means):
  return [
    {'rate': rate, 'seed': seed, 'step': 9, widths.FIGURE: mean + 0.1 * seed}
    for rate, mean in means.items()
    for seed in (0, 1)
  ]


def test_the_table_says_what_a_rate_of_another_width_costs():
  words = widths.table(
    {
      ('plain', 8): rows_of({0.1: 1.0, 0.2: 2.0, 0.4: 3.0}),
      ('plain', 16): rows_of({0.1: 2.5, 0.2: 1.5, 0.4: 2.5}),
    }
  )
  narrow, wide = words.splitlines()[2:]
  assert narrow.endswith('| 0.1 (edge) | 0.071 | 0.1 | 0.000 |')
  assert wide.endswith('| 0.2 | 0.071 | 0.2 | 1.000 |')


def test_cells_are_measured_once(tmp_path, monkeypatch, capsys):
  seen = []

  def measure(config, rates, rest, seeds):
    seen.append((config.model.D, config.opt.consistent_rms))
    return rows_of({rate: 1.0 for rate in rates})

  monkeypatch.setattr(widths, 'measure', measure)
  line = ['widths', '--widths=8,16', f'--workdir={tmp_path}']
  widths.FLAGS(line)
  assert widths.main(['widths']) == 0 == widths.main(['widths'])
  assert seen == [(8, 0.2), (16, 0.2), (8, 0.0), (16, 0.0)]
  assert (tmp_path / 'table.md').read_text() in capsys.readouterr().out
  widths.FLAGS([*line, '--steps=300'])
  assert widths.main(['widths']) == 2
  assert 'another workdir' in capsys.readouterr().err
  widths.FLAGS([*line, '--widths=7'])
  assert widths.main(['widths']) == 2
  assert "'7' is no width" in capsys.readouterr().err
