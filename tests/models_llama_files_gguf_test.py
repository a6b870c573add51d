"""GGUF files that cannot be read are refused in words that say why."""

import llama_cases as cases
import pytest

from nestax.models import pretrained

NAME = b'token_embd.weight'


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'a.gguf'


@pytest.fixture
def whole(path):
  cases.write_gguf(path, cases.weights())
  return path.read_bytes()


@pytest.mark.parametrize('size', [5, 9, 100, 2000, -1])
def test_a_file_cut_short_is_said_to_be_so(path, whole, size):
  """In words of ours: numpy's are about the sizes of dtypes."""
  path.write_bytes(whole[:size])
  words = f'a.gguf is .* cut short, or damaged: it has {path.stat().st_size:,} '
  with pytest.raises(ValueError, match=f'{words}bytes$'):
    pretrained.load(str(path))


@pytest.mark.parametrize('content', [b'', b'GG', b'no such thing' * 99])
def test_what_is_no_gguf_file_is_said(path, content):
  path.write_bytes(content)
  with pytest.raises(ValueError, match='a.gguf is no GGUF file$'):
    pretrained.load(str(path))


def test_a_version_newer_than_the_package_is_told(path, whole):
  path.write_bytes(whole.replace(b'GGUF\3', b'GGUF\x63', 1))
  with pytest.raises(ValueError, match='package cannot read .*version 99'):
    pretrained.load(str(path))


def test_a_kind_newer_than_the_package_is_told(path, whole):
  # after the name come how many axes, two of 8 bytes, and the kind
  kind = whole.index(NAME) + len(NAME) + 4 + 2 * 8
  path.write_bytes(whole[:kind] + b'\x63' + whole[kind + 1 :])
  with pytest.raises(ValueError, match='package cannot read .*99.* is not a '):
    pretrained.load(str(path))
