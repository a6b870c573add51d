"""Continual translation of languages that a model has never read.

Setting 1: a model reads sentence pairs of one language as a stream and is then
asked to translate others. Setting 2: it reads two languages one after the
other, and then translates from both. Only what its state holds can help it: in
a Transformer that is the window of attention (in-context learning), else also
what its levels have written. chrF by sacrebleu, of the user's own CLDF data
sets, tables or JSON lines (`parallel.read`).

    nestax-evaluate --suite=translation \\
      --models='SmolLM2.gguf,SmolLM2.gguf:stack=groups;periods=128+512' \\
      --set=translation.first=palula/cldf --set=translation.second=daakaka/cldf
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from nestax.launch import trained
from nestax.launch.evals import contexts, learners, parallel, suite, writing
from nestax.launch.evals.asking import Asked
from nestax.launch.evals.parallel import Pair


@dataclasses.dataclass(frozen=True)
class Options:
  """What is learned, and what is asked.

  Attributes:
    first, second: languages, paths as `parallel.read` takes them; no second
      leaves setting 2 out.
    first_name, second_name: what the prompts call them; '' takes the name of
      the data set's folder or file.
    first_book, second_book: texts that are read before the pairs, such as a
      grammar; '' for none.
    into: name of the language that is translated into.
    source, target: names of columns.
    learn: pairs to read; 0 for all that are not asked.
    tests: pairs to ask.
    passes: over the pairs.
    window: tokens that attention sees.
    piece: tokens a call.
    most: tokens of a translation.
    rows: translations at a time.
  """

  first: str = ''
  second: str = ''
  first_name: str = ''
  second_name: str = ''
  first_book: str = ''
  second_book: str = ''
  into: str = 'English'
  source: str = 'source'
  target: str = 'target'
  learn: int = 0
  tests: int = 50
  passes: int = 1
  window: int = 2048
  piece: int = 512
  most: int = 64
  rows: int = 16


@dataclasses.dataclass(frozen=True)
class Language:
  """One language, split.

  Attributes:
    name: in prompts.
    into: name of the other side's.
    book: read before the pairs.
    learn: pairs to read.
    ask: pairs to translate.
  """

  name: str
  into: str
  book: str
  learn: tuple[Pair, ...]
  ask: tuple[Pair, ...]

  def put(self, source: str) -> str:
    """A sentence, before its translation."""
    return f'{self.name}: {source}\n{self.into}:'

  def text(self, passes: int, rng) -> str:
    """All that is read of it; pairs in another order every time."""
    parts = [self.book.strip() + '\n\n'] if self.book.strip() else []
    for _ in range(passes):
      for i in rng.permutation(len(self.learn)):
        source, target = self.learn[i]
        parts.append(f'{self.put(source)} {target}\n\n')
    return ''.join(parts)


def language(
  options: Options, path: str, name: str, book: str, seed: int
) -> Language:
  """Reads a language and splits it."""
  pairs = parallel.read(path, options.source, options.target)
  rng = np.random.default_rng(seed)
  text = ''
  if book:
    text = pathlib.Path(book).expanduser().read_text(encoding='utf-8')
  learn, ask = parallel.split(pairs, options.tests, rng, text)
  learn = learn[: options.learn or None]
  return Language(name or called(path), options.into, text, (*learn,), (*ask,))


def called(path: str) -> str:
  """What a data set is called by its path: the folder above `cldf`."""
  parts = [part for part in pathlib.Path(path).parts if part != 'cldf']
  name = pathlib.Path(parts[-1]).stem.replace('-metadata', '')
  return name[:1].upper() + name[1:]


def chrf(said: Sequence[str], want: Sequence[str]) -> float:
  """chrF2 of a whole set of translations, 0 to 100.

  Raises:
    ImportError: if sacrebleu is not installed.
  """
  try:
    import sacrebleu
  except ImportError as error:
    raise ImportError(
      "chrF needs sacrebleu: pip install 'nestax[eval]'"
    ) from error
  return sacrebleu.corpus_chrf(list(said), [list(want)]).score


def translate(
  made: trained.Trained,
  options: Options,
  read: Sequence[Language],
  ask: Sequence[Language],
  rng,
) -> dict[str, list[str]]:
  """Reads languages one after the other, then translates from some."""
  tokenizer = made.tokenizer
  ids = [tokenizer.bos] if tokenizer.adds_bos else []
  for one in read:
    ids += tokenizer.encode(one.text(options.passes, rng))
  row = np.array([ids], np.int32)
  cfg, params = made.model.cfg, made.params
  state = contexts.read(cfg, params, row, options.window, options.piece)
  asked = Asked(cfg, params, options.rows, contexts.row(state, 0))
  said = {}
  for one in ask:
    prompts = [tokenizer.encode_after(one.put(pair.source)) for pair in one.ask]
    said[one.name] = [
      text.strip()
      for text in writing.write(asked, tokenizer, prompts, options.most, ['\n'])
    ]
  return said


@functools.lru_cache(1)
def _model(word: str) -> trained.Trained:
  return learners.load(word)


def _languages(options: Options, seed: int) -> list[Language]:
  if not options.first:
    raise ValueError('--set=translation.first=PATH: a language is needed')
  found = [(options.first, options.first_name, options.first_book)]
  if options.second:
    found.append((options.second, options.second_name, options.second_book))
  made = [language(options, *one, seed) for one in found]
  if len({one.name for one in made}) < len(made):
    raise ValueError(
      f'both languages are called {made[0].name}: give second_name'
    )
  return made


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """A cell for each setting and model."""
  tasks = ['alone', 'in sequence'][: len(_languages(options, 0))]
  for word in asked.models:
    learners.parse(word)
    check = functools.partial(learners.check, word)
    for task in tasks:
      key = dataclasses.asdict(options) | {'seeds': asked.seeds}
      run = functools.partial(run_cell, options, word, task, asked.seeds)
      yield suite.Cell(task, word, key, run, check)


def run_cell(
  options: Options, word: str, task: str, seeds: int, say
) -> list[dict]:
  """Reads and translates once a seed, which chooses what is asked."""
  made, rows = _model(word), []
  for seed in range(seeds):
    spoken = _languages(options, seed)
    rng = np.random.default_rng(seed)
    said = {}
    for one in spoken if task == 'alone' else spoken[:1]:
      both = [one] if task == 'alone' else spoken
      said |= translate(made, options, both, both, rng)
    scores = {
      one.name: chrf(said[one.name], [pair.target for pair in one.ask])
      for one in spoken
    }
    first = {one.name: said[one.name][:5] for one in spoken}
    rows.append({'seed': seed, 'scores': scores, 'said': first})
    say(seed + 1, seeds)
  return rows


EVALUATION = suite.Evaluation(
  name='translation',
  options=Options(),
  cells=cells,
  words='chrF of translations after reading sentence pairs of one language '
  '(alone) or of both, one after the other (in sequence).',
)
