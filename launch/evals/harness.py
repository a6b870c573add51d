"""Our models for EleutherAI's lm-eval: the model class `nestax`.

`nestax-lm-eval` is lm-eval's own command line with this class known to it,
since lm-eval 0.4 looks for no models outside of its package:

    nestax-lm-eval run --model nestax --model_args workdir=runs/quickstart \\
      --tasks arc_easy --batch_size 16

In Python, `import nestax.launch.evals.harness` before
`lm_eval.simple_evaluate(model='nestax', ...)` does the same.
"""

import inspect

from nestax.launch import checkpoint, sampling
from nestax.launch.evals import asking, novel, rolling, streaming, writing

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import normalize_gen_kwargs
  from tqdm import tqdm
except ImportError as error:
  raise ImportError(
    f"lm-eval cannot be imported ({error}): pip install '.[eval]'"
  ) from error

_AUTO = 8  # rows where --batch_size is auto


class Refused(ValueError):
  """What was asked for cannot be; says in words why."""


@register_model('nestax')
class Nestax(TemplateLM):
  """A run of ours, or a pretrained file, as lm-eval wants it.

  Of the model arguments the first five say which model it is, as
  `novel.load` takes them.

  Args:
    workdir: folder of a run.
    pretrained: GGUF, llama2.c or safetensors weights instead of a run.
    stack: 'groups' or 'copies': the pretrained MLPs become levels.
    periods: of these levels, such as 128+512.
    blocks: which of their blocks learn.
    rate: their inner rate.
    dtype: that it computes in: float32 or bfloat16.
    levels: 'on', or 'off' for levels that learn nothing while they read.
    max_length: tokens of prompt and answer that are read, the last ones; what
      attention sees of a longer text.
    seed: of what is drawn at a temperature.
    batch_size: rows at a time; 'auto' is 8.
    max_batch_size: not more rows than this.
    device: not heeded: lm-eval gives cuda:0 where nobody asked for any; JAX
      takes the accelerator it finds, or what JAX_PLATFORMS says.

  Raises:
    Refused: for arguments that there are not or that do not fit, and for a
      model that cannot be loaded, in words.
  """

  def __init__(
    self,
    workdir: str | None = None,
    pretrained: str | None = None,
    stack: str = '',
    periods: str | int = '128',
    blocks: str = 'all',
    rate: float = 0.1,
    dtype: str | None = None,
    levels: str = 'on',
    max_length: int = 2048,
    seed: int = 0,
    batch_size: int | str = 1,
    max_batch_size: int | None = None,
    device: str | None = None,
    **unknown,
  ):
    super().__init__()
    _check_known(unknown)
    _check_numbers(max_length=max_length, seed=seed, rate=rate)
    if (workdir is None) == (pretrained is None):
      raise Refused('give workdir=RUN or pretrained=FILE, one of them')
    if levels not in ('on', 'off'):
      raise Refused(f'levels={levels}: on or off')
    if max_length < 2:
      raise Refused(f'max_length={max_length}: at least 2 tokens')
    self._rows = rows(batch_size, max_batch_size)
    del device
    words = tuple(str(periods).split('+'))
    how = novel.Stack(stack, words, str(blocks), rate)
    try:
      made = novel.load(workdir, pretrained, how, dtype)
    except (
      ValueError, OSError, ImportError, checkpoint.CheckpointError
    ) as error:  # fmt: skip
      raise Refused(str(error)) from error
    if levels == 'off' and made.model.cfg.stream:
      made = made._replace(model=streaming.frozen(made.model))
    self.made, self.max_length, self._seed = made, max_length, seed
    self._name = str(workdir or pretrained)

  @classmethod
  def create_from_arg_obj(cls, arg_dict, additional_config=None):
    """As lm-eval's; refuses what has a flag of its own."""
    flags = {k for k, v in (additional_config or {}).items() if v is not None}
    for name in sorted(flags & arg_dict.keys()):
      raise Refused(
        f'{name}={arg_dict[name]} as a model argument: give --{name} instead'
      )
    return super().create_from_arg_obj(arg_dict, additional_config)

  @property
  def _asked(self) -> asking.Asked:
    return asking.Asked(self.made.model.cfg, self.made.params, self._rows)

  @property
  def tokenizer_name(self) -> str:
    """Names the model for lm-eval's cache of requests."""
    return self._name.replace('/', '__')

  @property
  def eot_token_id(self) -> int:
    return self.made.tokenizer.eos

  @property
  def prefix_token_id(self) -> int:
    """What is read before a text that has nothing before it."""
    return self.made.tokenizer.bos

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None
  ) -> list[int]:
    """Ids of a text; a bos first where the model wants one, or as told."""
    tokenizer = self.made.tokenizer
    if add_special_tokens is None:
      add_special_tokens = tokenizer.adds_bos
    first = [tokenizer.bos] if add_special_tokens else []
    return first + list(tokenizer.encode(string))

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False):
    pairs = [self._fitting(*request[1:]) for request in requests]
    cfg, params = self.made.model.cfg, self.made.params
    with self._bar(len(pairs), 'loglikelihood', disable_tqdm) as bar:
      if cfg.stream:
        found = asking.score_learning(
          cfg, params, pairs, self._rows, bar.update
        )
      else:
        found = asking.score(self._asked, pairs, bar.update)
    for (texts, _, _), score in zip(requests, found):
      self.cache_hook.add_partial('loglikelihood', texts, tuple(score))
    return [tuple(score) for score in found]

  def _fitting(self, prompt, answer):
    """The end of prompt and answer that `max_length` leaves, as lm-eval's."""
    if len(answer) >= self.max_length:
      raise Refused(
        f'an answer of {len(answer)} tokens; max_length={self.max_length} '
        'leaves no room for a prompt: give a larger one'
      )
    return prompt[-(self.max_length - len(answer)) :], answer

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
    """Nats of whole texts, each read once as a stream, with its sign.

    lm-eval's own models cut what is longer than `max_length` and start anew;
    here the state is carried on, and attention sees the last `max_length`.
    """
    texts = [request.args[0] for request in requests]
    rows = [
      [self.prefix_token_id, *self.tok_encode(text, False)] for text in texts
    ]
    with self._bar(len(rows), 'loglikelihood_rolling', disable_tqdm) as bar:
      found = rolling.logs(
        self.made.model,
        self.made.params,
        rows,
        self.max_length,
        self._rows,
        bar.update,
      )
    for text, log in zip(texts, found):
      self.cache_hook.add_partial('loglikelihood_rolling', (text,), log)
    return found

  def generate_until(self, requests, disable_tqdm: bool = False):
    """Writes on until a stop; greedily unless the request says otherwise."""
    alike: dict[tuple, list[int]] = {}
    for i, request in enumerate(requests):
      alike.setdefault(_wishes(request.args[1]), []).append(i)
    said: list[str] = [''] * len(requests)
    with self._bar(len(requests), 'generate_until', disable_tqdm) as bar:
      for wishes, places in alike.items():
        texts = [requests[i].args[0] for i in places]
        for i, text in zip(places, self._write(texts, *wishes, bar)):
          said[i] = text
          self.cache_hook.add_partial('generate_until', requests[i].args, text)
    return said

  def _write(self, texts, most: int, temperature: float, stops, bar):
    if most >= self.max_length:
      raise Refused(
        f'max_gen_toks={most}: fewer than max_length={self.max_length}'
      )
    made = self.made
    prompts = [
      self.tok_encode(text) or [self.prefix_token_id] for text in texts
    ]
    prompts = [prompt[most - self.max_length :] for prompt in prompts]
    if not made.model.cfg.stream:
      return writing.write(
        self._asked,
        made.tokenizer,
        prompts,
        most,
        stops,
        temperature,
        self._seed,
        bar.update,
      )
    how = sampling.Sampling(temperature, seed=self._seed)
    said = []
    for prompt in prompts:
      said.append(writing.write_learning(made, prompt, most, stops, how))
      bar.update(1)
    return said

  def _bar(self, total: int, words: str, hidden: bool):
    return tqdm(total=total, desc=f'nestax {words}', disable=hidden)


