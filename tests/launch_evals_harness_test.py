"""lm-eval gets from us what a plain numpy Llama says of the same weights."""

import json
import os
import subprocess
import sys

import llama_cases as cases
import numpy as np
import pytest

instance = pytest.importorskip(
  'lm_eval.api.instance', reason='an extra: nestax[eval]'
)

from nestax.launch.evals import asking, harness  # noqa: E402

LETTERS = 'abcdefg'
QUERIES = ('abc', 'gg', 'dad', 'feed', 'abc', 'cab')
CHOICES = ('ab', 'bad', 'c', 'edge')
ITEMS = [
  {'query': query, 'choices': list(CHOICES), 'gold': i % 4}
  for i, query in enumerate(QUERIES)
]


@pytest.fixture(scope='module')
def weights():
  return cases.weights()


@pytest.fixture(scope='module')
def folder(tmp_path_factory, weights):
  made = tmp_path_factory.mktemp('llama')
  cases.write_safetensors(made, weights)
  cases.write_tokenizer(made / 'tokenizer.json')
  return made


@pytest.fixture(scope='module')
def model(folder):
  arguments = f'pretrained={folder},max_length=32'
  return harness.Nestax.create_from_arg_string(arguments, {'batch_size': 4})


def ids(text):
  """Bos, then a letter an id, as `write_tokenizer` numbers them."""
  return [0, *(2 + LETTERS.index(letter) for letter in text)]


def logs(weights, row):
  """Log-probabilities of every token but the first, and of all there are."""
  logits = cases.forward(weights, row)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return logits[:-1][np.arange(len(row) - 1), row[1:]], logits


