"""ARC few-shot: a task's pairs are read as a stream, its tests are drawn.

A task is one JSON file, `{"train": [...], "test": [...]}`; what is right is
the whole grid, cell by cell. In a Transformer the pairs are in the window of
attention; levels that learn have them also in their weights.

    nestax-evaluate --suite=arc --models=SmolLM2.gguf \\
      --set='arc.tasks=arc/training/*.json' --set=arc.most=40
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from nestax.launch import trained
from nestax.launch.evals import babi, contexts, learners, suite, writing
from nestax.launch.evals.asking import Asked
from nestax.sleep import tasks


@dataclasses.dataclass(frozen=True)
class Options:
  """Which tasks, and how they are read.

  Attributes:
    tasks: files, a glob.
    most: tasks, the first ones; 0 for all.
    passes: over a task's pairs.
    window: tokens that attention sees.
    piece: tokens a call.
    rows: tests at a time.
    answer: tokens of a grid that is drawn, at most.
  """

  tasks: str = ''
  most: int = 0
  passes: int = 1
  window: int = 4096
  piece: int = 128
  rows: int = 2
  answer: int = 1024


def grid(said: str) -> tuple[str, ...]:
  """Rows of a grid as it is drawn, up to the first line without any cell."""
  rows = []
  for line in said.strip('\n').split('\n'):
    if not line.strip():
      break
    rows.append(line.strip())
  return tuple(rows)


def score(said: str, want: str) -> tuple[bool, float]:
  """Whether a grid is right, and the share of its cells that are.

  No cell of a grid of another size is right.
  """
  drawn, right = grid(said), grid(want)
  if [len(row) for row in drawn] != [len(row) for row in right]:
    return False, 0.0
  cells = zip(''.join(drawn), ''.join(right))
  share = float(np.mean([a == b for a, b in cells]))
  return drawn == right, share


def attempt(
  made: trained.Trained, options: Options, task: tasks.ArcTask
) -> list[str]:
  """Reads the pairs and draws the tests."""
  context = list(task.context())
  pairs = context[1:]  # without the bos, which stands once
  ids = (context[:1] if made.tokenizer.adds_bos else []) + pairs
  ids += pairs * (options.passes - 1)
  row = np.array([ids], np.int32)
  cfg, params = made.model.cfg, made.params
  state = contexts.read(cfg, params, row, options.window, options.piece)
  asked = Asked(cfg, params, options.rows, contexts.row(state, 0))
  prompts = [list(prompt)[1:] for prompt, _ in task.questions()]
  return writing.write(asked, made.tokenizer, prompts, options.answer, ['\n\n'])


@functools.lru_cache(1)
def _model(word: str) -> trained.Trained:
  return learners.load(word)


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """A cell for each model; nothing is drawn at random, so there is one seed."""
  paths = babi.find(options.tasks, '--set=arc.tasks')
  for path in paths[: options.most or None]:
    tasks.arc(path, list, 0)  # says at once what is wrong with a file
  for word in asked.models:
    learners.parse(word)
    check = functools.partial(learners.check, word)
    run = functools.partial(run_cell, options, word)
    yield suite.Cell('grids', word, dataclasses.asdict(options), run, check)


def run_cell(options: Options, word: str, say) -> list[dict]:
  """Goes through all tasks."""
  made, right, shares = _model(word), [], []
  paths = babi.find(options.tasks, '--set=arc.tasks')[: options.most or None]
  for i, path in enumerate(paths, 1):
    # its parts go on from each other
    encode = made.tokenizer.encode_after
    task = tasks.arc(path, encode, made.tokenizer.bos)
    said = attempt(made, options, task)
    wanted = [made.tokenizer.decode(list(w)) for _, w in task.questions()]
    for one, want in zip(said, wanted):
      whole, share = score(one, want)
      right.append(whole)
      shares.append(share)
    say(i, len(paths))
  scores = {'right': 100 * np.mean(right), 'cells': 100 * np.mean(shares)}
  return [{'seed': 0, 'scores': scores, 'tests': len(right)}]


EVALUATION = suite.Evaluation(
  name='arc',
  options=Options(),
  cells=cells,
  words='Share of test grids drawn rightly, and of cells in grids of the right '
  'size, %.',
)
