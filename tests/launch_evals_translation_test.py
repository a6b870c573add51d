"""Sentence pairs are read, split cleanly, and translations judged by chrF."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import sleep_cases as cases

from nestax.launch import trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import learners, parallel, suite, translation
from nestax.launch.evals.parallel import Pair
from nestax.models import language_model

ROOT = pathlib.Path(__file__).parents[1]
SHARED = pathlib.Path(
  os.environ.get('NESTAX_DATA', ROOT.parent / 'shared/data')
)
TERMS = 'http://cldf.clld.org/v1.0/terms.rdf#'
PAIRS = [
  Pair('tíi kakaríi', 'the skull'),
  Pair('wée híinu', 'is in it'),
  Pair('aníi wíi', 'this water'),
  Pair('pil', 'drink'),
]


def write_cldf(folder, columns=('primaryText', 'translatedText')):
  folder.mkdir()
  examples = {
    'url': 'examples.csv',
    'dc:conformsTo': f'{TERMS}ExampleTable',
    'tableSchema': {
      'columns': [
        {'name': 'ID'},
        *({'name': f'C_{c}', 'propertyUrl': TERMS + c} for c in columns),
      ]
    },
  }
  other = {'url': 'senses.csv', 'dc:conformsTo': f'{TERMS}SenseTable'}
  about = {'tables': [other, examples]}
  (folder / 'cldf-metadata.json').write_text(json.dumps(about))
  lines = ['ID,C_primaryText,C_translatedText']
  lines += [f'{i},"{s}","{t}"' for i, (s, t) in enumerate(PAIRS)]
  lines += ['9,"no translation",""']
  (folder / 'examples.csv').write_text('\n'.join(lines), encoding='utf-8')
  return folder


def test_pairs_are_read_from_every_kind_of_file(tmp_path):
  folder = write_cldf(tmp_path / 'cldf')
  assert parallel.read(folder) == PAIRS
  assert parallel.read(folder / 'cldf-metadata.json') == PAIRS
  for kind, split in (('tsv', '\t'), ('csv', ',')):
    path = tmp_path / f'pairs.{kind}'
    path.write_text('\n'.join(split.join(p) for p in [('x', 'y'), *PAIRS]))
    assert parallel.read(path, 'x', 'y') == PAIRS
  path = tmp_path / 'pairs.jsonl'
  path.write_text('\n'.join(json.dumps(p._asdict()) for p in PAIRS))
  assert parallel.read(path) == PAIRS


def test_other_files_are_refused_in_words(tmp_path):
  with pytest.raises(ValueError, match='no .*metadata.json, so no CLDF'):
    parallel.read(tmp_path)
  lacking = write_cldf(tmp_path / 'less', ('primaryText',))
  with pytest.raises(ValueError, match='lack primaryText or translatedText'):
    parallel.read(lacking)
  for name, text, words in (
    ('a.json', '{}', 'not the metadata'),
    ('b.json', '{"tables": []}', 'has no examples'),
    ('c.tsv', 'source\tother\na\tb', "there is no 'target' in it"),
    ('d.jsonl', '{', 'not JSON lines'),
    ('e.tsv', 'source\ttarget\na\t', 'no pairs'),
    ('f.txt', '', 'CLDF, .tsv, .csv or .jsonl'),
  ):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
      parallel.read(tmp_path / name)


def test_no_sentence_is_learned_and_asked():
  pairs = [Pair(f's{i}', f't{i}') for i in range(10)]
  pairs += [Pair('S3!', 'other'), Pair('new', 'T4.'), Pair('NEW', 'x')]
  seen = 'in the grammar: s0, and S1.'
  for seed in range(5):
    rng = np.random.default_rng(seed)
    learn, ask = parallel.split(pairs, 4, rng, seen)
    assert len(ask) == 4 and len(learn) == 6
    assert sorted(learn + ask) == sorted(pairs[:10])
    assert not {pair.source for pair in ask} & {'s0', 's1'}
  with pytest.raises(ValueError, match='tests=9: of 10 different pairs 8 can'):
    parallel.split(pairs, 9, rng, seen)


def test_chrf_is_the_one_worked_out_by_hand():
  pytest.importorskip('sacrebleu', reason='an extra: nestax[eval]')
  # letters 1 of 2, pairs of letters 0 of 1: precision = recall = 1 / 4
  assert translation.chrf(['a b'], ['a c']) == pytest.approx(25.0)
  assert translation.chrf(['the skull'], ['the skull']) == pytest.approx(100)
  assert translation.chrf(['xyz'], ['abc']) == pytest.approx(0)


def spoken(name, learn, ask):
  return translation.Language(name, 'English', '', (*learn,), (*ask,))


def test_a_language_is_its_book_and_every_pair_each_time(tmp_path):
  one = spoken('Palula', PAIRS[:3], PAIRS[3:])
  text = one.text(2, np.random.default_rng(0))
  for source, target in PAIRS[:3]:
    assert text.count(f'Palula: {source}\nEnglish: {target}\n\n') == 2
  assert PAIRS[3].source not in text
  book = dataclasses.replace(one, book=' A grammar.\n')
  assert book.text(1, np.random.default_rng(0)).startswith('A grammar.\n\nPal')
  assert translation.called('data/palula/cldf') == 'Palula'
  assert translation.called('x/kalamang.tsv') == 'Kalamang'


@pytest.fixture(scope='module')
def made():
  cfg = cases.config('hope_attention', N=1, periods=(16,), rate=1.0)
  cfg = dataclasses.replace(cfg, V=259)
  return trained.Trained(
    language_model.LanguageModel(cfg),
    cases.params_of(cfg),
    tokenizers.load('bytes'),
    0,
    'bytes',
  )


def test_settings_differ_in_what_is_read(tmp_path, monkeypatch, made):
  first = write_cldf(tmp_path / 'palula')
  second = tmp_path / 'other.tsv'
  second.write_text(
    'source\ttarget\n' + '\n'.join(f'x{i}\ty{i}' for i in 'abc')
  )
  options = translation.Options(
    str(first), str(second), tests=1, window=32, piece=16, most=3, rows=2
  )
  asked = suite.Asked(('m',), seeds=1)
  found = list(translation.cells(options, asked))
  assert [cell.task for cell in found] == ['alone', 'in sequence']
  calls = []

  def translate(made, options, read, ask, rng):
    calls.append(([x.name for x in read], [x.name for x in ask]))
    return {x.name: [pair.target for pair in x.ask] for x in ask}

  translation._model.cache_clear()
  monkeypatch.setattr(learners, 'load', lambda word: made)
  monkeypatch.setattr(translation, 'translate', translate)
  pytest.importorskip('sacrebleu', reason='an extra: nestax[eval]')
  for cell in found:
    (row,) = cell.run(lambda done, of: None)
    # a single letter has no longer n-grams; all are right
    assert row['scores'] == pytest.approx({'Palula': 100, 'Other': 100})
  both = ['Palula', 'Other']
  assert calls == [
    (['Palula'], ['Palula']),
    (['Other'], ['Other']),
    (both, both),
  ]
  with pytest.raises(ValueError, match='both languages are called Palula'):
    list(
      translation.cells(dataclasses.replace(options, second=str(first)), asked)
    )


def test_translations_go_on_from_all_that_was_read(made, monkeypatch):
  options = translation.Options(tests=1, window=32, piece=16, most=8, rows=2)
  one = spoken('Palula', PAIRS[:3], PAIRS[3:])
  two = spoken('Other', [Pair('x' * 9, 'z' * 30)], PAIRS[3:])
  begun = []

  def write(asked, tokenizer, prompts, most, stops):
    begun.append(jax.tree.leaves(asked.begun))
    return [' said '] * len(prompts)

  monkeypatch.setattr(translation.writing, 'write', write)
  for read in ([one], [one], [one, two]):
    said = translation.translate(
      made, options, read, [one], np.random.default_rng(0)
    )
    assert said == {'Palula': ['said']}
  first, again, after = begun
  assert all(map(np.array_equal, first, again))
  assert not all(map(np.array_equal, first, after))


@pytest.mark.parametrize(
  'word, words',
  [
    ('m.gguf:rate=0.3', 'add stack=groups'),
    ('m.gguf:depth=3', "no key 'depth'"),
    ('m.gguf:levels=up', 'levels are on or off'),
  ],
)
def test_words_of_models_are_refused(word, words):
  with pytest.raises(ValueError, match=words):
    learners.parse(word)


def test_a_word_says_what_becomes_of_a_model(made):
  path, way = learners.parse('m.gguf:stack=groups;periods=8+16;rate=0.3')
  assert path == 'm.gguf' and way.rate == 0.3
  cfg = cases.config('transformer')
  plain = made._replace(model=language_model.LanguageModel(cfg))
  plain = plain._replace(params=cases.params_of(cfg))
  stacked = learners.apply(plain, way)
  assert stacked.model.cfg.stream.periods == (8, 16)
  assert learners.apply(plain, learners.Way(dtype='bfloat16')).model.cfg.dtype
  frozen = learners.apply(stacked, learners.Way(levels='off'))
  assert frozen.model.cfg.stream is None


@pytest.mark.skipif(not SHARED.exists(), reason='the data are not here')
def test_the_real_files_are_read():
  palula = parallel.read(SHARED / 'palula' / 'cldf')
  daakaka = parallel.read(SHARED / 'daakaka' / 'cldf')
  assert len(palula) > 1900 and len(daakaka) == 756
