"""Metrics: no step twice, nothing lost, JSON that any reader takes."""

import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from nestax.launch import metrics
from nestax.models.telemetry import Telemetry


def write(workdir, after, steps):
  workdir.mkdir(exist_ok=True)
  log = metrics.Log(workdir, after)
  for step in steps:
    log.write(step, 'train', {'loss': 1.0 / step, 'bits_per_byte': 2.0})
    if step % 2 == 0:
      log.write(step, 'valid', {'loss': 2.0 / step, 'bits_per_byte': 3.0})
  log.sync()
  log.close()
  return metrics.read(workdir / 'metrics.jsonl')


def test_a_resumed_run_writes_no_step_twice(tmp_path):
  whole = write(tmp_path / 'whole', 0, range(1, 9))
  write(tmp_path / 'cut', 0, range(1, 7))
  assert write(tmp_path / 'cut', 4, range(5, 9)) == whole


def test_a_row_cut_short_is_left_out(tmp_path):
  write(tmp_path, 0, range(1, 4))
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "spl')
  assert [row['step'] for row in write(tmp_path, 4, [5])] == [1, 2, 2, 3, 5]


def test_a_fresh_run_starts_a_fresh_file(tmp_path):
  write(tmp_path, 0, range(1, 4))
  assert [row['step'] for row in write(tmp_path, 0, [1])] == [1]


def test_what_is_not_finite_is_null(tmp_path):
  log = metrics.Log(tmp_path, 0)
  log.write(1, 'train', {'loss': math.nan, 'grad_norm': math.inf})
  log.close()
  text = (tmp_path / 'metrics.jsonl').read_text()
  row = json.loads(text, parse_constant=pytest.fail)
  assert row == {'step': 1, 'split': 'train', 'loss': None, 'grad_norm': None}


def events(workdir):
  """(step, tag) of every number in the TensorBoard files, in order."""
  found = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
      end = 12 + struct.unpack('<Q', data[:8])[0]
      event = event_pb2.Event.FromString(data[12:end])
      found += [(event.step, value.tag) for value in event.summary.value]
      data = data[end + 4 :]
  return found


def test_tensorboard_has_the_same_numbers(tmp_path):
  rows = write(tmp_path, 0, range(1, 5))
  assert events(tmp_path) == [
    (row['step'], f'{row["split"]}/{name}')
    for row in rows
    for name in ('loss', 'bits_per_byte')
  ]


def test_only_the_writing_process_leaves_files(tmp_path):
  log = metrics.Log(tmp_path / 'run', 0, write=False)
  log.write(1, 'valid', {'loss': 1.0})
  log.sync()
  log.close()
  assert log.last('valid', 1)['loss'] == 1.0 and log.last('valid', 2) is None
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'kind, flops',
  [
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA A100-SXM4-40GB', 312e12),
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5p', 459e12),
    ('TPU v5', 459e12),
    ('TPU v6 lite', 918e12),
    ('cpu', None),
  ],
)
def test_peaks_are_those_of_the_makers(kind, flops):
  assert metrics.peak_flops(kind) == flops


def test_speed_leaves_out_what_is_not_training(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
  speed = metrics.Speed(tokens=100, flops=6.0, peak=1200.0)
  assert speed.read(1) == {} == speed.total()
  now[0] = 50.0  # compilation
  speed.start(1)
  assert speed.read(1) == {}
  now[0] = 52.0
  assert speed.read(3) == {'tokens_per_second': 100.0, 'mfu': 0.5}
  now[0] = 80.0  # evaluation
  speed.start(3)
  now[0] = 81.0
  assert speed.read(5)['tokens_per_second'] == 200.0
  assert speed.total()['tokens_per_second'] == pytest.approx(400 / 3)


def test_what_levels_did_is_named_and_averaged():
  said = [
    Telemetry([4.0, 1.0], [0.5, 0.25], [2.0, 1.0], 3.0, 6),
    # the last batch, half of it padding
    Telemetry([1.0, 1.0], [2.0, 1.0], [5.0, 2.5], 6.0, 3),
  ]
  rates = np.array([0.1, 0.4]), np.array([0.3])
  got = metrics.of_levels(said, rates)
  assert got == pytest.approx(
    {
      'surprise': 4.0,
      'level_0_commits': 3.0,
      'level_0_moved': 1.0,
      'level_0_size': 3.0,
      'level_0_rate': 0.2,
      'level_1_commits': 1.0,
      'level_1_moved': 0.5,
      'level_1_size': 1.5,
      'level_1_rate': 0.3,
    }
  )
  assert metrics.of_levels(said, ()) == {}
