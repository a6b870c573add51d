"""Tokenizers of GGUF and llama2.c: the ids of plain transcriptions."""

import os
import pathlib
import pickle
import struct

import gguf
import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from nestax.launch.data import llama_tokenizers, tokenizers
from nestax.launch.data.merging import Merger

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get('NESTAX_DATA', ROOT.parent / 'shared/data'))
BYTES = [f'<0x{b:02X}>' for b in range(256)]
WORDS = [
  ' ',
  'a',
  'b',
  'c',
  'e',
  'é',
  ' a',
  'ab',
  'bc',
  'abc',
  ' ab',
  '  ',
  'ca',
]
WORDS += ['ee', 'bca', ' e', 'cab', 'aa', 'aaa']
PIECES = ['<unk>', '<s>', '</s>', *BYTES, *WORDS]
RNG = np.random.default_rng(3)
# equal scores among them: the leftmost pair has to win
SCORES = [0.0] * 259 + [float(x) for x in RNG.integers(-9, -1, len(WORDS))]


def as_llama2c_does(text, pieces=PIECES, scores=SCORES):
  """run.c's encode, pair by pair over the whole text, without bos."""
  ids_of = {piece: i for i, piece in enumerate(pieces)}
  ids = [ids_of[' ']] if text else []
  for char in text:
    own = ids_of.get(char)
    ids += [own] if own is not None else [b + 3 for b in char.encode()]
  while True:
    best, place, to = -1e10, -1, -1
    for i in range(len(ids) - 1):
      joined = ids_of.get(pieces[ids[i]] + pieces[ids[i + 1]])
      if joined is not None and scores[joined] > best:
        best, place, to = scores[joined], i, joined
    if place < 0:
      return ids
    ids[place : place + 2] = [to]


def write_llama2c(path):
  data = struct.pack('<i', max(len(p.encode()) for p in PIECES))
  for piece, score in zip(PIECES, SCORES):
    raw = piece.encode()
    data += struct.pack('<fi', score, len(raw)) + raw
  path.write_bytes(data)
  return str(path)


def write_gguf(path, kind, tokens, types, **values):
  writer = gguf.GGUFWriter(str(path), 'llama')
  writer.add_tokenizer_model(kind)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  for name, given_ in values.items():
    getattr(writer, f'add_{name}')(given_)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def sentencepiece_gguf(path, **values):
  tokens = [piece.replace(' ', '\u2581') for piece in PIECES]
  types = [2, 3, 3] + [6] * 256 + [1] * len(WORDS)
  values = {
    'bos_token_id': 1,
    'eos_token_id': 2,
    'token_scores': SCORES,
  } | values
  return write_gguf(path, 'llama', tokens, types, **values)


@pytest.fixture(scope='module')
def by_scores(tmp_path_factory):
  folder = tmp_path_factory.mktemp('scores')
  return [
    tokenizers.load(write_llama2c(folder / 'tok.bin')),
    tokenizers.load(sentencepiece_gguf(folder / 'tok.gguf')),
  ]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('abceé \nx\u2581€'), max_size=24))
def test_ids_are_those_of_llama2c(by_scores, text):
  want = as_llama2c_does(text)
  for tokenizer in by_scores:
    assert tokenizer.encode(text) == want
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_that_joins_across_words_is_not_cut_there():
  pieces = [None] * 3 + [None] * 256 + ['a', ' ', 'a ', 'a a']
  scores = [0.0] * 259 + [-1.0, -1.0, -1.0, -2.0]
  merger = Merger(pieces, scores, range(3, 259), prefix=False)
  assert merger.encode('a a') == [262]


def test_llama2c_texts_begin_and_end_with_bos(by_scores):
  theirs, sentencepiece = by_scores
  assert (theirs.bos, theirs.eos, theirs.adds_bos) == (1, 1, True)
  assert (sentencepiece.bos, sentencepiece.eos) == (1, 2)
  for tokenizer in by_scores:
    assert tokenizer.prefix and tokenizer.vocab_size == len(PIECES)
    assert tokenizer.byte_lengths[:4].tolist() == [0, 0, 0, 1]


def test_stories260k_has_its_own_ids():
  path = DATA / 'stories260K/tok512.bin'
  if not path.is_file():
    pytest.skip(f'{path} is not there')
  tokenizer = tokenizers.load(str(path))
  golden = (path.parent / 'expected_greedy_200.txt').read_text()
  assert tokenizer.vocab_size == 512
  assert tokenizer.decode(tokenizer.encode(golden)) == golden


