"""Text to ids and back: bytes, or the tokenizer that a file holds.

Every kind is reduced to one table, the bytes that each id stands for: byte
counts, decoding and the bigram entropy all read it, so they can't disagree.
"""

import codecs
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Sequence

import numpy as np

_BOS = ('<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>', '[BOS]')
_EOS = ('</s>', '<eos>', '<|end_of_text|>', '<|endoftext|>', '[EOS]')
_PAD = ('<pad>', '<|pad|>', '<|finetune_right_pad_id|>', '[PAD]')
_BYTE = re.compile('<0x([0-9A-Fa-f]{2})>')
SPACE = '\u2581'


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """What the pipeline and the sampler need of a tokenizer.

  Attributes:
    pieces: the UTF-8 bytes of each id; b'' for specials and unused ids.
    bos, eos, pad: ids of the specials. A file without an end-of-text token
      gets one, after its last id; bos and pad fall back on eos.
    encode: text to ids, without specials; never reads a special out of text.
    prefix: whether `encode` puts a space before a text's first word.
    adds_bos: whether the model that the file belongs to wants a bos before a
      prompt; documents of our pipeline always begin with one.
  """

  pieces: tuple[bytes, ...]
  bos: int
  eos: int
  pad: int
  encode: Callable[[str], list[int]]
  prefix: bool = False
  adds_bos: bool = True

  @property
  def vocab_size(self) -> int:
    return len(self.pieces)

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    """int32, the UTF-8 bytes that each id stands for; 0 for specials."""
    return np.array([len(piece) for piece in self.pieces], np.int32)

  @functools.cached_property
  def _line_end(self) -> list[int]:
    return self.encode('\n')

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
    decoder = StreamDecoder(self)
    return ''.join([decoder.push(i) for i in ids] + [decoder.flush()])

  def encode_after(self, text: str) -> list[int]:
    """Ids of a text that goes on from another: no space is put before it."""
    if not self.prefix:
      return self.encode(text)
    # behind a line's end, whose ids are then left out
    first, ids = self._line_end, self.encode('\n' + text)
    if ids[: len(first)] == first:
      return ids[len(first) :]
    return self.encode(text.removeprefix(' '))

  def document(self, text: str) -> np.ndarray:
    """int32 [2, n]: ids of bos + text + eos, and the bytes of each.

    The bytes sum to the text's UTF-8 length wherever the tokenizer keeps the
    text as it is (one that normalises is counted by its normalised text).
    """
    if self.encode is _bytes_of:
      ids = np.frombuffer(text.encode(), np.uint8)
    else:
      ids = self.encode(text)
    document = np.empty((2, len(ids) + 2), np.int32)
    document[0, 0], document[0, 1:-1], document[0, -1] = self.bos, ids, self.eos
    document[1] = self.byte_lengths[document[0]]
    if self.prefix and len(ids):
      # The space before the first word is the tokenizer's, not the text's.
      document[1, 1] -= document[1].sum() == len(text.encode()) + 1
    return document


