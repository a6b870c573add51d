"""Every tokenizer counts, splits and rejoins bytes without losing one."""

import os
import pathlib
import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from nestax.launch.data import tokenizers

TEXT = (
  'The memory reads the text, and the text is in the memory.\n'
  '  def read(self, text):\n\treturn caf\u00e9 + \u20ac5\n'
) * 30
SAMPLES = [
  'the text',
  ' leading  and   double spaces ',
  'tabs\tand\nlines\r\n\n',
  '\u00fcber caf\u00e9 \u20ac \u65e5\u672c \U0001f600',
  '</s> is only text here, and so is <|endoftext|>',
  '',
]
GPT2 = pathlib.Path(
  os.environ.get('NESTAX_DATA', '../shared/data'),
  'tokenizers/gpt2/tokenizer.json',
)


def byte_level(path, prefix):
  import tokenizers as hf

  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  model.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=['<|endoftext|>'],
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator([TEXT], trainer)
  model.save(str(path))


def metaspace(path):
  import tokenizers as hf

  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]
  pieces += ['\u2581', 't', 'h', 'e', 'x', 'th', 'the', '\u2581the', 'te', 'xt']
  merges = [('t', 'h'), ('th', 'e'), ('\u2581', 'the'), ('t', 'e'), ('x', 't')]
  model = hf.Tokenizer(
    hf.models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=merges,
      unk_token='<unk>',
      byte_fallback=True,
    )
  )
  model.pre_tokenizer = hf.pre_tokenizers.Metaspace(split=False)
  model.decoder = hf.decoders.Sequence(
    [
      hf.decoders.Replace('\u2581', ' '),
      hf.decoders.ByteFallback(),
      hf.decoders.Fuse(),
      hf.decoders.Strip(' ', 1, 0),
    ]
  )
  model.add_special_tokens(['<s>', '</s>'])
  model.save(str(path))


def sentence_piece(path, **options):
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT.splitlines()),
    model_prefix=str(path.with_suffix('')),
    vocab_size=320,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=2,
    **options,
  )


MAKERS = {
  'bytes': None,
  'byte_level.json': lambda path: byte_level(path, prefix=False),
  'byte_level_prefix.json': lambda path: byte_level(path, prefix=True),
  'metaspace.json': metaspace,
  'piece.model': sentence_piece,
  'no_prefix.model': lambda path: sentence_piece(path, add_dummy_prefix=False),
  'no_specials.model': lambda path: sentence_piece(path, bos_id=-1, eos_id=-1),
}


@pytest.fixture(scope='module', params=list(MAKERS))
def tokenizer(request, tmp_path_factory):
  maker = MAKERS[request.param]
  if maker is None:
    return tokenizers.load(request.param)
  path = tmp_path_factory.mktemp('tokenizers') / request.param
  maker(path)
  return tokenizers.load(str(path))


def in_pieces(tokenizer, ids):
  decoder = tokenizers.StreamDecoder(tokenizer)
  return [*(decoder.push(i) for i in ids), decoder.flush()]


