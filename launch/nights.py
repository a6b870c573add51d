"""Days and nights: a model reads, sleeps, wakes up as its next version."""

import contextlib
import functools
import math
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np

from nestax.cms.experts import SlotsError
from nestax.launch import (
  by_level,
  checkpoint,
  days,
  filters,
  history,
  known,
  life,
  lock,
  quiz,
  rehearsal,
  report,
  studies,
)
from nestax.launch.life import Being, Past
from nestax.launch.plans import Plan
from nestax.launch.run import Interrupted, Signals
from nestax.models import model_state
from nestax.sleep import consolidate, owners, replay, texts


def live(plan: Plan, out) -> list[dict]:
  """Reads and sleeps until all days are over, from where it stopped last.

  Leaves in `out`: `checkpoints`, `lineage.jsonl`, `night.jsonl`,
  `retention.png`, `levels.png`. The newest checkpoint is a model that other
  commands load.

  Args:
    plan: from `plans.prepare`.
    out: folder of the life, made if it is not there.

  Returns:
    The rows of `night.jsonl`.

  Raises:
    Interrupted: after saving, when SIGTERM or SIGINT came.
    checkpoint.CheckpointError: if checkpoints cannot be written or read.
    lock.InUse: if somebody else lives in `out`.
    ValueError: if the texts are not those of the life in `out`, or a night
      finds no room (`SlotsError`).
  """
  checkpoint.check_writable(out, 'out')
  held = lock.held(out, flag='out')
  with held, Signals() as signals, report.Show() as show:
    life_ = Life(plan, out, show, signals)
    try:
      life_.go_on()
    finally:
      life_.store.close()
  return [by_level.row(row, life_.periods) for row in life_.past.rows]


