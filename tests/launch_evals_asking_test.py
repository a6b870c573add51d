"""Answers are scored and written as the plain model does it, row by row."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import sleep_cases as cases

from nestax.launch import trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import asking, rolling, streaming, writing
from nestax.models import language_model
from nestax.sleep import reader as readers

# one prompt thrice, one beyond the first size, an empty answer, a single token
PAIRS = (
  ([1, 2, 3], [4, 5]),
  ([7] * 11, [1, 2, 3]),
  ([1, 2, 3], [6]),
  ([5, 9], [8, 8, 8, 8, 8, 8, 8, 8, 2]),
  ([1, 2, 3], []),
)


@functools.cache
def _plain(cfg):
  model, params = language_model.LanguageModel(cfg), cases.params_of(cfg)
  return jax.jit(
    lambda tokens_1xL: model.apply({'params': params}, None, tokens_1xL)[1][0]
  )


def plain(cfg, row):
  """The model's own logits of one row alone; what comes later is no matter."""
  tokens = np.zeros((1, 48), np.int32)
  tokens[0, : len(row)] = row
  return np.array(_plain(cfg)(tokens))[: len(row)]


def want(cfg, prompt, answer):
  """By the model itself, on all of the row and nothing else."""
  logits = plain(cfg, [*prompt, *answer])
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  rows = logits[len(prompt) - 1 : len(prompt) + len(answer) - 1]
  log = sum(float(rows[i, token]) for i, token in enumerate(answer))
  return log, all(rows[i].argmax() == token for i, token in enumerate(answer))


def greedy(cfg, prompt, count):
  """The likeliest tokens after a prompt."""
  said = []
  for _ in range(count):
    said.append(int(plain(cfg, [*prompt, *said])[-1].argmax()))
  return said


@pytest.mark.parametrize(
  'family', ['transformer', pytest.param('hope', marks=pytest.mark.slow)]
)
def test_scores_are_those_of_each_row_by_itself(family, monkeypatch):
  monkeypatch.setattr(asking, 'AT_ONCE', 16)  # prompts are read in pieces
  cfg, rows = cases.config(family, blocks='none'), 2
  pairs = [*PAIRS, ([2, 4], greedy(cfg, [2, 4], 3))]
  got = asking.score(asking.Asked(cfg, cases.params_of(cfg), rows), pairs)
  for score, pair in zip(got, pairs):
    log, same = want(cfg, *pair)
    np.testing.assert_allclose(score.log, log, atol=2e-4)
    assert score.greedy == same
  assert got[-1].greedy and not got[3].greedy


def test_prompts_go_on_from_what_has_been_read():
  cfg = cases.config('hope_attention', N=1)
  params = cases.params_of(cfg)
  read = jax.jit(readers.of_model(cfg).read)
  day, first = cases.day(cfg, 1), np.arange(24)[None] % cases.V
  begun, _ = read(params, asking.go_on(day), first, np.array([5]))
  got = asking.score(asking.Asked(cfg, params, 2, begun), PAIRS)
  own = readers.Rows(day.blocks, readers.learned(day))
  begun, _ = read(params, own, first, np.array([5]))
  for score, (prompt, answer) in zip(got, PAIRS):
    row = np.zeros((1, 24), np.int32)
    row[0, : len(prompt) + len(answer)] = [*prompt, *answer]
    _, logits = read(params, begun, row, np.array([24]))
    logs = np.array(jax.nn.log_softmax(logits)[0])
    log = sum(logs[len(prompt) - 1 + i, t] for i, t in enumerate(answer))
    np.testing.assert_allclose(score.log, log, atol=2e-4)
  # levels that have written something else know something else
  fresh = asking.score(asking.Asked(cfg, params, 2), PAIRS[:1])
  assert abs(fresh[0].log - got[0].log) > 1e-3


@pytest.mark.slow
def test_levels_learn_from_the_prompt_if_they_may():
  cfg = cases.config('hope_attention', N=1)  # periods 4 and 8
  got = asking.score_learning(cfg, cases.params_of(cfg), PAIRS, rows=2)
  frozen = asking.score(asking.Asked(cfg, cases.params_of(cfg)), PAIRS)
  for score, pair in zip(got, PAIRS):
    log, same = want(cfg, *pair)
    np.testing.assert_allclose(score.log, log, atol=2e-4)
    assert score.greedy == same
  assert abs(got[1].log - frozen[1].log) > 1e-3
  np.testing.assert_allclose(got[0].log, frozen[0].log, atol=2e-4)


