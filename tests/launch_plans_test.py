"""What a life is made of is checked before it begins."""

import dataclasses
import json

import jax
import nights_cases as cases
import numpy as np
import pytest

from nestax.cms.experts import SlotsError
from nestax.launch import days, plans
from nestax.launch.data import tokenizers
from nestax.launch.evals import streaming


def test_texts_are_taken_evenly_out_of_a_long_one():
  said = plans.rows_of(np.arange(41), 4, 3, 99)
  assert said.tokens_BxL.tolist() == [
    [0, 1, 2, 3], [16, 17, 18, 19], [36, 37, 38, 39]
  ]  # fmt: skip
  assert said.length_B.tolist() == [4, 4, 4]  # the last one had one token
  short = plans.rows_of(np.arange(3), 4, 3, 99)
  assert short.tokens_BxL.tolist() == [[0, 1, 2, 99]]
  assert short.length_B.tolist() == [3]


def test_only_text_and_its_end_may_be_said():
  words = plans.words_of(cases.made())
  assert (words.bos, words.eos, words.pad) == (256, 257, 258)
  assert np.flatnonzero(words.allowed_V).tolist() == [*range(256), 257]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
  made = cases.made()
  larger = dataclasses.replace(made.tokenizer, eos=300)
  with pytest.raises(ValueError, match='256 and 300; the model knows 272'):
    plans.words_of(made._replace(tokenizer=larger))


def test_slots_change_no_logit():
  plain, slotted = cases.made(slots=0), cases.made()
  tokens = np.arange(12)[None]
  want, got = (
    jax.jit(made.model.apply)({'params': made.params}, None, tokens)[1]
    for made in (plain, slotted)
  )
  # two programs, which need not round alike; activation is tested to the bit
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert slotted.model.cfg.cms.slots == 8


def test_a_model_that_cannot_sleep_is_refused(tmp_path):
  folder = cases.write_texts(tmp_path)
  made = cases.made()
  read = days.load([str(folder / 'ann.txt')], 1, tokenizers.load('bytes'))
  core = str(folder / 'core.txt')
  frozen = made._replace(model=streaming.frozen(made.model))
  with pytest.raises(SlotsError, match='no level of this model learns'):
    plans.prepare(frozen, read, core, cases.OPTIONS)
  with pytest.raises(SlotsError, match='no expert slots'):
    plans.prepare(cases.made(slots=0), read, core, cases.OPTIONS)
  (folder / 'core.txt').write_text('x')
  with pytest.raises(ValueError, match='core.txt: nothing to read in it'):
    plans.prepare(made, read, core, cases.OPTIONS)


def test_days_of_one_name_are_refused(tmp_path):
  folder = cases.write_texts(tmp_path)
  read = days.load([str(folder / 'ann.txt')], 2, tokenizers.load('bytes'))
  core = str(folder / 'core.txt')
  with pytest.raises(ValueError, match="'1' is the name of two of the days"):
    plans.prepare(cases.made(), (*read, read[0]), core, cases.OPTIONS)


def test_ids_that_the_model_does_not_know_are_refused(tmp_path):
  folder, made = cases.write_texts(tmp_path), cases.made()
  core = str(folder / 'core.txt')
  read = days.load([str(folder / 'ann.txt')], 1, made.tokenizer)
  other = [read[0]._replace(tokens={'ann': np.array([5, 272])})]
  with pytest.raises(ValueError, match='day 1 of ann: token 272 is none of'):
    plans.prepare(made, other, core, cases.OPTIONS)
  foreign = dataclasses.replace(made.tokenizer, encode=lambda text: [1, 300])
  with pytest.raises(
    ValueError, match='core.txt: token 300 is none of the 272'
  ):
    plans.prepare(made._replace(tokenizer=foreign), read, core, cases.OPTIONS)


def test_questions_are_filled_up_with_an_id_that_the_model_has(tmp_path):
  made, path = cases.made(), tmp_path / 'q.jsonl'
  V = made.model.cfg.V
  made = made._replace(tokenizer=dataclasses.replace(made.tokenizer, pad=V))
  row = {'question': 'a?', 'answer': 'b', 'choices': ['cde'], 'owner': 'ann'}
  path.write_text(json.dumps(row))
  text = str(cases.write_texts(tmp_path) / 'ann.txt')
  read = days.load([text], 1, made.tokenizer)
  asked = plans.questions.load(str(path), read)
  (part,) = plans._quiz(made, str(path), asked)
  ids = np.asarray(part.sheet.rows.tokens_BxL)
  assert ids.max() < V and made.tokenizer.eos in ids
