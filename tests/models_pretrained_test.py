"""Llama-type files give the logits of a plain numpy Llama, or an error."""

import dataclasses
import json

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import llama_cases as cases
import ml_dtypes
import numpy as np
import pytest
from llama_cases import BASE, EPSILON, D, F, G, H, K, N, V

from nestax.models import language_model, pretrained

TOKENS = np.random.default_rng(7).integers(0, V, 14)


def logits(config, params):
  model = language_model.LanguageModel(config)
  tokens = jnp.asarray(TOKENS, jnp.int32)[None]
  with jax.default_matmul_precision('highest'):
    _, y = jax.jit(model.apply)({'params': params}, None, tokens)
  return np.asarray(y[0])


def assert_same(path, w, atol=2e-4, window=0):
  config, params = pretrained.load(path)
  want = cases.forward(w, TOKENS, window)
  assert np.abs(want).max() > 3
  np.testing.assert_allclose(logits(config, params), want, atol=atol)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('shards', [1, 3])
def test_safetensors_give_the_logits_of_llama(tmp_path, shards, tied):
  w = cases.weights(tied=tied)
  assert_same(cases.write_safetensors(tmp_path, w, shards), w)


@pytest.mark.parametrize('tied', [True, False])
def test_gguf_gives_the_logits_of_llama(tmp_path, tied):
  w = cases.weights(tied=tied)
  assert_same(cases.write_gguf(tmp_path / 'a.gguf', w), w)


@pytest.mark.parametrize('tied', [True, False])
def test_llama2c_gives_the_logits_of_llama(tmp_path, tied, monkeypatch):
  monkeypatch.setattr(cases, 'BASE', 10_000.0)
  w = cases.weights(tied=tied)
  assert_same(cases.write_llama2c(tmp_path / 'a.bin', w), w)


def test_config_and_parameters_are_those_of_the_model(tmp_path):
  w = cases.weights()
  folder = cases.write_safetensors(tmp_path / 'hf', w)
  file = cases.write_gguf(tmp_path / 'a.gguf', w)
  config, params = pretrained.load(folder)
  other, same = pretrained.load(file)
  want = {'V': V, 'D': D, 'N': N, 'H': H, 'G': G, 'F': F, 'tied': True}
  want |= {'epsilon': EPSILON, 'rope_base': BASE, 'family': 'transformer'}
  assert {key: getattr(config, key) for key in want} == want
  assert dataclasses.replace(other, K=config.K) == config
  assert other.head_width == config.head_width == K
  jax.tree.map(np.testing.assert_array_equal, params, same)
  abstract = nn.unbox(language_model.abstract_params(config))
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == shapes


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_a_file_of_the_folder_stands_for_it_only_if_it_holds_weights(
  tmp_path, name
):
  cases.write_safetensors(tmp_path, cases.weights())
  if name == 'config.json':
    with pytest.raises(ValueError, match='weights come from'):
      pretrained.load(tmp_path / name)
  else:
    assert pretrained.load(tmp_path / name).config.V == V


@pytest.mark.parametrize('kind', ['BF16', 'F16', 'F64'])
def test_safetensors_of_other_widths_are_read(tmp_path, kind):
  to = {'BF16': ml_dtypes.bfloat16, 'F16': np.float16, 'F64': np.float64}[kind]
  w = {name: x.astype(to) for name, x in cases.weights().items()}
  assert_same(cases.write_safetensors(tmp_path, w), w)


@pytest.mark.parametrize(
  'kind', ['F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_1']
)
def test_quantised_gguf_gives_the_logits_of_its_rounded_weights(tmp_path, kind):
  own = gguf.GGMLQuantizationType[kind]
  rounded = {
    name: x if x.ndim == 1 else gguf.dequantize(gguf.quantize(x, own), own)
    for name, x in cases.weights().items()
  }
  assert_same(
    cases.write_gguf(tmp_path / 'a.gguf', cases.weights(), kind), rounded
  )


def q4_k(rng, rows):
  """Blocks of Q4_K as ggml packs them, and the floats they stand for."""
  d, dmin = rng.uniform(0.001, 0.01, (2, rows, 1)).astype(np.float16)
  scale, least = rng.integers(0, 64, (2, rows, 8), dtype=np.uint8)
  q = rng.integers(0, 16, (rows, 8, 32), dtype=np.uint8)
  packed = np.zeros((rows, 12), np.uint8)
  packed[:, :4] = scale[:, :4] | (scale[:, 4:] >> 4) << 6
  packed[:, 4:8] = least[:, :4] | (least[:, 4:] >> 4) << 6
  packed[:, 8:] = (scale[:, 4:] & 15) | (least[:, 4:] & 15) << 4
  nibbles = q[:, ::2] | q[:, 1::2] << 4
  raw = [
    d.view(np.uint8),
    dmin.view(np.uint8),
    packed,
    nibbles.reshape(rows, -1),
  ]
  x = d.astype(np.float32)[..., None] * scale[..., None] * q
  x = x - (dmin.astype(np.float32) * least)[..., None]
  return np.concatenate(raw, 1), x.reshape(rows, 256)