class Life:
  """A model, what it remembers, and where it lies on disk."""

  def __init__(self, plan: Plan, out, show: report.Show, signals: Signals):
    """Begins a life in the folder `out`, or goes on with the one there.

    Raises:
      checkpoint.CheckpointError: if that life cannot be gone on with.
      ValueError: if it has read other texts, or has other owners.
    """
    self.plan, self.out = plan, pathlib.Path(out)
    self.show, self.signals = show, signals
    names = life.owners(out) or list(days.owners(plan.days))
    options = plan.options
    self.past = Past(names, replay.Replay(options.capacity))
    stop = functools.partial(self._stop_if_asked, saved=True)
    self.known = known.Known(plan, self.past, show, stop)
    self.store = life.Store(self.out, plan.made, options, show.say)
    self.being = self._born()
    found = self.store.restore(self.being, self.past)
    if found is None:
      first = history.never_slept(plan, self.being, names)
      told = self.known.morning(first, {}, set())
      history.remember(plan, self.past, *told)
      self.store.save(self.being, self.past)
    else:
      self.being = found
      history.check_days(self.past, plan.days, self.out)
      history.name_days(self.past, plan.days)
    self.past.replay.capacity = options.capacity
    rehearsal.bound(
      self.past.earlier, options.held, options.seed, self.past.nights
    )
    history.write(self.out, self.plan, self.past)

  @property
  def periods(self) -> tuple[int, ...]:
    return self.plan.made.model.cfg.stream.periods

  def _born(self) -> Being:
    made, B = self.plan.made, len(self.past.owners)
    window = self.plan.options.window
    state = model_state.init_state(made.model.cfg, B, window)
    born = Being(made.params, state, jnp.zeros((B, made.model.cfg.V)))
    # one placement for all: programs are compiled once, not again a night later
    return jax.device_put(born, jax.devices()[0])

  def go_on(self) -> None:
    """Reads what is left of the days; sleeps when it is time, or asked to."""
    past, options = self.past, self.plan.options
    begun = past.step
    if past.dusk:  # the last night was not slept to its end
      self.sleep()
    while past.day < len(self.plan.days):
      whole = self._read_on()
      if whole:
        past.day, past.done = past.day + 1, {}
      if options.sleep_every == 0 or past.since >= options.sleep_every:
        self.sleep()
      else:
        self.store.save(self.being, past)
    if past.nights < options.nights and past.replay.owners:  # asked to
      self.sleep()
    if past.step == begun:  # whatever is done ends with a checkpoint
      self.show.say(history.nothing_left(past, len(self.plan.days)))

  def _read_on(self) -> bool:
    """Reads to the end of the day (True), or until it is time to sleep."""
    past, plan = self.past, self.plan
    options, day = plan.options, plan.days[past.day]
    readings = options.readings
    if len(past.marks) == past.day:
      marks = days.mark(day).items()  # of who was forgotten nothing is kept
      past.marks.append({x: crc for x, crc in marks if x in past.present})
      past.called[str(past.day)] = day.name
    names = past.names
    total, nats, count = sum(days.left(day, names, {}, readings)), 0.0, 0
    while call := days.call(day, names, past.done, options.piece, readings):
      nats += self._read(call, day, names)
      count += call.reads_B.sum() * call.tokens_BxL.shape[1]
      done = total - sum(days.left(day, names, past.done, readings))
      words = f'{nats / count:.3f} nats a token'
      self.show.update(f'day {day.name}', done, total, words)
      self._stop_if_asked()
      due = options.sleep_every and past.since >= options.sleep_every
      if due and self._may_sleep():
        return not any(days.left(day, names, past.done))
    return True

  def _read(self, call: days.Call, day: days.Day, names) -> float:
    """Reads a call of a day; gives what its tokens cost together, nats."""
    being, past = self.being, self.past
    state, logits, nats_BxL = life.read(
      self.plan.made.model,
      being.params,
      being.state,
      being.logits_BxV,
      call.tokens_BxL,
      call.reads_B,
    )
    self.being = being._replace(state=state, logits_BxV=logits)
    nats_BxL, width = np.asarray(nats_BxL), call.tokens_BxL.shape[1]
    for row in np.flatnonzero(call.reads_B):
      done = past.done.get(names[row], 0)
      # what is read again was slept on by its first reading, and cost more then
      new = min(width, max(0, len(day.tokens[names[row]]) - done))
      if new:
        tokens = tuple(map(int, call.tokens_BxL[row, :new]))
        cost = float(nats_BxL[row, :new].mean())
        piece = replay.Piece(names[row], tokens, cost, quiz.MARK + day.name)
        whole = new == self.plan.options.piece
        (past.replay.add if whole else past.replay.extend)(piece)
      past.done[names[row]] = done + width
    past.since += width
    return float(nats_BxL[call.reads_B].sum())

  def _may_sleep(self) -> bool:
    """Whether the limit allows another night."""
    return not 0 <= self.plan.options.nights <= self.past.nights

  def sleep(self) -> None:
    """One night, if the limit allows it and there is something to sleep on."""
    past, plan = self.past, self.plan
    how = plan.options.night
    past.dusk = self._may_sleep()
    self.store.save(self.being, past)  # where a night that is killed begins
    if not past.dusk:
      return
    keep, told, spent = self._filters()
    try:
      day = texts.gather(
        how.texts,
        plan.tools.words.pad,
        past.owners,
        past.replay,
        keep,
        plan.only or None,
      )
    except texts.NothingRead as nothing:
      self.show.say(f'no night: {nothing}')
      past.dusk, past.since = False, 0
      self.store.save(self.being, past)  # or the next start tries once more
      return
    pieces = [
      x
      for x in replay.consolidated(past.replay.pieces(), *keep)
      if x.owner in day.names
    ]
    awake = plan.tools, self.being.params, self.being.state, day
    with self._advising():  # before questions are asked
      owners.check_room(*awake, past.nights + 1)
    about = quiz.about(pieces)
    dusk = self.known.dusk(self.being, about)
    with self._advising():
      slept = owners.night(
        *awake,
        plan.core,
        past.nights + 1,
        jax.random.key(plan.options.seed),
        self._tell,
        (*plan.tasks, *studies.among(plan.lessons, pieces)),
        *self._rehearsed(),
      )
    slept = slept._replace(
      metrics=slept.metrics | told, seconds=spent | slept.seconds
    )
    for name in slept.owners:
      past.replay.delete(name)
    self._remember(day, slept.owners)
    self.being = self.being._replace(params=slept.params, state=slept.state)
    history.remember(plan, past, *self.known.morning(slept, dusk, about))
    self.store.save(self.being, past)
    history.write(self.out, self.plan, self.past)
    report.show_night(past.rows[-1], self.periods)

  @contextlib.contextmanager
  def _advising(self):
    """Says of a night that finds no room how to go on."""
    try:
      yield
    except SlotsError as error:
      raise SlotsError(
        f'{error}. The night is not slept, and nothing is lost: '
        f'{self._way_on(error)}'
      ) from None

  def _way_on(self, error: SlotsError) -> str:
    # the slots of a life stay those that it began with
    anew = 'a life with more --slots begins in another --out'
    if self.being.state.owned is not None:
      return anew
    if not isinstance(error, consolidate.MergeError):
      return f'the same command with --set=night.full=merge goes on, or {anew}'
    if not error.lost <= 1:  # as night.lost has to be
      return anew
    enough = math.ceil(100 * error.lost) / 100
    return (
      f'the same command with --set=night.lost={enough:g} goes on, or {anew}'
    )

  def _rehearsed(self):
    """What tonight keeps of texts to rehearse, and of each owner's days."""
    past, plan, options = self.past, self.plan, self.plan.options
    lot, rows = (options.seed, past.nights + 1), None
    if plan.rehearsed is not None:
      rows = rehearsal.drawn(plan.rehearsed, options.rehearsed, *lot)
    length, pad = options.night.texts.length, plan.tools.words.pad
    return rows, rehearsal.earlier(
      past.earlier, past.owners, options.earlier, length, pad, *lot
    )

  def _remember(self, day: texts.Day, names) -> None:
    past, options = self.past, self.plan.options
    if options.earlier:
      lot = options.seed, past.nights + 1
      rehearsal.remember(past.earlier, day, names, *lot)
    else:
      past.earlier.clear()

  def _filters(self):
    """What says of a piece that it is slept on, how many are not, seconds."""
    past, being, plan = self.past, self.being, self.plan
    if not filters.any_of(plan):
      return [], {}, {}
    start = time.perf_counter()
    pieces = [
      piece
      for piece in past.replay.pieces()
      if not plan.only or piece.owner in plan.only
    ]
    keep = filters.of_plan(plan, being.params, being.state, past.owners, pieces)
    # asked once: a predicate may remember what it has seen
    good = {id(piece) for piece in replay.consolidated(pieces, *keep)}
    left = len(pieces) - len(good)
    spent = {'filters': time.perf_counter() - start}
    if left:
      self.show.say(
        f'{left} of {len(pieces)} pieces of what was read are not slept on: '
        'too surprising, against the slow weights, or refused'
      )
    told = {'pieces': len(pieces), 'left_out': left}
    return [lambda piece: id(piece) in good], told, spent

  def _tell(self, k: int, step: int, parts: dict) -> None:
    total = self.plan.options.night.seed.steps
    words = ''
    if step % 10 == 0 or step == total:
      words = ', '.join(f'{n} {float(x):.3f}' for n, x in parts.items())
    name = f'night {self.past.nights + 1}: every {self.periods[k]}'
    self.show.update(name, step, total, words)
    self._stop_if_asked(saved=True)

  def _stop_if_asked(self, saved: bool = False) -> None:
    """Ends here if a signal came; a night that is left was never slept."""
    number = self.signals.received
    if not number:
      return
    if not saved:
      self.store.save(self.being, self.past)
    raise Interrupted(
      f'{signal.Signals(number).name}: saved checkpoint {self.past.step} in '
      f'{self.out}; the same command goes on from there',
      number,
    )