def check_text(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  document = tokenizer.document(text)
  assert document[0].tolist() == [tokenizer.bos, *ids, tokenizer.eos]
  assert document[1].sum() == len(text.encode())
  assert document.min() >= 0
  assert not document[1, [0, -1]].any()


@pytest.mark.parametrize('text', [*SAMPLES, TEXT], ids=range(len(SAMPLES) + 1))
def test_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
  if tokenizer.prefix and text.startswith(' '):
    pytest.skip("whether a first space is the text's own is not in the ids")
  check_text(tokenizer, text)


@hypothesis.given(text=st.text(max_size=40).map(lambda text: 'x' + text))
@hypothesis.settings(max_examples=50, deadline=None)
def test_any_text_comes_back(tokenizer, text):
  hypothesis.assume('\u2581' not in text and '\0' not in text)
  check_text(tokenizer, text)


@pytest.mark.parametrize('text', SAMPLES, ids=range(len(SAMPLES)))
def test_stream_never_breaks_a_character(tokenizer, text):
  ids = tokenizer.encode(text)
  pieces = in_pieces(tokenizer, ids)
  assert ''.join(pieces) == tokenizer.decode(ids)
  assert '\ufffd' not in ''.join(pieces)
  assert pieces[-1] == ''


def test_stream_goes_on_from_a_prompt(tokenizer):
  ids = tokenizer.encode('the text')
  decoder = tokenizers.StreamDecoder(tokenizer)
  for i in ids:
    decoder.push(i)
  more = tokenizer.encode('x the')[1:] if tokenizer.prefix else ids
  assert tokenizer.decode([*ids, *more]).startswith('the text')
  assert [decoder.push(i) for i in more] == in_pieces(tokenizer, ids + more)[
    len(ids) : -1
  ]


@pytest.mark.parametrize('text', [' the', ' the text', '\nthe', ', 12', ''])
def test_a_text_that_goes_on_is_given_no_space_of_its_own(tokenizer, text):
  ids = tokenizer.encode_after(text)
  assert b''.join(tokenizer.pieces[i] for i in ids) == text.encode()


def test_documents_in_a_row_decode_to_their_texts(tokenizer):
  row = np.concatenate([tokenizer.document(t)[0] for t in ('the', 'text')])
  assert tokenizer.decode(row.tolist()) == 'thetext'


def test_workers_can_have_it(tokenizer):
  again = pickle.loads(pickle.dumps(tokenizer))
  np.testing.assert_array_equal(again.document(TEXT), tokenizer.document(TEXT))


def test_specials_and_unused_ids_stand_for_nothing(tokenizer):
  specials = [tokenizer.bos, tokenizer.eos, tokenizer.pad]
  assert 0 <= min(specials) and max(specials) < tokenizer.vocab_size
  assert not tokenizer.byte_lengths[specials].any()
  assert tokenizer.byte_lengths.dtype == np.int32
  assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
  assert tokenizer.decode([*specials, tokenizer.vocab_size + 3]) == ''


def test_specials_that_a_file_does_not_mark_are_specials_too(tmp_path):
  import tokenizers as hf

  model = hf.Tokenizer(hf.models.BPE(vocab={'</s>': 0, 'a': 1}, merges=[]))
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.save(str(tmp_path / 'bare.json'))
  tokenizer = tokenizers.load(str(tmp_path / 'bare.json'))
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 0, 0)
  assert tokenizer.byte_lengths.tolist() == [0, 1]


def test_bytes_have_the_ids_of_the_contract():
  tokenizer = tokenizers.load('bytes')
  assert tokenizer.encode('A\u00e9') == [0x41, 0xC3, 0xA9]
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (256, 257, 258)
  assert tokenizer.vocab_size == 259


def test_cut_characters_are_shown_at_the_end_only():
  tokenizer = tokenizers.load('bytes')
  ids = tokenizer.encode('\u20ac')
  assert in_pieces(tokenizer, ids[:2]) == ['', '', '\ufffd']
  assert in_pieces(tokenizer, ids) == ['', '', '\u20ac', '']
  assert in_pieces(tokenizer, [*ids[:2], tokenizer.eos, 0x41])[2:4] == [
    '\ufffd',
    'A',
  ]


@pytest.mark.parametrize('name', ['byte_level.json', 'piece.model'])
def test_decoding_agrees_with_the_package(tmp_path, name):
  MAKERS[name](tmp_path / name)
  tokenizer = tokenizers.load(str(tmp_path / name))
  if name.endswith('.json'):
    import tokenizers as hf

    decode = hf.Tokenizer.from_file(str(tmp_path / name)).decode
  else:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(tmp_path / name))
    decode = model.decode
  for text in SAMPLES:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == decode(ids)


@pytest.mark.parametrize(
  'name, error, words',
  [
    ('words', ValueError, "'words'; it is 'bytes', a path to"),
    ('none.json', FileNotFoundError, 'no such file'),
    ('bad.json', ValueError, 'not a tokenizer.json'),
    ('bad.model', ValueError, 'not a SentencePiece model'),
    ('words.json', ValueError, 'loses white space'),
  ],
)
def test_bad_tokenizers_are_refused(tmp_path, name, error, words):
  import tokenizers as hf

  for bad in ('bad.json', 'bad.model'):
    (tmp_path / bad).write_text('{"nothing": 1}')
  model = hf.Tokenizer(hf.models.WordLevel({'a': 0, '?': 1}, unk_token='?'))
  model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  model.save(str(tmp_path / 'words.json'))
  path = name if name == 'words' else str(tmp_path / name)
  with pytest.raises(error, match=words):
    tokenizers.load(path)


@pytest.mark.skipif(not GPT2.exists(), reason='needs the GPT-2 tokenizer.json')
def test_gpt2_counts_every_byte():
  tokenizer = tokenizers.load(str(GPT2))
  assert tokenizer.vocab_size == 50257
  assert tokenizer.bos == tokenizer.eos == 50256
  for text in [*SAMPLES, TEXT]:
    check_text(tokenizer, text)