def test_q4_k_blocks_are_read_as_ggml_packs_them(tmp_path):
  from nestax.models.llama_files import gguf as files

  raw, want = q4_k(np.random.default_rng(0), 6)
  writer = gguf.GGUFWriter(str(tmp_path / 'k.gguf'), 'llama')
  writer.add_tensor('x', raw, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  (tensor,) = files.read(str(tmp_path / 'k.gguf')).tensors
  got = files.dequantise('k.gguf', tensor)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_parameters_come_in_bfloat16_on_request(tmp_path):
  folder = cases.write_safetensors(tmp_path, cases.weights())
  whole = pretrained.load(folder).params
  half = pretrained.load(folder, dtype='bfloat16').params
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype('bfloat16')}
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b),
    whole,
    half,
  )
  with pytest.raises(ValueError, match="dtype='int8'"):
    pretrained.load(folder, dtype='int8')


def test_a_sliding_window_is_kept(tmp_path):
  w = cases.weights()
  about = {'model_type': 'mistral', 'sliding_window': 4}
  folder = cases.write_safetensors(tmp_path / 'hf', w, **about)
  assert_same(folder, w, window=4)
  keys = [('add_sliding_window', 4)]
  assert_same(cases.write_gguf(tmp_path / 'a.gguf', w, keys=keys), w, window=4)


@pytest.mark.parametrize(
  'about',
  [
    {'rope_theta': None, 'rope_parameters': {'rope_theta': BASE}},
    {'rope_scaling': {'rope_type': 'default'}},
    {'head_dim': K, 'attention_bias': False},
    {'layer_types': ['full_attention'] * N},
  ],
)
def test_other_spellings_of_the_same_config_are_read(tmp_path, about):
  w = cases.weights()
  assert_same(cases.write_safetensors(tmp_path, w, **about), w)


@pytest.mark.parametrize(
  'about,words',
  [
    ({'model_type': 'qwen2'}, "model_type 'qwen2'"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8}}, 'llama3'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2}}, 'linear'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, 'yarn'),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partly rotated'),
    ({'attention_bias': True}, 'attention_bias=True'),
    ({'mlp_bias': True}, 'mlp_bias=True'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'layer_types': ['sliding_attention'] * N}, 'layer_types'),
    ({'hidden_size': None}, 'lacks hidden_size'),
    ({'num_hidden_layers': N + 1}, r'lacks model\.layers\.3\.'),
    ({'num_hidden_layers': N - 1}, r'has not: model\.layers\.2\.'),
    ({'hidden_size': '32'}, "model.D='32'"),
    ({'vocab_size': V + 1}, r'embed_tokens\.weight is \[40, 32\].*\[41, 32\]'),
    ({'num_key_value_heads': 3}, 'G=3'),
    ({'tie_word_embeddings': False}, 'lacks lm_head.weight'),
  ],
)
def test_a_config_that_is_not_ours_is_refused(tmp_path, about, words):
  folder = cases.write_safetensors(tmp_path, cases.weights(), **about)
  with pytest.raises(ValueError, match=words):
    pretrained.load(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path):
  bias = {'model.layers.1.self_attn.q_proj.bias': np.zeros(D, np.float32)}
  ints = {'model.norm.weight': np.ones(D, np.int32)}
  lost = {'model.norm.weight': np.full(D, np.nan, np.float32)}
  head = {'lm_head.weight': np.ones((V, D), np.float32)}
  for extra, words in [
    (bias, r'biases.*layers\.1\.self_attn\.q_proj\.bias'),
    (ints, r'model\.norm\.weight is I32'),
    (lost, r'model\.norm\.weight holds numbers not finite'),
    (head, r'lm_head\.weight differs'),
  ]:
    about = {'tie_word_embeddings': True}
    cases.write_safetensors(tmp_path, cases.weights() | extra, **about)
    with pytest.raises(ValueError, match=words):
      pretrained.load(tmp_path)


def test_a_head_equal_to_the_embedding_is_a_tied_one(tmp_path):
  w = cases.weights()
  both = w | {'lm_head.weight': w['model.embed_tokens.weight'].copy()}
  about = {'tie_word_embeddings': True}
  assert_same(cases.write_safetensors(tmp_path, both, **about), w)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
  folder = cases.write_safetensors(tmp_path, cases.weights(), 2)
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  table = index['weight_map']
  one, two = sorted(set(table.values()))
  swapped = table | {'model.norm.weight': one}
  if table['model.norm.weight'] == one:
    swapped['model.norm.weight'] = two
  for wrong, error, words in [
    (swapped, ValueError, 'model.norm.weight is in'),
    (table | {'x': one}, ValueError, 'says that x is in'),
    (table | {'x': 'gone.safetensors'}, FileNotFoundError, 'gone'),
    (table | {'x': '../a.safetensors'}, FileNotFoundError, r'\.\./a'),
    ([], ValueError, 'weight_map'),
  ]:
    path.write_text(json.dumps({'weight_map': wrong}))
    with pytest.raises(error, match=words):
      pretrained.load(folder)


