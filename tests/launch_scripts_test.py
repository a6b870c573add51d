"""The launch scripts, against stand-ins of the commands that they call."""

import os
import pathlib
import subprocess

import pytest

pytestmark = pytest.mark.source

SCRIPTS = pathlib.Path(__file__).parents[1] / 'launch' / 'scripts'
# Words that a shell on the way would tear apart, or expand.
GIVEN = [
  '--config=tiny',
  '--config.data.path=/a b/*.txt',
  '--config.name=$HOME',
]
# Each writes its arguments to a file of its name, one a line; what a host is
# to run, it runs.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$SAID/$(basename "$0")"
case "$(basename "$0") $*" in
  *'describe'*) [ -e "$SAID/asked" ] && echo ACTIVE || exit 1 ;;
  *'create'*--node-id*) touch "$SAID/asked" ;;
esac
for word; do
  case $word in --command=*) bash -c "${word#--command=}"; exit $? ;; esac
done
if [ "$(basename "$0")" = srun ]; then
  while [ "$1" != nestax-train ]; do shift; done
  "$@"
  exit $?
fi
if [ "$(basename "$0")" = nestax-train ]; then
  n=$(cat "$SAID/codes" | wc -l)
  read -r code < <(tail -n 1 "$SAID/codes")
  head -n $((n - 1)) "$SAID/codes" >"$SAID/rest"; mv "$SAID/rest" "$SAID/codes"
  exit "$code"
fi
"""
COMMANDS = (
  *('gcloud', 'xpk', 'srun', 'scontrol', 'nestax-train'),
  *('sudo', 'mountpoint', 'pip', 'sleep', 'python3'),
)


@pytest.fixture
def call(tmp_path):
  """Runs a script; gives its exit code and what each command was told."""
  for name in COMMANDS:
    (tmp_path / name).write_text(STAND_IN)
    (tmp_path / name).chmod(0o755)
  said = tmp_path / 'said'
  said.mkdir()
  home = tmp_path / 'home'
  (home / 'nestax' / 'bin').mkdir(parents=True)
  (home / 'nestax' / 'bin' / 'activate').write_text('')

  def run(script, codes, **environment):
    (said / 'codes').write_text(''.join(f'{code}\n' for code in codes[::-1]))
    paths = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HOME': str(home)}
    done = subprocess.run(
      [SCRIPTS / script, *GIVEN],
      env=os.environ | environment | paths | {'SAID': str(said)},
      capture_output=True,
      text=True,
      timeout=60,
    )
    told = {path.name: path.read_text().splitlines() for path in said.iterdir()}
    return done, told

  return run


TPU = {'PROJECT': 'p', 'ZONE': 'z', 'SHARE': '10.0.0.2:/r', 'HOSTS': '4'}


def test_a_pod_is_asked_for_and_every_host_trains_until_it_is_done(call):
  done, told = call('tpu_pod.sh', [134, 0], SOURCE='/mnt/runs/n.whl', **TPU)
  assert done.returncode == 0, done.stderr
  assert '--accelerator-type=v5litepod-256' in told['gcloud']
  assert told['pip'] == ['install', '-q', '/mnt/runs/n.whl[tpu]']
  want = ['--distributed', '--workdir=/mnt/runs/nestax']
  want += ['--config.data.shards=4', *GIVEN]
  assert told['nestax-train'] == 2 * want  # once more after the 134


def test_a_pod_does_not_try_again_what_is_wrong(call):
  source = 'git+https://example.com/n'
  done, told = call('tpu_pod.sh', [2, 0], SOURCE=source, **TPU)
  assert done.returncode == 2 and told['codes'] == ['0']
  assert told['pip'][-1] == f'nestax[tpu] @ {source}'


def test_xpk_hands_the_command_on(call):
  extra = {'CLUSTER': 'c', 'IMAGE': 'i', 'PROJECT': 'p', 'ZONE': 'z'}
  done, told = call('xpk.sh', [0], HOSTS='8', **extra)
  assert done.returncode == 0, done.stderr
  assert told['xpk'][:2] == ['workload', 'create']
  assert '--max-restarts=50' in told['xpk']
  want = ['--distributed', '--workdir=/mnt/runs/nestax']
  assert told['nestax-train'] == [*want, '--config.data.shards=8', *GIVEN]


@pytest.mark.parametrize('code', [0, 1, 143])
def test_slurm_queues_again_what_was_stopped_in_time(call, code):
  environment = {'SLURM_NTASKS': '16', 'SLURM_JOB_ID': '7'}
  done, told = call('slurm.sh', [code], **environment)
  assert done.returncode == code
  want = ['--distributed', '--config.data.shards=16', *GIVEN]
  assert told['nestax-train'] == want
  assert told.get('scontrol') == (['requeue', '7'] if code == 143 else None)


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'xpk.sh', 'slurm.sh'])
def test_what_is_missing_is_named(call, script):
  names = ('PROJECT', 'CLUSTER', 'SLURM_NTASKS')
  assert not any(name in os.environ for name in names)
  done, told = call(script, [0])
  assert done.returncode and 'nestax-train' not in told
  assert any(name in done.stderr for name in names)