class StreamDecoder:
  """Decodes ids one at a time; never hands out half a character.

  Ids past the vocabulary (a model's may be rounded up) are no text. To go on
  from a prompt, push the prompt's ids first.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._utf8 = codecs.getincrementaldecoder('utf-8')('replace')
    self._at_start = True

  def push(self, token: int) -> str:
    """The text that is complete with this id, '' where none is."""
    tokenizer = self._tokenizer
    piece = tokenizer.pieces[token] if token < tokenizer.vocab_size else b''
    if token in (tokenizer.bos, tokenizer.eos):
      self._at_start = True
      return self._utf8.decode(b'', final=True)
    if piece and self._at_start:
      self._at_start = False
      piece = piece.removeprefix(b' ') if tokenizer.prefix else piece
    return self._utf8.decode(piece)

  def flush(self) -> str:
    """What is left at the end: U+FFFD where a character was cut off."""
    return self._utf8.decode(b'', final=True)


def load(name: str) -> Tokenizer:
  """Loads 'bytes', or the tokenizer of a file.

  Files: a tokenizer.json, a SentencePiece .model, a .gguf, llama2.c's .bin.
  The byte tokenizer's ids are 0-255 for the bytes, bos 256, eos 257, pad 258.
  Raises ValueError for another name, or a file that can't be used, and
  FileNotFoundError for one that is not there.
  """
  if name == 'bytes':
    pieces = tuple(bytes([i]) for i in range(256)) + (b'',) * 3
    return Tokenizer(pieces, 256, 257, 258, _bytes_of)
  if not name.endswith(('.json', '.model', '.gguf', '.bin')):
    raise ValueError(
      f"data.tokenizer is {name!r}; it is 'bytes', a path to a tokenizer.json, "
      "a SentencePiece .model, a .gguf or llama2.c's tokenizer.bin"
    )
  path = os.path.expanduser(name)
  if not os.path.isfile(path):
    raise FileNotFoundError(f'data.tokenizer={name!r}: there is no such file')
  if path.endswith(('.gguf', '.bin')):
    from nestax.launch.data import llama_tokenizers  # it imports this module

    gguf = path.endswith('.gguf')
    loader = (
      llama_tokenizers.load_gguf if gguf else llama_tokenizers.load_llama2c
    )
    return loader(path)
  return _load_json(path) if path.endswith('.json') else _load_model(path)


def _bytes_of(text):
  return list(text.encode())


def _load_json(path):
  import tokenizers

  try:
    model = tokenizers.Tokenizer.from_file(path)
  except Exception as e:  # the package raises bare Exception
    raise ValueError(f'{path} is not a tokenizer.json: {e}') from None
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = True
  spec = json.loads(model.to_str())
  spelling = _spelling(spec, path)
  vocabulary = model.get_vocab(with_added_tokens=True)
  pieces = [b''] * (max(vocabulary.values()) + 1)
  for token, i in vocabulary.items():
    pieces[i] = spelling(token)
  for token in spec['added_tokens']:
    special = token['special']
    pieces[token['id']] = b'' if special else token['content'].encode()
  unknown = spec['model'].get('unk_token')
  if unknown in vocabulary:
    pieces[vocabulary[unknown]] = b''

  def special(names):
    return next((vocabulary[n] for n in names if n in vocabulary), -1)

  encode = functools.partial(encode_json, model)
  specials = [special(names) for names in (_BOS, _EOS, _PAD)]
  # what the file's own post-processor puts first
  first = model.encode('a', add_special_tokens=True).ids[:1]
  return finish(pieces, specials, encode, first == [specials[0]])


def encode_json(model, text: str) -> list[int]:
  """Ids of a text, without specials, by the tokenizers package."""
  return model.encode(text, add_special_tokens=False).ids


def _spelling(spec, path):
  """How the file spells bytes: a function from token to bytes."""
  stages = ('normalizer', 'pre_tokenizer', 'decoder')
  stages = json.dumps([spec[s] for s in stages], ensure_ascii=False)
  if '"ByteLevel"' in stages:
    bytes_of = {char: byte for byte, char in enumerate(byte_level_chars())}
    return lambda token: bytes(bytes_of.get(char, 0x3F) for char in token)
  if SPACE in stages:
    fallback = spec['model'].get('byte_fallback', False)
    return functools.partial(_piece, fallback=fallback)
  raise ValueError(
    f'{path} is neither byte-level nor of the SentencePiece kind (spaces as '
    f'{SPACE}): it loses white space, so its text could not be given back'
  )


def byte_level_chars() -> list[str]:
  """The printable character that byte-level BPE writes for each byte."""
  kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = iter(range(0x100, 0x200))
  return [chr(b if b in kept else next(others)) for b in range(256)]


def _piece(token, fallback):
  byte = _BYTE.fullmatch(token) if fallback else None
  if byte:
    return bytes([int(byte[1], 16)])
  return token.replace(SPACE, ' ').encode()


def _load_model(path):
  import sentencepiece

  try:
    model = sentencepiece.SentencePieceProcessor(model_file=path)
  except (RuntimeError, OSError) as e:
    raise ValueError(f'{path} is not a SentencePiece model: {e}') from None
  pieces = [b''] * model.get_piece_size()
  for i in range(len(pieces)):
    if not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
      pieces[i] = _piece(model.id_to_piece(i), model.is_byte(i))
  specials = [model.bos_id(), model.eos_id(), model.pad_id()]
  return finish(pieces, specials, model.encode)


def finish(pieces, specials, encode, adds_bos=True) -> Tokenizer:
  """Fills in the specials that the file lacks (-1), finds the prefix."""
  bos, eos, pad = specials
  if eos < 0:
    eos = len(pieces)
    pieces.append(b'')
  bos, pad = (eos if i < 0 else i for i in (bos, pad))
  for i in (bos, eos, pad):
    pieces[i] = b''
  start = b''.join(pieces[i] for i in encode('a'))
  prefix = start[:1] == b' '
  return Tokenizer(tuple(pieces), bos, eos, pad, encode, prefix, adds_bos)