@pytest.mark.parametrize(
  'keys,words',
  [
    ([('add_rope_scaling_factor', 2.0)], 'rope.scaling.factor=2.0'),
    (
      [('add_rope_scaling_type', gguf.RopeScalingType.YARN)],
      "rope.scaling.type='yarn'",
    ),
    ([('add_expert_count', 8)], 'expert_count=8'),
    ([('add_logit_scale', 0.5)], 'logit_scale=0.5'),
    ([('add_key_length', 4)], 'rope.dimension_count is not the head width 4'),
    ([('add_value_length', 4)], 'value_length'),
  ],
)
def test_gguf_metadata_that_change_the_model_are_refused(tmp_path, keys, words):
  path = cases.write_gguf(tmp_path / 'a.gguf', cases.weights(), keys=keys)
  with pytest.raises(ValueError, match=words):
    pretrained.load(path)


def test_gguf_tensors_that_do_not_fit_are_named(tmp_path):
  w, path = cases.weights(), tmp_path / 'a.gguf'
  ones, twos = np.ones(K // 2, np.float32), np.full(K // 2, 2, np.float32)
  cases.write_gguf(path, w, also={'rope_freqs.weight': ones})
  assert_same(path, w)
  bias = {'blk.0.attn_q.bias': np.ones(D, np.float32)}
  short = {'blk.1.ffn_norm.weight': np.ones(D - 1, np.float32)}
  for options, words in [
    ({'also': {'rope_freqs.weight': twos}}, 'scales the rotary angles'),
    ({'also': bias}, r'biases.*blk\.0\.attn_q\.bias'),
    ({'also': short}, r'blk\.1\.ffn_norm\.weight is \[31\].*\[32\]'),
    ({'lack': ['blk.2.attn_v.weight']}, r'lacks blk\.2\.attn_v\.weight'),
    ({'lack': ['token_embd.weight']}, r'lacks token_embd\.weight'),
  ]:
    with pytest.raises(ValueError, match=words):
      pretrained.load(cases.write_gguf(path, w, **options))


def test_an_unknown_gguf_architecture_is_refused(tmp_path):
  writer = gguf.GGUFWriter(str(tmp_path / 'a.gguf'), 'qwen2')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match="architecture 'qwen2'"):
    pretrained.load(tmp_path / 'a.gguf')


def test_files_cut_short_are_refused_in_words(tmp_path):
  w = cases.weights()
  for path in (
    cases.write_gguf(tmp_path / 'a.gguf', w),
    cases.write_llama2c(tmp_path / 'a.bin', w),
    cases.write_safetensors(tmp_path / 'hf', w) / 'model.safetensors',
  ):
    data = path.read_bytes()
    for size in (0, 3, 20, 60, 500, len(data) // 2, len(data) - 1):
      path.write_bytes(data[:size])
      with pytest.raises(ValueError, match=str(path)):
        pretrained.load(path)


def test_llama2c_files_of_another_kind_are_refused(tmp_path):
  path = tmp_path / 'a.bin'
  for data, words in [
    (np.array([0x616B3432, 2, 0, 0, 0, 0, 0, 0], '<i4'), 'version 2'),
    (np.array([64, 172, 5, 8, 3, 512, 512], '<i4'), 'header says'),
    (np.array([-1] * 7, '<i4'), 'header says'),
    (np.array([64, 172, 1 << 30, 8, 4, 512, 512], '<i4'), 'header says'),
  ]:
    path.write_bytes(data.tobytes())
    with pytest.raises(ValueError, match=words):
      pretrained.load(path)
  cases.write_llama2c(path, cases.weights(), base=1e6)
  with pytest.raises(ValueError, match='rotary angles'):
    pretrained.load(path)


def test_what_is_not_there_is_named(tmp_path):
  for path in (tmp_path / 'a.gguf', tmp_path / 'none'):
    with pytest.raises(FileNotFoundError, match=str(path)):
      pretrained.load(path)
  with pytest.raises(FileNotFoundError, match='config.json'):
    pretrained.load(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='no JSON'):
    pretrained.load(tmp_path)
  cases.write_safetensors(tmp_path, cases.weights())
  (tmp_path / 'model.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='neither model.safetensors'):
    pretrained.load(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'PK')
  with pytest.raises(ValueError, match='weights come from'):
    pretrained.load(tmp_path / 'pytorch_model.bin')


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
  file = cases.write_gguf(tmp_path / 'a.gguf', cases.weights())
  folder = cases.write_safetensors(tmp_path / 'hf', cases.weights())
  monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
  monkeypatch.setitem(__import__('sys').modules, 'safetensors', None)
  for path in (file, folder):
    with pytest.raises(ImportError, match=r'nestax\[pretrained\]'):
      pretrained.load(path)