def _check_known(unknown: dict) -> None:
  if unknown:
    words = ', '.join(f'{name}={value}' for name, value in unknown.items())
    known = [
      name
      for name, x in inspect.signature(Nestax).parameters.items()
      if x.kind is not x.VAR_KEYWORD
    ]
    raise Refused(
      f'{words}: no argument of the model nestax; there are {", ".join(known)}'
    )


def _check_numbers(rate, **whole) -> None:
  """lm-eval makes numbers of what looks like one, and words of the rest."""
  for name, value in whole.items():
    if isinstance(value, bool) or not isinstance(value, int):
      raise Refused(f'{name}={value}: a whole number')
  if isinstance(rate, bool) or not isinstance(rate, int | float):
    raise Refused(f'rate={rate}: a number')


def _wishes(kwargs: dict) -> tuple[int, float, tuple[str, ...]]:
  """Most tokens, temperature and stops of a request.

  Raises:
    Refused: for a way of sampling that there is not.
  """
  how = dict(normalize_gen_kwargs(kwargs))
  stops, most = tuple(how.pop('until')), how.pop('max_gen_toks')
  temperature = float(how.pop('temperature', 0.0))
  if not how.pop('do_sample'):
    temperature = 0.0
  known = {'top_p': 1.0, 'top_k': 0, 'num_beams': 1}
  for name, value in how.items():
    if name not in known or value not in (known[name], None):
      raise Refused(
        f'generation_kwargs: {name}={value!r}: nestax takes until, '
        'max_gen_toks, do_sample and temperature'
      )
  return most, temperature, stops


def rows(batch_size: int | str, most: int | None) -> int:
  """Rows at a time, of lm-eval's --batch_size and --max_batch_size.

  Raises:
    Refused: for another word than auto, or fewer than one row.
  """
  if most is not None and not str(most).isdigit():
    raise Refused(f'max_batch_size={most}: a number of rows')
  if str(batch_size).split(':')[0] == 'auto':
    count = _AUTO
  elif str(batch_size).isdigit() and int(batch_size):
    count = int(batch_size)
  else:
    raise Refused(f'batch_size={batch_size}: a number of rows, or auto')
  return min(count, int(most)) if most else count