def requests(kind, pairs):
  return [instance.Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


def test_loglikelihoods_are_the_numpy_llamas(model, weights):
  pairs = [('abc', 'de'), ('g', 'a'), ('', 'bad'), ('abc', 'f'), ('ab', 'gag')]
  best = logs(weights, ids('dad'))[1][-1, 2:9].argmax()
  pairs.append(('dad', LETTERS[best]))
  got = model.loglikelihood(requests('loglikelihood', pairs), disable_tqdm=True)
  for (log, greedy), (prompt, answer) in zip(got, pairs):
    own, everything = logs(weights, ids(prompt + answer))
    np.testing.assert_allclose(log, own[-len(answer) :].sum(), atol=1e-4)
    rows = everything[len(prompt) : -1]
    likeliest = rows.argmax(-1).tolist()
    assert greedy == (likeliest == ids(prompt + answer)[-len(answer) :])


def test_prompts_lose_their_beginning_to_max_length(model, weights):
  prompt, answer = 'abcdefg' * 10, 'ab'
  ((log, _),) = model.loglikelihood(
    requests('loglikelihood', [(prompt, answer)]), disable_tqdm=True
  )
  row = ids(prompt + answer)[-32:]
  want = logs(weights, row)[0][-2:].sum()
  np.testing.assert_allclose(log, want, atol=1e-4)
  with pytest.raises(ValueError, match='70 tokens; max_length=32'):
    model.loglikelihood(requests('loglikelihood', [('a', prompt)]))


@pytest.mark.slow
def test_rolling_reads_a_whole_text_once(model, weights, monkeypatch):
  monkeypatch.setattr(asking, 'AT_ONCE', 32)  # pieces of eight tokens
  texts = ['feed' * 7, 'a']
  got = model.loglikelihood_rolling(
    requests('loglikelihood_rolling', [(text,) for text in texts]),
    disable_tqdm=True,
  )
  want = [logs(weights, ids(text))[0].sum() for text in texts]
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_generation_is_greedy_until_a_stop(model, weights):
  row = ids('cab')
  for _ in range(12):
    letters = logs(weights, row)[1][-1]
    letters[[0, *range(9, cases.V)]] = -np.inf
    row.append(int(letters.argmax()))
    if row[-1] == 1:  # the end of the text
      break
  text = ''.join(LETTERS[i - 2] for i in row[4:] if i > 1)
  assert len(text) > 2
  wishes = [
    {'until': [], 'max_gen_toks': 12},
    {'until': [text[2]], 'max_gen_toks': 12, 'do_sample': False},
    {'until': 'none', 'max_gen_toks': 2, 'temperature': 0},
  ]
  got = model.generate_until(
    requests('generate_until', [('cab', wish) for wish in wishes]),
    disable_tqdm=True,
  )
  assert got == [text, text.split(text[2])[0], text[:2]]
  odd = [('cab', {'until': [], 'max_gen_toks': 2, 'top_k': 3})]
  with pytest.raises(ValueError, match='top_k=3'):
    model.generate_until(requests('generate_until', odd))


@pytest.mark.parametrize(
  'arguments, words',
  [
    ({}, 'workdir'),
    ({'workdir': 'x', 'levels': 'up'}, 'levels=up'),
    ({'workdir': 'x', 'max_length': 1}, 'max_length=1'),
    ({'workdir': 'x', 'batch_size': 'many'}, 'batch_size=many'),
    ({'workdir': 'x', 'batch_size': 0}, 'batch_size=0'),
    ({'workdir': 'x', 'max_batch_size': 'no'}, 'max_batch_size=no'),
    ({'workdir': 'x', 'max_length': 'many'}, 'max_length=many: a whole'),
    ({'workdir': 'x', 'seed': 1.5}, 'seed=1.5: a whole number'),
    ({'workdir': 'x', 'rate': 'fast'}, 'rate=fast: a number'),
    ({'workdir': 'x', 'pretrained': 'y'}, 'workdir=RUN or pretrained=FILE'),
    ({'workdirr': 'x'}, 'workdirr=x: .*there are workdir, pretrained, .*dtype'),
    ({'workdir': '/nowhere'}, 'no checkpoint in /nowhere'),
    ({'pretrained': 'none.gguf'}, 'none.gguf: there is no such file'),
  ],
)
def test_arguments_are_refused_in_words(arguments, words):
  with pytest.raises(harness.Refused, match=words):
    harness.Nestax(**arguments)


def test_an_argument_that_has_a_flag_is_refused():
  with pytest.raises(harness.Refused, match='give --batch_size instead'):
    harness.Nestax.create_from_arg_obj(
      {'workdir': 'x', 'batch_size': 4}, {'batch_size': 1, 'device': None}
    )


def test_auto_is_a_number_of_rows():
  assert harness.rows('auto', None) == harness.rows('auto:4', 64) == 8
  assert harness.rows(32, 4) == 4 and harness.rows('3', None) == 3


TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {items}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
"""


def evaluate(folder, arguments, *words):
  """Runs the command on a task of its own, offline."""
  (folder / 'tasks').mkdir()
  items = folder / 'items.jsonl'
  items.write_text(''.join(json.dumps(item) + '\n' for item in ITEMS))
  task = TASK.format(items=items)
  (folder / 'tasks' / 'letters.yaml').write_text(task)
  line = [sys.executable, '-m', 'nestax.launch.harness', 'run']
  line += ['--model', 'nestax', '--model_args', arguments]
  line += ['--include_path', str(folder / 'tasks'), '--tasks', 'letters']
  env = os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(folder)}
  return subprocess.run(
    line + [*words], env=env, timeout=600, capture_output=True, text=True
  )


def test_the_command_line_refuses_in_a_line(tmp_path):
  done = evaluate(tmp_path, 'workdir=nothing')
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert last.startswith('nestax-lm-eval: no checkpoint in ')


@pytest.mark.slow
def test_the_command_line_runs_local_tasks_offline(folder, tmp_path, weights):
  done = evaluate(
    tmp_path, f'pretrained={folder}',
    '--output_path', str(tmp_path / 'out.json'), '--batch_size', '4',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (made,) = tmp_path.glob('**/out_*.json')
  got = json.loads(made.read_text())['results']['letters']['acc,none']
  right = 0
  for item in ITEMS:
    scores = [
      logs(weights, ids(item['query'] + choice))[0][-len(choice) :].sum()
      for choice in item['choices']
    ]
    right += int(np.argmax(scores)) == item['gold']
  assert got == pytest.approx(right / len(ITEMS))