def test_an_empty_prompt_is_named():
  cfg = cases.config('transformer')
  with pytest.raises(ValueError, match='prompt 1 is empty'):
    asking.score(asking.Asked(cfg, None), [([1], [2]), ([], [2])])


def test_prompts_of_other_lengths_are_read_into_states_of_one_size():
  rooms = [asking._room(length) for length in range(1, 3000)]
  assert all(a >= b for a, b in zip(rooms, range(1, 3000)))
  assert sorted(set(rooms)) == [128, 512, 2048, 8192]
  cfg = cases.config(family='transformer')
  asked = asking.Asked(cfg, cases.params_of(cfg), 2)
  shapes = set()
  for prompt in ([1] * 3, [2] * 40):
    state, _ = jax.eval_shape(
      lambda p=prompt: asking.read_prompts(asked, [p], 8)
    )
    shapes.add(tuple(x.shape for x in jax.tree.leaves(state)))
  assert len(shapes) == 1


def test_sizes_are_few_and_never_less():
  sizes = [asking.size(n) for n in range(1, 4097)]
  assert all(made >= n for n, made in enumerate(sizes, 1))
  assert sorted(set(sizes))[:9] == [1, 8, 16, 32, 48, 64, 96, 128, 192]
  assert sizes == sorted(sizes) and len(set(sizes)) == 18


def byte_config(family, blocks='none'):
  """The cases' config, of bytes."""
  return dataclasses.replace(cases.config(family, blocks=blocks), V=259)


def test_texts_side_by_side_are_read_as_each_by_itself(monkeypatch):
  monkeypatch.setattr(asking, 'AT_ONCE', 16)
  cfg = cases.config('hope_attention', N=1)  # its levels learn
  params, model = cases.params_of(cfg), language_model.LanguageModel(cfg)
  texts = [cases.tokens(1, n, seed=n)[0].tolist() for n in (3, 21, 1, 11)]
  got = rolling.logs(model, params, texts, window=8, rows=2)
  how = streaming.Settings(piece=10, window=8)
  for log, text in zip(got, texts):
    nats = 0
    if len(text) > 1:
      sizes = np.ones(cfg.V, np.int32)
      read = streaming.read(model, params, text, sizes, how)
      nats = sum(reading.nats for reading in read)
    np.testing.assert_allclose(log, -nats, atol=2e-4)


@pytest.fixture(scope='module')
def writer():
  cfg = byte_config('transformer')
  made = trained.Trained(
    language_model.LanguageModel(cfg),
    cases.params_of(cfg),
    tokenizers.load('bytes'),
    0,
    'bytes',
  )
  return made


def greedy_text(made, prompt, count):
  cfg = made.model.cfg
  said = []
  for _ in range(count):
    logits = plain(cfg, [*prompt, *said])[-1]
    logits[[256, 258]] = -np.inf
    said.append(int(logits.argmax()))
  return said


def test_what_is_written_is_the_likeliest_and_ends_at_a_stop(writer):
  prompts = [[256, 97, 98], [256, *range(32, 52)], [256, 99]]
  cfg, tokenizer = writer.model.cfg, writer.tokenizer
  asked = asking.Asked(cfg, writer.params, rows=2)
  ids = [greedy_text(writer, prompt, 20) for prompt in prompts]
  assert tokenizer.eos not in sum(ids, [])
  texts = [tokenizer.decode(row) for row in ids]
  assert writing.write(asked, tokenizer, prompts, 20) == texts
  stop = texts[1][5:7]
  want = [text.split(stop)[0] for text in texts]
  got = writing.write(asked, tokenizer, prompts, 20, [stop, '', 'unsaid'])
  assert got == want and len(got[1]) <= 5
  for prompt, text in zip(prompts, want):
    assert writing.write_learning(writer, prompt, 20, [stop]) == text


@pytest.mark.slow
def test_draws_differ_by_seed_and_row_and_are_repeated(writer):
  asked = asking.Asked(writer.model.cfg, writer.params, rows=2)
  draw = functools.partial(
    writing.write, asked, writer.tokenizer, [[256]] * 2, 16, (), 1.0
  )
  first = draw(3)
  assert first[0] != first[1]
  assert draw(3) == first != draw(4)


def test_a_text_ends_with_its_document_and_breaks_no_character():
  tokenizer = tokenizers.load('bytes')
  text = writing.Text(tokenizer, [256], 8, ())
  text.push([0xC3])
  assert text.text == ''
  text.push([0xA4, 98, tokenizer.eos, 99])
  assert (text.text, text.over) == ('äb', True)
  short = writing.Text(tokenizer, [256], 1, ())
  short.push([0xC3])
  assert (short.text, short.over) == ('\ufffd', True)
