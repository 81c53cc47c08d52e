"""Conducts one study: take back lost leases, tell, judge, suggest, and end it when it is done.

Each round loads what it needs, closes the transaction, lets sampler and pruner think, and applies
what they said in a new one.
"""

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog
from optuna.trial import TrialState
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from regtune import database, leasing, reporting, standing, studies
from regtune.errors import StaleView
from regtune.settings import Settings
from regtune.studies import Study
from service.scheduler import glances
from service.scheduler.failures import Failures
from service.scheduler.glances import Glance
from service.scheduler.mirror import Mirror, as_trials, read_trials

log = structlog.get_logger()

ACTOR = "scheduler"
SUGGESTION_SECONDS = 0.1
"""How long a round may think of suggestions, so that the first ones train while the others come."""

SPARE_TRIALS, LANES_PER_SPARE_TRIAL = 2, 4
"""One trial for every four that run, two at most, waits in case that a pruner stops several at
once: else their lanes would be empty for an epoch. More would be more stale than it pays."""

BUSY_SECONDS, MOST_TURNS = 0.5, 16
"""No more lanes are called for new trials than these keep busy for so long, by what trials last.

To wake a worker costs it as much as a trial that hardly trains, and to find nothing left as much
again. A lane may be expected to get through so many trials at most."""

MOST_AT_ONCE = 32
"""So many trials may wait, however soon each lane may be expected to be done with one."""

MOST_POLLS = 16
"""So many polls at most lie between two calls for a trial that nobody comes for."""

LATEST_TRIALS = 20
"""From so many it is known what trials last."""

_OPTUNA_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "cancelled": TrialState.FAIL,
}


@dataclass(frozen=True)
class Ended:
    """A trial that has ended since the last round."""

    number: int
    trial_id: int
    state: str
    value: float | None
    seconds: float | None
    """What its last lease has lasted; None if there was none."""


@dataclass(frozen=True)
class EpochRow:
    """An epoch that the mirror has not seen."""

    number: int
    trial_id: int
    attempt: int
    epoch: int
    validation_loss: float


@dataclass(frozen=True)
class News:
    """All that a round needs to know, read in one transaction."""

    study: Study
    glance: Glance
    room: int
    """How many more trials the budget allows."""
    seconds_spent: float
    ended: Sequence[Ended]
    epochs: Mapping[int, Sequence[tuple[int, float]]]
    """New epochs and their validation losses, by trial number."""
    attempts: Mapping[int, tuple[int, int]]
    """Trial id and attempt of the running trials, by number."""

    @property
    def out_of_time(self) -> bool:
        """Whether the budget's seconds are used up."""
        return _is_out_of_time(self.study, self.seconds_spent)


