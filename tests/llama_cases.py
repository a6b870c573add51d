"""A tiny Llama in plain numpy, and its weights as files of every kind."""

import json

import gguf
import numpy as np
import safetensors.numpy
import tokenizers as hf

V, D, N, H, G, K, F = 40, 32, 3, 4, 2, 8, 64
BASE, EPSILON = 5000.0, 1e-5
PROJECTIONS = {
  'self_attn.q_proj': (H * K, D),
  'self_attn.k_proj': (G * K, D),
  'self_attn.v_proj': (G * K, D),
  'self_attn.o_proj': (D, H * K),
  'mlp.gate_proj': (F, D),
  'mlp.up_proj': (F, D),
  'mlp.down_proj': (D, F),
}
NORMS = ('input_layernorm', 'post_attention_layernorm')
GGUF_NAMES = {
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}


def weights(seed=0, tied=True):
  """Hugging Face names -> float32 arrays, q and k half split."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32) * shape[-1] ** -0.5

  made = {'model.embed_tokens.weight': normal(V, D)}
  for i in range(N):
    for name, shape in PROJECTIONS.items():
      made[f'model.layers.{i}.{name}.weight'] = normal(*shape)
    for name in NORMS:
      scale = 1 + 0.3 * normal(D)
      made[f'model.layers.{i}.{name}.weight'] = scale.astype(np.float32)
  made['model.norm.weight'] = 3 + normal(D)
  if not tied:
    made['lm_head.weight'] = normal(V, D)
  return made


def forward(w, tokens, window=0):
  """Logits [L, V] of one sequence, token by token of Llama's own text."""
  w = {name: x.astype(np.float64) for name, x in w.items()}

  def norm(x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * w[name]

  def rotate(x):  # [L, heads, K], pairs (i, i + K/2): x cos + half(x) sin
    angle = np.arange(len(x))[:, None] * BASE ** (-np.arange(0, K, 2) / K)
    angle = np.concatenate([angle, angle], -1)[:, None]
    turned = np.concatenate([-x[..., K // 2 :], x[..., : K // 2]], -1)
    return x * np.cos(angle) + turned * np.sin(angle)

  x = w['model.embed_tokens.weight'][tokens]
  L = len(x)
  age = np.arange(L)[:, None] - np.arange(L)
  hidden = (age < 0) | ((age >= window) if window else False)
  for i in range(N):
    p = f'model.layers.{i}.'

    def linear(x, name, p=p):
      return x @ w[p + name + '.weight'].T

    y = norm(x, p + 'input_layernorm.weight')
    q = rotate(linear(y, 'self_attn.q_proj').reshape(L, H, K))
    k = rotate(linear(y, 'self_attn.k_proj').reshape(L, G, K))
    v = linear(y, 'self_attn.v_proj').reshape(L, G, K)
    k, v = (np.repeat(z, H // G, axis=1) for z in (k, v))
    score = np.einsum('lhk,mhk->hlm', q, k) / np.sqrt(K)
    score = np.where(hidden, -np.inf, score)
    chance = np.exp(score - score.max(-1, keepdims=True))
    chance /= chance.sum(-1, keepdims=True)
    o = np.einsum('hlm,mhk->lhk', chance, v).reshape(L, H * K)
    x = x + linear(o, 'self_attn.o_proj')
    y = norm(x, p + 'post_attention_layernorm.weight')
    gate = linear(y, 'mlp.gate_proj')
    y = gate / (1 + np.exp(-gate)) * linear(y, 'mlp.up_proj')
    x = x + linear(y, 'mlp.down_proj')
  x = norm(x, 'model.norm.weight')
  return x @ w.get('lm_head.weight', w['model.embed_tokens.weight']).T


def interleaved(x, heads):
  """Rows of q or k as Meta's files and llama.cpp have them."""
  return x.reshape(heads, 2, K // 2, D).swapaxes(1, 2).reshape(x.shape)


def write_safetensors(folder, w, shards=1, **config):
  """config.json and the weights, in one file or several with an index."""
  folder.mkdir(exist_ok=True)
  about = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': V,
    'hidden_size': D,
    'num_hidden_layers': N,
    'num_attention_heads': H,
    'num_key_value_heads': G,
    'intermediate_size': F,
    'rope_theta': BASE,
    'rms_norm_eps': EPSILON,
    'hidden_act': 'silu',
    'tie_word_embeddings': 'lm_head.weight' not in w,
  } | config
  (folder / 'config.json').write_text(json.dumps(about))
  if shards == 1:
    safetensors.numpy.save_file(w, folder / 'model.safetensors')
    return folder
  table = {}
  for i in range(shards):
    file = f'model-{i + 1:05}-of-{shards:05}.safetensors'
    part = {name: w[name] for name in list(w)[i::shards]}
    safetensors.numpy.save_file(part, folder / file)
    table |= dict.fromkeys(part, file)
  index = {'metadata': {}, 'weight_map': table}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def write_gguf(path, w, kind='F32', also=None, keys=None, lack=()):
  """A GGUF file: matrices of `kind` where its blocks fit, norms F32."""
  writer = gguf.GGUFWriter(str(path), 'llama')
  writer.add_block_count(N)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(F)
  writer.add_head_count(H)
  writer.add_head_count_kv(G)
  writer.add_layer_norm_rms_eps(EPSILON)
  writer.add_rope_freq_base(BASE)
  writer.add_rope_dimension_count(K)
  for add, *values in keys or ():
    getattr(writer, add)(*values)
  for name, x in (gguf_tensors(w) | (also or {})).items():
    if name in lack:
      continue
    own = gguf.GGMLQuantizationType['F32' if x.ndim == 1 else kind]
    raw = gguf.quantize(x, own)
    writer.add_tensor(name, raw, raw_dtype=own)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def gguf_tensors(w):
  made = {
    'token_embd.weight': w['model.embed_tokens.weight'],
    'output_norm.weight': w['model.norm.weight'],
  }
  if 'lm_head.weight' in w:
    made['output.weight'] = w['lm_head.weight']
  for i in range(N):
    for name, theirs in GGUF_NAMES.items():
      x = w[f'model.layers.{i}.{name}.weight']
      if theirs in ('attn_q', 'attn_k'):
        x = interleaved(x, H if theirs == 'attn_q' else G)
      made[f'blk.{i}.{theirs}.weight'] = x
  return made


def write_llama2c(path, w, base=10_000.0):
  """llama2.c's legacy format (its base and epsilon are in its code)."""
  length = 16
  tied = 'lm_head.weight' not in w
  header = np.array([D, F, N, H, G, V if tied else -V, length], '<i4')
  angle = np.arange(length)[:, None] * base ** (-np.arange(0, K, 2) / K)
  parts = [w['model.embed_tokens.weight']]
  for name in (
    'input_layernorm',
    'self_attn.q_proj',
    'self_attn.k_proj',
    'self_attn.v_proj',
    'self_attn.o_proj',
    'post_attention_layernorm',
    'mlp.gate_proj',
    'mlp.down_proj',
    'mlp.up_proj',
  ):
    for i in range(N):
      x = w[f'model.layers.{i}.{name}.weight']
      if name.endswith(('q_proj', 'k_proj')):
        x = interleaved(x, H if name.endswith('q_proj') else G)
      parts.append(x)
  parts += [w['model.norm.weight'], np.cos(angle), np.sin(angle)]
  parts += [] if tied else [w['lm_head.weight']]
  data = b''.join(x.astype('<f4').tobytes() for x in parts)
  path.write_bytes(header.tobytes() + data)
  return path


def write_tokenizer(path, extra=()):
  """Byte-level ids, bos first where a text is encoded with specials."""
  names = ['<s>', '</s>', *'abcdefg', *extra]
  model = hf.Tokenizer(hf.models.BPE({n: i for i, n in enumerate(names)}, []))
  model.add_special_tokens(['<s>', '</s>'])
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  model.post_processor = hf.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 0)]
  )
  model.save(str(path))
