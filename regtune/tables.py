"""Our tables, in the schema ``regtune``, beside Optuna's in ``public``.

A study and a trial have the same id in both.
"""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import UserDefinedType

SCHEMA = "regtune"

STUDY_STATES = ("active", "paused", "stopping", "completed", "stopped", "cancelled", "failed")
LIVE_STUDY_STATES = ("active", "paused", "stopping")
ENDED_TRIAL_STATES = ("complete", "pruned", "failed", "cancelled")
TRIAL_STATES = ("waiting", "running", *ENDED_TRIAL_STATES)
TRIAL_KINDS = ("baseline", "default", "suggested")

metadata = MetaData()

# Only so that ours can refer to them: Optuna makes and migrates its own.
_optuna_studies = Table("studies", metadata, Column("study_id", Integer, primary_key=True))
_optuna_trials = Table("trials", metadata, Column("trial_id", Integer, primary_key=True))


class TransactionId(UserDefinedType[str]):
    """PostgreSQL's ``xid8``: a transaction's number, which never wraps."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Return the type's name in SQL."""
        return "xid8"


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


IS_LIVE = _one_of("state", LIVE_STUDY_STATES)
"""Whether a row of ``studies`` may still change by itself, in SQL."""

_now = text("now()")

studies = Table(
    "studies",
    metadata,
    Column(
        "study_id",
        Integer,
        ForeignKey(_optuna_studies.c.study_id),
        primary_key=True,
        autoincrement=False,
    ),
    Column("name", Text, nullable=False, unique=True),
    Column("spec", JSONB, nullable=False),
    Column("model", JSONB, comment="what the first worker that built the model found out"),
    Column("state", Text, nullable=False),
    Column("reason", Text, comment="why the study ended"),
    Column("priority", Integer, nullable=False),
    Column("budget_trials", Integer, nullable=False),
    Column("budget_seconds", Double),
    Column("budget_trial_epochs", BigInteger),
    Column("appended", Integer, nullable=False, server_default="0", comment="next trial's number"),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=_now),
    Column("finished_at", DateTime(timezone=True)),
    CheckConstraint(_one_of("state", STUDY_STATES), name="studies_state_known"),
    CheckConstraint("appended BETWEEN 0 AND budget_trials", name="studies_within_budget"),
    Index("studies_live", "study_id", postgresql_where=text(IS_LIVE)),
    schema=SCHEMA,
)

trials = Table(
    "trials",
    metadata,
    Column(
        "trial_id",
        Integer,
        ForeignKey(_optuna_trials.c.trial_id),
        primary_key=True,
        autoincrement=False,
    ),
    Column("study_id", Integer, ForeignKey(studies.c.study_id), nullable=False),
    Column("number", Integer, nullable=False),
    Column("kind", Text, nullable=False, comment="a reference point, or suggested"),
    Column("params", JSONB, nullable=False, comment="every value that is trained, fixed ones too"),
    Column(
        "shape",
        Text,
        nullable=False,
        server_default="{}",
        comment="what of params makes stacks of their own",
    ),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False, server_default="0", comment="leases so far"),
    Column("lost_leases", Integer, nullable=False, server_default="0"),
    Column(
        "epochs", Integer, nullable=False, server_default="0", comment="of its furthest attempt"
    ),
    Column("token", Uuid, comment="of the lease that may write"),
    Column("worker", Text),
    Column("lease_expires_at", DateTime(timezone=True)),
    Column("leased_at", DateTime(timezone=True), comment="last lease"),
    Column("share", Double, comment="of its worker, that its last lease holds: one of its slots"),
    Column(
        "worker_seconds",
        Double,
        nullable=False,
        server_default="0",
        comment="of workers' time, by leases that have ended",
    ),
    Column("stop_request", Text, comment="the scheduler's verdict for the worker"),
    Column("value", Double, comment="validation loss at the best weights"),
    Column("value_spread", Double, comment="standard deviation of the value over the members"),
    Column("validation_score", Double),
    Column("best_epoch", Integer),
    Column("test_loss", Double),
    Column("test_score", Double),
    Column("reason", Text, comment="why it ended as it did"),
    Column("error", Text, comment="traceback of the user's code"),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=_now),
    Column("started_at", DateTime(timezone=True), comment="first lease"),
    Column("finished_at", DateTime(timezone=True)),
    UniqueConstraint("study_id", "number", name="trials_numbered"),
    CheckConstraint(_one_of("state", TRIAL_STATES), name="trials_state_known"),
    CheckConstraint(_one_of("kind", TRIAL_KINDS), name="trials_kind_known"),
    CheckConstraint("number >= 0", name="trials_number_natural"),
    CheckConstraint(
        "(state = 'running') = (token IS NOT NULL)", name="trials_running_means_leased"
    ),
    Index("trials_by_state", "study_id", "state", "number"),
    Index(
        "trials_waiting",
        "study_id",
        "shape",
        "number",
        postgresql_where=text("state = 'waiting'"),
    ),
    Index("trials_by_value", "study_id", "value", "number"),
    Index("trials_by_end", "study_id", "finished_at"),
    # A renewal changes no indexed column, so it stays on its page, if there is room on it.
    postgresql_with={"fillfactor": 80},
    schema=SCHEMA,
)