def gpt2_tables():
  chars = tokenizers.byte_level_chars()
  merges = ['a b', 'Ġ a', 'Ġa b', '1 2', 'Ã ©', 'c ab', 'Ġ Ġ', 'Ċ Ċ']
  tokens = ['<|endoftext|>', '<|im_start|>', *chars]
  return [*tokens, *(m.replace(' ', '') for m in merges), '<think>'], merges


def gpt2_gguf(path, pre='smollm', **values):
  tokens, merges = gpt2_tables()
  types = [3, 3] + [1] * (len(tokens) - 3) + [4]
  values = {'token_merges': merges, 'tokenizer_pre': pre} | values
  return write_gguf(path, 'gpt2', tokens, types, bos_token_id=1, **values)


def test_byte_level_ids_are_those_of_the_makers_tokenizer(tmp_path):
  tokenizer = tokenizers.load(gpt2_gguf(tmp_path / 'a.gguf', eos_token_id=0))
  tokens, merges = gpt2_tables()
  model = hf.Tokenizer(
    hf.models.BPE(
      {t: i for i, t in enumerate(tokens)}, [tuple(m.split()) for m in merges]
    )
  )
  model.pre_tokenizer = hf.pre_tokenizers.Sequence(
    [
      hf.pre_tokenizers.Digits(individual_digits=True),
      hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  for text in ('ab ab 1212é', "cab's  a\n\nb 12 ٣٤", '<|endoftext|> a'):
    assert tokenizer.encode(text) == model.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
  twelve = tokens.index('12')
  assert twelve not in tokenizer.encode('1212')
  assert tokenizer.encode('a<think>b')[1] == tokens.index('<think>')
  assert tokenizer.byte_lengths[[0, 1, -1]].tolist() == [0, 0, len('<think>')]
  assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos) == (1, 0, False)


def test_the_split_is_that_of_the_file(tmp_path):
  tokens, _ = gpt2_tables()
  for pre in ('gpt-2', 'llama-bpe'):
    path = gpt2_gguf(tmp_path / f'{pre}.gguf', pre, add_bos_token=True)
    tokenizer = tokenizers.load(path)
    assert tokenizer.encode('12') == [tokens.index('12')]
    assert tokenizer.adds_bos
  with pytest.raises(ValueError, match="split as 'qwen2'"):
    tokenizers.load(gpt2_gguf(tmp_path / 'q.gguf', 'qwen2'))
  # llama.cpp's own default is not GPT-2's split
  with pytest.raises(ValueError, match="split as 'default'"):
    tokenizers.load(gpt2_gguf(tmp_path / 'd.gguf', 'default'))


def test_all_kinds_travel_to_the_workers_of_the_pipeline(by_scores, tmp_path):
  for tokenizer in (
    *by_scores,
    tokenizers.load(gpt2_gguf(tmp_path / 'a.gguf')),
  ):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode('cab é 12') == tokenizer.encode('cab é 12')


def test_files_without_a_usable_tokenizer_are_refused(tmp_path):
  path = tmp_path / 'a.gguf'
  with pytest.raises(ValueError, match="tokenizer 'bert'"):
    tokenizers.load(write_gguf(path, 'bert', ['a'], [1]))
  with pytest.raises(ValueError, match='no score'):
    tokenizers.load(write_gguf(path, 'llama', ['a'], [1]))
  with pytest.raises(ValueError, match='0 bytes, not all 256'):
    tokenizers.load(write_gguf(path, 'llama', ['a'], [1], token_scores=[0.0]))
  with pytest.raises(ValueError, match='do not fit together'):
    tokenizers.load(sentencepiece_gguf(path, eos_token_id=999))
  writer = gguf.GGUFWriter(str(path), 'llama')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match='holds no tokenizer'):
    tokenizers.load(str(path))
  whole = pathlib.Path(write_llama2c(tmp_path / 'tok.bin')).read_bytes()
  for size in (0, 3, 9, 100, len(whole) - 1, len(whole) - 9):
    (tmp_path / 'tok.bin').write_bytes(whole[:size])
    with pytest.raises(ValueError, match='cut short'):
      tokenizers.load(str(tmp_path / 'tok.bin'))


def test_the_tokenizer_beside_llama2c_weights_is_found(tmp_path):
  weights = str(tmp_path / 'model.bin')
  with pytest.raises(FileNotFoundError, match='neither tok512.bin nor'):
    llama_tokenizers.beside_llama2c(weights, 512)
  for name in ('tokenizer.bin', 'tok512.bin'):
    (tmp_path / name).write_bytes(b'')
    found = llama_tokenizers.beside_llama2c(weights, 512)
    assert found == str(tmp_path / name)