class Conductor:
    """Leads one study; made when its lock is won, thrown away when that is lost."""

    def __init__(self, engine: Engine, settings: Settings, study_id: int) -> None:
        """Read all that has happened so far; raise NotFound if the study has been deleted."""
        self._engine = engine
        self._settings = settings
        self._study_id = study_id
        with database.transaction(engine) as session:
            study = studies.by_id(session, study_id)
            rows = read_trials(session, study_id, study.spec)
        self._prunes = study.spec.pruner.name != "none"
        self._mirror = Mirror(study.spec)
        noted = self._mirror.restore(as_trials(rows, study.spec))
        if noted:
            with database.transaction(engine) as session:
                _keep_notes(session, {rows[number].trial_id: noted[number] for number in noted})
        self._failures = Failures()
        for row in rows:
            self._failures.note(row.number, row.our_state)
        self._room = 0
        self._judged_epochs = 0
        self._first_waiting: int | None = None
        self._call_pause = settings.poll_seconds / 2
        self._call_due = 0.0
        self._lasted: deque[float] = deque(maxlen=LATEST_TRIALS)

    def has_ends_or_wants(self, glance: Glance) -> bool:
        """Say whether trials have ended or lost their leases, or some may be suggested now."""
        return (
            glance.open != len(self._mirror.open_numbers)
            or glance.overdue > 0
            or min(self._room, self._wanted(glance)) > 0
        )

    def has_epochs(self, glance: Glance) -> bool:
        """Say whether the pruner has epochs to judge that it has not seen in the last round."""
        return self._prunes and glance.epochs != self._judged_epochs

    def round(self) -> bool:
        """Bring the study one step further; return whether there is more to do at once.

        Raise StaleView if the mirror has missed something.
        """
        self._room = 0
        news = self._take_stock()
        if news.glance.open > len(self._mirror.open_numbers):
            raise StaleView("another scheduler has appended trials")
        self._judged_epochs = news.glance.epochs
        self._tell(news)
        self._judge(news)
        if self._conclude(news):
            return False
        self._call_again(news)
        return self._suggest(news)

    def _take_stock(self) -> News:
        news = self._read()
        if not news.glance.overdue:
            return news
        with database.transaction(self._engine) as session:
            lost = leasing.expire(session, self._study_id, self._settings.max_attempts)
        if lost:
            log.warning("leases_lost", study_id=self._study_id, trials=len(lost))
        return self._read()

    def _read(self) -> News:
        with database.transaction(self._engine) as session:
            return self._news(session)

    def _news(self, session: Session) -> News:
        study = studies.by_id(session, self._study_id)
        glance = glances.of(
            session,
            self._study_id,
            self._settings.lease_seconds,
            self._settings.suspect_from,
        )
        ended = self._read_ended(session)
        epochs = self._read_epochs(session, ended) if self._prunes or ended else []
        by_number: dict[int, list[tuple[int, float]]] = {}
        for row in epochs:
            by_number.setdefault(row.number, []).append((row.epoch, row.validation_loss))
        return News(
            study=study,
            glance=glance,
            room=studies.room(session, study),
            seconds_spent=self._seconds_spent(session, study),
            ended=ended,
            epochs=by_number,
            attempts={row.number: (row.trial_id, row.attempt) for row in epochs},
        )

    def _seconds_spent(self, session: Session, study: Study) -> float:
        """Return the seconds since the first lease, where the budget asks for them; else 0."""
        if study.budget_seconds is None:
            return 0.0
        return standing.of(session, self._study_id).seconds_spent or 0.0

    def _read_ended(self, session: Session) -> Sequence[Ended]:
        rows = session.execute(
            _ENDED, {"study_id": self._study_id, "open": list(self._mirror.open_numbers)}
        )
        return [Ended(**row._mapping) for row in rows]

    def _read_epochs(self, session: Session, ended: Sequence[Ended]) -> Sequence[EpochRow]:
        """Read the epochs that the mirror has not seen: all for a pruner, else of pruned trials.

        Without a pruner only a diverged trial is pruned, and the sampler sees its last epochs.
        """
        numbers = (
            self._mirror.open_numbers
            if self._prunes
            else [trial.number for trial in ended if trial.state == "pruned"]
        )
        seen = [
            {"number": number, "epoch": self._mirror.judged_epochs.get(number, 0)}
            for number in numbers
        ]
        if not seen:
            return []
        rows = session.execute(_EPOCHS, {"study_id": self._study_id, "seen": json.dumps(seen)})
        return [EpochRow(**row._mapping) for row in rows]

    def _tell(self, news: News) -> None:
        """Tell the mirror what has ended, and keep what its pruner has noted on those trials."""
        notes = {}
        self._lasted.extend(t.seconds for t in news.ended if t.seconds is not None)
        for trial in news.ended:
            self._failures.note(trial.number, trial.state)
            self._mirror.report(trial.number, news.epochs.get(trial.number, ()), over=True)
            notes[trial.trial_id] = self._mirror.tell(
                trial.number, _OPTUNA_STATES[trial.state], trial.value
            )
        if self._prunes and any(notes.values()):
            with database.transaction(self._engine) as session:
                _keep_notes(session, notes)

    def _judge(self, news: News) -> None:
        """Let the pruner judge new epochs; keep what it says, and what it notes, together.

        Of what it has noted, whoever leads next takes it that the verdict has been heard.
        """
        over = {trial.number for trial in news.ended}
        verdicts, notes = {}, {}
        for number, epochs in news.epochs.items():
            if number in over:
                continue
            stop_at = self._mirror.report(number, epochs)
            trial_id, attempt = news.attempts[number]
            if fresh := self._mirror.take_notes(number):
                notes[trial_id] = fresh
            if stop_at is not None:
                name = news.study.spec.pruner.name
                verdicts[trial_id] = (attempt, f"pruned by {name} at epoch {stop_at}")
        if verdicts or notes:
            with database.transaction(self._engine) as session:
                _keep_notes(session, notes)
                reporting.request_stop(session, verdicts)

    def _conclude(self, news: News) -> bool:
        """End the study if it is done, as far as that can be seen now; return whether it is."""
        if not self._may_be_done(news):
            return False
        with database.transaction(self._engine) as session:
            # Looked at again under the study's lock: a client may stop or cancel it meanwhile.
            study = studies.lock(session, self._study_id)
            if not study.live:
                return True
            if study.state == "stopping":
                studies.withdraw_waiting(session, self._study_id, "the study was stopped", ACTOR)
            elif _is_out_of_time(study, news.seconds_spent):
                studies.withdraw_waiting(session, self._study_id, _time_is_up(study), ACTOR)
            ending = self._ending(session, study, news)
            if ending is None:
                return False
            state, reason = ending
            if state == "failed":
                studies.cancel_open(session, self._study_id, reason, ACTOR)
            studies.end(session, self._study_id, state, reason, ACTOR)
            log.info("study_ended", study=study.name, state=state, reason=reason)
            return True

    def _may_be_done(self, news: News) -> bool:
        """Say whether it is worth a look under the study's lock."""
        return (
            news.study.state not in ("active", "paused")
            or news.out_of_time
            or not news.glance.open
            or self._failures.in_a_row() >= self._failures_allowed
        )

    @property
    def _failures_allowed(self) -> int:
        return self._settings.max_consecutive_failures

    def _ending(self, session: Session, study: Study, news: News) -> tuple[str, str] | None:
        limit = self._failures_allowed
        if self._failures.in_a_row() >= limit:
            failed, reason = self._last_failed(session, limit)
            if failed >= limit:
                return "failed", f"{limit} trials failed in a row; the last one: {reason}"
        stands = standing.of(session, self._study_id)
        if stands.waiting or stands.running:
            return None
        if study.state == "stopping":
            return "stopped", study.reason or "stopped by request"
        used_up = self._used_up(session, study, news)
        if used_up is None:
            return None
        if stands.failed == stands.ended > 0:
            return "failed", f"every trial failed; the last one: {self._last_failed(session, 1)[1]}"
        return "completed", used_up

    def _last_failed(self, session: Session, count: int) -> tuple[int, str]:
        """Return how many of the last trials by number have failed, and why the latest has."""
        row = session.execute(_LAST_OUTCOMES, {"study_id": self._study_id, "limit": count}).one()
        return row.failed, row.reason

    def _used_up(self, session: Session, study: Study, news: News) -> str | None:
        """Say which limit of the budget a study with no open trial has reached, if any."""
        if study.appended == study.budget_trials:
            return f"all {study.budget_trials} trials have ended"
        if _is_out_of_time(study, news.seconds_spent):
            return _time_is_up(study)
        if studies.room(session, study) <= 0:
            return (
                f"of the budget of {study.budget_trial_epochs} trial-epochs less is left than the "
                f"{study.spec.training.max_epochs} that a trial may take"
            )
        return None

    def _call_again(self, news: News) -> None:
        """Call all workers if the same trial goes on waiting, though some of them have room.

        Those that were called for it have died, or train for longer than was expected; or the call
        was lost. Workers hardly look for themselves: most of a fleet may be idle. Where nobody
        comes, as while all have refused the study, it calls ever more seldom.
        """
        now, first = time.monotonic(), news.glance.first_waiting
        if news.study.state != "active" or first is None or first != self._first_waiting:
            self._first_waiting = first
            self._call_pause = self._settings.poll_seconds / 2
        elif now >= self._call_due:
            self._call_pause = min(2 * self._call_pause, MOST_POLLS * self._settings.poll_seconds)
            with database.transaction(self._engine) as session:
                leasing.call_everybody(session, self._study_id, self._settings.lease_seconds)
        else:
            return
        self._call_due = now + self._call_pause

    def _suggest(self, news: News) -> bool:
        """Append what living workers want; return whether some of that is left to suggest."""
        may_append = news.study.state == "active" and not news.out_of_time
        self._room = news.room if may_append else 0
        count = min(self._room, self._wanted(news.glance))
        if count <= 0:
            return False
        expected = self._mirror.next_number
        suggestions = self._mirror.suggest(count, SUGGESTION_SECONDS)
        with database.transaction(self._engine) as session:
            appended = leasing.append(
                session,
                self._study_id,
                suggestions,
                expected=expected,
                alive_seconds=self._settings.lease_seconds,
                turns=self._turns,
                actor=ACTOR,
            )
        if len(appended) != len(suggestions):
            raise StaleView("the study was changed or halted while its next trials were chosen")
        self._room -= len(appended)
        return len(appended) < count

    @property
    def _turns(self) -> int:
        """How many trials each lane that is called for new ones may be expected to train.

        By what the quicker ones of the latest trials have lasted: many workers at once on few cores
        keep each other waiting.
        """
        if not self._lasted:
            return 1
        quick = sorted(self._lasted)[len(self._lasted) // 4]
        return max(1, min(MOST_TURNS, int(BUSY_SECONDS / max(quick, 1e-3))))

    def _wanted(self, glance: Glance) -> int:
        """Return how many trials should be suggested, as far as the budget allows.

        As many as lanes want, but no more than are called for, see ``_turns``, so that those to
        come are chosen by what these have shown; with a pruner, which may stop several trials at
        once, so many at the least that the next few find a successor. Suspects wait until nothing
        else does, so they are none, unless all has failed for so long that they should train now
        and end the study: else each would be followed by another one until the budget is used up.
        """
        if self._failures.in_a_row(glance.suspects) >= self._failures_allowed:
            return 0
        wanted = glance.wanted_lanes
        wanted = max(min(wanted, MOST_AT_ONCE), -(-wanted // self._turns))
        if self._prunes and wanted > 0:
            wanted = max(wanted, min(SPARE_TRIALS, glance.running // LANES_PER_SPARE_TRIAL))
        return wanted - (glance.waiting - glance.waiting_suspects)


def _keep_notes(session: Session, notes: Mapping[int, Mapping[str, object]]) -> None:
    """Keep what sampler and pruner have noted on trials, by trial id."""
    rows = [
        {"trial_id": trial_id, "key": key, "value": json.dumps(value)}
        for trial_id, attrs in notes.items()
        for key, value in attrs.items()
    ]
    if rows:
        session.execute(_KEEP_NOTES, {"rows": json.dumps(rows)})


def _is_out_of_time(study: Study, seconds_spent: float) -> bool:
    return study.budget_seconds is not None and seconds_spent >= study.budget_seconds


def _time_is_up(study: Study) -> str:
    return f"the budget of {study.budget_seconds:g} seconds is used up"


_ENDED = text("""
SELECT number, trial_id, state, value, extract(epoch FROM finished_at - leased_at)::float AS seconds
FROM regtune.trials
WHERE study_id = :study_id AND number = ANY(:open) AND state NOT IN ('waiting', 'running')
ORDER BY finished_at, number
""")

# A trial's row says how far it is, so that only those with something new have their epochs looked
# up, each by a range of its key; OFFSET keeps the planner from reading them all for a hash.
_EPOCHS = text("""
SELECT t.number, t.trial_id, t.attempt, e.epoch, e.validation_loss
FROM json_to_recordset(cast(:seen AS json)) AS seen(number int, epoch int)
JOIN regtune.trials t ON t.study_id = :study_id AND t.number = seen.number
                     AND t.epochs > seen.epoch
CROSS JOIN LATERAL (
    SELECT epoch, validation_loss FROM regtune.epochs
    WHERE trial_id = t.trial_id AND attempt = t.attempt AND epoch > seen.epoch OFFSET 0) e
ORDER BY e.epoch, t.number
""")

# By number: suspects, which wait until nothing else does, fail in a row even if they are few.
_LAST_OUTCOMES = text("""
SELECT count(*) FILTER (WHERE state = 'failed') AS failed,
       (SELECT reason FROM regtune.trials
        WHERE study_id = :study_id AND state = 'failed'
        ORDER BY finished_at DESC, number DESC LIMIT 1) AS reason
FROM (SELECT * FROM regtune.trials
      WHERE study_id = :study_id AND state IN ('complete', 'pruned', 'failed')
      ORDER BY number DESC LIMIT :limit) last
""")

_KEEP_NOTES = text("""
INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
SELECT trial_id, key, value
FROM json_to_recordset(cast(:rows AS json)) AS r(trial_id int, key text, value text)
ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
""")
