"""What a run shows: the right lines at the right steps."""

import pytest

from nestax.launch import progress

NUMBERS = {'loss': 1.5, 'bits_per_byte': 2.25}


def test_a_line_comes_every_so_many_steps_and_at_the_end(capsys):
  shown = progress.show(done=4, steps=9, every=3)
  for step in range(5, 10):
    shown.update(step, NUMBERS)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines] == ['6/9', '9/9']
  assert all('loss 1.5000  2.2500 bits/byte' in line for line in lines)


def test_the_time_left_counts_from_the_first_step(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'perf_counter', lambda: now[0])
  shown = progress.Lines(steps=13, every=1)
  now[0] = 1000.0  # compilation
  shown.update(1, NUMBERS)
  now[0] = 1060.0
  shown.update(3, NUMBERS | {'tokens_per_second': 1234.5, 'mfu': 0.25})
  first, second = capsys.readouterr().out.splitlines()
  assert 'left' not in first
  assert second.endswith('1,234 tokens/s  MFU 25.0%  5:00 left')


def test_skipped_steps_are_shown(capsys):
  progress.Lines(steps=2, every=1).update(1, NUMBERS | {'skipped': 3.0})
  assert '3 skipped' in capsys.readouterr().out


def test_the_bar_keeps_the_last_speed_and_what_is_said(capsys):
  bar = progress.Bar(done=0, steps=3)
  assert bar._bar.tasks[0].fields['words'] == 'compiling'
  bar.update(1, NUMBERS | {'tokens_per_second': 1000.0})
  bar.update(3, NUMBERS)
  bar.say('[saved]')
  bar.close()
  out = capsys.readouterr().out
  assert '3/3' in out and '1,000 tokens/s' in out and '[saved]' in out


@pytest.mark.parametrize(
  'seconds, words', [(7.4, '0:07'), (75, '1:15'), (4000, '1:06:40')]
)
def test_times_are_written_as_clocks_do(seconds, words):
  assert progress.clock(seconds) == words