shapes = Table(
    "shapes",
    metadata,
    Column("study_id", Integer, ForeignKey(studies.c.study_id), nullable=False),
    Column("shape", Text, nullable=False),
    Column("model", JSONB, nullable=False, comment="what the first worker that built it found out"),
    PrimaryKeyConstraint("study_id", "shape"),
    schema=SCHEMA,
)

shares = Table(
    "shares",
    metadata,
    Column("study_id", Integer, ForeignKey(studies.c.study_id), primary_key=True),
    Column(
        "virtual_seconds",
        Double,
        nullable=False,
        comment="workers' time by priority; the study with the least is next",
    ),
    Column(
        "worker_seconds",
        Double,
        nullable=False,
        server_default="0",
        comment="of workers' time, up to settled_at",
    ),
    Column(
        "ended_seconds",
        Double,
        nullable=False,
        server_default="0",
        comment="of those, by leases that have ended",
    ),
    *(
        Column(state, Integer, nullable=False, server_default="0", comment="trials, settled")
        for state in ENDED_TRIAL_STATES
    ),
    Column(
        "ended_epochs", BigInteger, nullable=False, server_default="0", comment="that those trained"
    ),
    Column("started_at", DateTime(timezone=True), comment="first lease of any of those"),
    Column("settled_at", DateTime(timezone=True), nullable=False, server_default=_now),
    schema=SCHEMA,
)

charges = Table(
    "charges",
    metadata,
    Column("charge_id", BigInteger, Identity(always=True), primary_key=True),
    Column("study_id", Integer, nullable=False),
    Column("seconds", Double, nullable=False, comment="of workers' time, not yet settled"),
    # Without defaults: a program that does not count them yet must not end trials uncounted.
    *(
        Column(state, Integer, nullable=False, comment="trials that ended so")
        for state in ENDED_TRIAL_STATES
    ),
    Column("epochs", BigInteger, nullable=False, comment="that those trained"),
    Column("started_at", DateTime(timezone=True), comment="first lease of any of those"),
    Index("charges_of_study", "study_id"),
    schema=SCHEMA,
)

epochs = Table(
    "epochs",
    metadata,
    Column("trial_id", Integer, ForeignKey(trials.c.trial_id), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("epoch", Integer, nullable=False, comment="from 1"),
    Column("train_loss", Double, nullable=False),
    Column("validation_loss", Double, nullable=False),
    Column("validation_score", Double, nullable=False),
    Column("penalty", Double, nullable=False),
    Column("sparsity", Double, nullable=False, comment="share of exact zeros among the weights"),
    Column("seconds", Double, nullable=False),
    PrimaryKeyConstraint("trial_id", "attempt", "epoch"),
    schema=SCHEMA,
)

workers = Table(
    "workers",
    metadata,
    Column("name", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", Text, nullable=False),
    Column("device_kind", Text, nullable=False, server_default="cpu"),
    Column("memory_bytes", BigInteger, comment="of the device; of the machine for a CPU"),
    Column("lanes", Integer, nullable=False, comment="how many trials it trains at once"),
    Column("wanted_lanes", Integer, nullable=False, comment="lanes that would take a trial now"),
    Column(
        "occupancy", Double, comment="share of its lanes that trained while trials were waiting"
    ),
    Column("capacity", JSONB, comment="how the number of lanes was found"),
    Column("datasets", JSONB, nullable=False),
    Column("models", JSONB, nullable=False),
    Column("tasks", JSONB, nullable=False, server_default=text("'[]'::jsonb")),
    Column("study_id", Integer, comment="the study that it trains now"),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("heartbeat_at", DateTime(timezone=True), nullable=False),
    Column("stopped_at", DateTime(timezone=True)),
    schema=SCHEMA,
)

events = Table(
    "events",
    metadata,
    Column("event_id", BigInteger, primary_key=True),
    Column(
        "transaction_id",
        TransactionId,
        nullable=False,
        server_default=text("pg_current_xact_id()"),
        comment="readers wait until all older transactions have ended, so that none is missed",
    ),
    Column("at", DateTime(timezone=True), nullable=False, server_default=_now),
    Column("study_id", Integer, nullable=False),
    Column("number", Integer, comment="of the trial, if it is about one"),
    Column("kind", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("detail", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Index("events_of_study", "study_id", "event_id"),
    Index(
        "events_of_study_itself", "study_id", "event_id", postgresql_where=text("number IS NULL")
    ),
    Index("events_in_order", "study_id", "transaction_id", "event_id"),
    Index("events_of_deletions", "study_id", postgresql_where=text("kind = 'study_deleted'")),
    Index("events_of_refusals", "study_id", postgresql_where=text("kind = 'study_refused'")),
    schema=SCHEMA,
)
