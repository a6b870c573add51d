"""Tokenizers that come with Llama-type weights: in GGUF, and llama2.c's own."""

import functools
import os
import re
import struct

from nestax.launch.data.merging import Merger
from nestax.launch.data.tokenizers import (
  SPACE,
  Tokenizer,
  byte_level_chars,
  encode_json,
  finish,
)
from nestax.models.llama_files import gguf

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_BYTE_PIECE = re.compile('<0x([0-9A-Fa-f]{2})>')
# what is split off before merging, by the name that llama.cpp gives it: a
# regex besides GPT-2's own, and whether GPT-2's own splits too
_LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_SPLITS = {
  'gpt-2': (None, True),
  'smollm': (r'\p{N}', True),
  'starcoder': (r'\p{N}', True),
  'llama-bpe': (_LLAMA_3, False),
  'llama3': (_LLAMA_3, False),
}


def load_gguf(path: str) -> Tokenizer:
  """The tokenizer that a GGUF file's metadata hold.

  Raises:
    FileNotFoundError, ImportError: as `gguf.read`.
    ValueError: in words, if there is none or it is of an unknown kind.
  """
  reader = gguf.read(path)

  def take(key, default=None):
    return gguf.value(reader, f'tokenizer.ggml.{key}', default)

  kind, tokens = take('model'), take('tokens')
  if kind is None or tokens is None:
    raise ValueError(f'{path} holds no tokenizer')
  types = take('token_type') or [_NORMAL] * len(tokens)
  specials = [
    take(f'{name}_token_id', -1) for name in ('bos', 'eos', 'padding')
  ]
  if len(types) != len(tokens) or max(specials) >= len(tokens):
    raise ValueError(f'{path}: the tables of its tokenizer do not fit together')
  if kind == 'gpt2':
    pieces, encode = _gpt2(path, tokens, types, take)
  elif kind == 'llama':
    pieces, encode = _sentencepiece(path, tokens, types, take)
  else:
    raise ValueError(
      f"{path}: tokenizer {kind!r}; 'gpt2' and 'llama' are supported"
    )
  adds_bos = take('add_bos_token', kind == 'llama')
  return finish(pieces, specials, encode, adds_bos and specials[0] >= 0)


def _gpt2(path, tokens, types, take):
  """Bytes as printable characters, merged by rank."""
  import tokenizers
  from tokenizers import models, pre_tokenizers

  split = take('pre')
  if split not in _SPLITS:
    raise ValueError(
      f'{path}: texts are split as {split!r}; one of {", ".join(_SPLITS)} is '
      'supported'
    )
  regex, as_gpt2 = _SPLITS[split]
  merges = [tuple(pair.split(' ')) for pair in take('merges', [])]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  whole = split in ('llama-bpe', 'llama3')
  try:
    bpe = models.BPE(vocabulary, merges, ignore_merges=whole)
  except Exception as error:  # the package raises bare Exception
    raise ValueError(f'{path}: merges do not fit its tokens: {error}') from None
  stages = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=as_gpt2)]
  if regex:
    stages.insert(0, pre_tokenizers.Split(tokenizers.Regex(regex), 'isolated'))
  model = tokenizers.Tokenizer(bpe)
  model.pre_tokenizer = pre_tokenizers.Sequence(stages)
  own = [token for token, kind in zip(tokens, types) if kind == _USER]
  model.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in own])

  bytes_of = {char: byte for byte, char in enumerate(byte_level_chars())}

  def spelling(token, kind):
    if kind == _USER:
      return token.encode()
    if kind != _NORMAL:
      return b''
    return bytes(bytes_of.get(char, 0x3F) for char in token)

  encode = functools.partial(encode_json, model)
  return [spelling(*pair) for pair in zip(tokens, types)], encode


def _sentencepiece(path, tokens, types, take):
  """Pieces with scores, and a piece for each byte."""
  scores = take('scores')
  if scores is None or len(scores) != len(tokens):
    raise ValueError(f'{path}: its tokenizer has no score for each token')
  texts, pieces, bytes_ = [], [], {}
  for i, (token, kind) in enumerate(zip(tokens, types)):
    byte = _BYTE_PIECE.fullmatch(token) if kind == _BYTE else None
    if byte:
      bytes_[int(byte[1], 16)] = i
      texts.append(None)
      pieces.append(bytes([int(byte[1], 16)]))
      continue
    spelt = token.replace(SPACE, ' ') if kind in (_NORMAL, _USER) else ''
    texts.append(spelt or None)
    pieces.append(spelt.encode())
  prefix = take('add_space_prefix', True)
  return pieces, _merging(path, texts, scores, bytes_, prefix)


def _merging(path, texts, scores, bytes_, prefix):
  if len(bytes_) != 256:
    raise ValueError(
      f'{path}: its tokenizer has pieces for {len(bytes_)} bytes, not all 256'
    )
  table = [bytes_[b] for b in range(256)]
  return Merger(texts, scores, table, prefix).encode


def load_llama2c(path: str) -> Tokenizer:
  """llama2.c's tokenizer.bin: its texts begin with bos, and end with it too.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is another kind of file or cut short.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f'{path}: there is no such file')
  with open(path, 'rb') as file:
    data = file.read()
  texts, scores, longest, at = [], [], 0, 4
  try:
    (most,) = struct.unpack_from('<i', data)
    while at < len(data):
      score, length = struct.unpack_from('<fi', data, at)
      piece = data[at + 8 : at + 8 + length]
      if length < 0 or len(piece) < length:
        raise ValueError('a piece reaches past its end')
      at, longest = at + 8 + length, max(longest, length)
      texts.append(piece.decode())
      scores.append(score)
    if len(texts) < 259 or longest != most:
      raise ValueError(f'{len(texts)} pieces of at most {longest} bytes')
  except (struct.error, ValueError) as error:
    raise ValueError(
      f"{path} is no tokenizer of llama2.c's, or cut short: {error}"
    ) from None
  # ids 0, 1, 2 are unknown, bos, eos; 3 to 258 the bytes
  pieces = [b''] * 3 + [bytes([b]) for b in range(256)]
  pieces += [text.encode() for text in texts[259:]]
  bytes_ = {b: b + 3 for b in range(256)}
  encode = _merging(path, [None] * 259 + texts[259:], scores, bytes_, True)
  # llama2.c trains on texts that begin with bos and never writes an eos
  return finish(pieces, [1, 1, -1], encode)


def beside_llama2c(path: str, vocabulary: int) -> str:
  """Path of the tokenizer beside llama2.c weights: tok<V>.bin, tokenizer.bin.

  Raises:
    FileNotFoundError: naming both, if neither is there.
  """
  folder = os.path.dirname(path)
  names = (f'tok{vocabulary}.bin', 'tokenizer.bin')
  for name in names:
    if os.path.isfile(os.path.join(folder, name)):
      return os.path.join(folder, name)
  raise FileNotFoundError(
    f'{path} needs its tokenizer beside it: neither {names[0]} nor {names[1]} '
    'is there'
  )
