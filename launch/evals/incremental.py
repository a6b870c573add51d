"""Class-incremental classification: classes come in stages and have to stay.

The user's files (CLINC150, Banking77, DBpedia: see `classes.read`); after each
stage all tests so far are asked, all classes so far to choose from. A trained
model does it in three ways:

  levels   it reads the stage's examples as a stream, its levels learn, and the
           class is the name that it then finds likeliest
  tuning   its weights are tuned on the examples, stage after stage; the same
  means    nothing is learned: the nearest mean of the frozen features

    nestax-evaluate --suite=incremental \\
      --models='SmolLM2.gguf:stack=groups;rate=0.003;optimizer=muon' \\
      --set=incremental.train=clinc150/data_full.json \\
      --set=incremental.domains=clinc150/domains.json
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nestax.launch import trained
from nestax.launch.evals import classes, classifiers, learners, streaming, suite

METHODS = {
  'levels': classifiers.levels,
  'tuning': classifiers.tuning,
  'means': classifiers.means,
}


@dataclasses.dataclass(frozen=True)
class Options:
  """What is learned, and how.

  Attributes:
    train, test: files, see `classes.read`; no `test` means that of `train`.
    domains: file that says which classes come together; '' deals them out.
    stages: to deal them out to.
    text, label: names of columns.
    most_train, most_test: examples of a class; 0 for all.
    methods: a plus between them.
    how: see `classifiers.How`.
  """

  train: str = ''
  test: str = ''
  domains: str = ''
  stages: int = 10
  text: str = 'text'
  label: str = 'label'
  most_train: int = 0
  most_test: int = 0
  methods: str = 'levels+tuning+means'
  how: classifiers.How = classifiers.How()


def go(
  method: classifiers.Method,
  stages: Sequence[classes.Stage],
  rng,
  say: Callable[[int], None],
) -> list[list[float]]:
  """Learns stage after stage; gives what `classes.measures` takes."""
  memory, names, right = method.memory, [], []
  for count, stage in enumerate(stages, 1):
    memory = method.learn(memory, stage, rng)
    names += stage.labels
    row = []
    for earlier in stages[:count]:
      chosen = method.choose(memory, names, [e.text for e in earlier.test])
      row.append(
        float(np.mean([c == e.label for c, e in zip(chosen, earlier.test)]))
      )
    right.append(row)
    say(count)
  return right


@functools.lru_cache(1)
def _model(word: str) -> trained.Trained:
  return learners.load(word)


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """A cell for each method and model."""
  methods = options.methods.split('+')
  for name in methods:
    if name not in METHODS:
      raise ValueError(
        f'--set=incremental.methods={options.methods}: of {"+".join(METHODS)}'
      )
  if not options.train:
    raise ValueError('--set=incremental.train=FILE: the examples are needed')
  for word in asked.models:
    learners.parse(word)  # before the files, which may be long
  _stages(options, 0)  # says at once what is wrong with the files
  for word in asked.models:
    check = functools.partial(learners.check, word)
    for name in methods:
      key = dataclasses.asdict(options) | {'method': name}
      key |= {'seeds': asked.seeds}
      del key['methods']
      run = functools.partial(run_cell, options, word, name, asked.seeds)
      yield suite.Cell('classes', f'{name}, {word}', key, run, check)


def _stages(options: Options, seed: int) -> list[classes.Stage]:
  columns = options.text, options.label
  train = classes.read(options.train, 'train', *columns)
  test = classes.read(options.test or options.train, 'test', *columns)
  rng = np.random.default_rng(seed)
  if options.domains:
    together = classes.groups(options.domains)
  else:
    labels = [example.label for example in train]
    together = classes.deal(labels, options.stages, rng)
  return classes.stages(
    train, test, together, rng, options.most_train, options.most_test
  )


def run_cell(
  options: Options, word: str, name: str, seeds: int, say
) -> list[dict]:
  """Goes through the stages once a seed, each in an order of its own."""
  made, rows = _model(word), []
  if name != 'levels' and made.model.cfg.stream:
    made = made._replace(model=streaming.frozen(made.model))
  for seed in range(seeds):
    found = _stages(options, seed)
    of, before = seeds * len(found), seed * len(found)
    right = go(
      METHODS[name](made, options.how),
      found,
      np.random.default_rng(seed),
      lambda done, before=before, of=of: say(before + done, of),
    )
    scores = classes.measures(right, [len(stage.test) for stage in found])
    after = scores.pop('stages')
    rows.append(
      {'seed': seed, 'scores': scores, 'stages': after, 'right': right}
    )
  return rows


EVALUATION = suite.Evaluation(
  name='incremental',
  options=Options(),
  cells=cells,
  words='Accuracy after all stages (final) and on all tests so far (average), '
  'what earlier stages lost since their best (forgetting, less is better) and '
  'since they were learned (backward), %.',
)
