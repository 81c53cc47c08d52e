"""What must hold of every study at any moment, asked of the database itself."""

from sqlalchemy import Engine, text

_FINDINGS = {
    "more trials than the budget": """
        SELECT s.name, count(*) FROM regtune.studies s JOIN regtune.trials t USING (study_id)
        GROUP BY s.study_id HAVING count(*) > s.budget_trials""",
    "more epochs than the budget": """
        SELECT s.name, sum(t.epochs) FROM regtune.studies s JOIN regtune.trials t USING (study_id)
        GROUP BY s.study_id HAVING sum(t.epochs) > s.budget_trial_epochs""",
    "epochs are not counted right": """
        SELECT t.number, t.epochs, max(e.epoch) FROM regtune.trials t
        LEFT JOIN regtune.epochs e USING (trial_id)
        GROUP BY t.trial_id HAVING t.epochs <> coalesce(max(e.epoch), 0)""",
    "numbers are not 0 … n - 1": """
        SELECT s.name, count(*), min(number), max(number), s.appended
        FROM regtune.studies s JOIN regtune.trials t USING (study_id) GROUP BY s.study_id
        HAVING min(number) <> 0 OR max(number) <> count(*) - 1 OR s.appended <> count(*)""",
    "numbers do not follow ids": """
        SELECT * FROM (
            SELECT study_id, number,
                   row_number() OVER (PARTITION BY study_id ORDER BY trial_id) - 1 AS place
            FROM regtune.trials) t WHERE number <> place""",
    "the public record differs from ours": """
        SELECT t.trial_id, t.number, o.number, t.state, o.state
        FROM regtune.trials t FULL JOIN public.trials o USING (trial_id)
        WHERE t.trial_id IS NULL OR o.trial_id IS NULL OR t.number <> o.number
           OR o.state::text <> CASE t.state WHEN 'waiting' THEN 'WAITING'
              WHEN 'running' THEN 'RUNNING' WHEN 'complete' THEN 'COMPLETE'
              WHEN 'pruned' THEN 'PRUNED' ELSE 'FAIL' END""",
    "the public value differs from ours": """
        SELECT t.number, t.value, v.value
        FROM regtune.trials t LEFT JOIN public.trial_values v USING (trial_id)
        WHERE t.state = 'complete' AND t.value IS DISTINCT FROM v.value""",
    "a complete trial has not recorded its best epoch": """
        SELECT t.number, t.best_epoch, t.value FROM regtune.trials t
        WHERE t.state = 'complete' AND NOT EXISTS (
            SELECT FROM regtune.epochs e WHERE e.trial_id = t.trial_id
            AND e.attempt = t.attempt AND e.epoch = t.best_epoch
            AND e.validation_loss = t.value)""",
    "epochs of the last attempt have gaps": """
        SELECT t.number, count(*), max(e.epoch)
        FROM regtune.trials t JOIN regtune.epochs e USING (trial_id, attempt)
        GROUP BY t.trial_id HAVING count(*) <> max(e.epoch) OR min(e.epoch) <> 1""",
    "an epoch by an attempt that never was": """
        SELECT t.number, t.attempt, e.attempt FROM regtune.trials t
        JOIN regtune.epochs e USING (trial_id) WHERE e.attempt > t.attempt OR e.attempt < 1""",
    "an epoch is on record twice": """
        SELECT trial_id, epoch, count(*) FROM regtune.epochs
        GROUP BY trial_id, epoch, seconds, train_loss, validation_loss HAVING count(*) > 1""",
    "Optuna's curve differs from ours": """
        SELECT t.number, t.attempt, t.state, e.epoch, v.step, e.validation_loss, v.value
        FROM (SELECT t.trial_id, e.epoch, e.validation_loss
              FROM regtune.trials t JOIN regtune.epochs e USING (trial_id, attempt)) e
        FULL JOIN (SELECT trial_id, step, CASE intermediate_value_type
                          WHEN 'NAN' THEN 'NaN' WHEN 'INF_POS' THEN 'Infinity'
                          WHEN 'INF_NEG' THEN '-Infinity' ELSE intermediate_value END AS value
                   FROM public.trial_intermediate_values) v
             ON v.trial_id = e.trial_id AND v.step = e.epoch
        JOIN regtune.trials t ON t.trial_id = coalesce(e.trial_id, v.trial_id)
        WHERE t.state IN ('complete', 'pruned') AND e.validation_loss IS DISTINCT FROM v.value""",
    "a trial ended more than once": """
        SELECT study_id, number, count(*) FROM regtune.events
        WHERE kind IN ('trial_complete', 'trial_pruned', 'trial_failed', 'trial_cancelled')
        GROUP BY study_id, number HAVING count(*) > 1""",
    "more leases given than attempts counted": """
        SELECT t.number, t.attempt, count(*) FROM regtune.trials t
        JOIN regtune.events e ON e.study_id = t.study_id AND e.number = t.number
             AND e.kind = 'trial_started'
        GROUP BY t.trial_id HAVING count(*) <> t.attempt""",
    "workers' time is not charged once": """
        SELECT s.name, ended.seconds, sh.ended_seconds, open.seconds
        FROM regtune.studies s JOIN regtune.shares sh USING (study_id), LATERAL (
            SELECT coalesce(sum(worker_seconds), 0) AS seconds FROM regtune.trials t
            WHERE t.study_id = s.study_id) ended, LATERAL (
            SELECT coalesce(sum(c.seconds), 0) AS seconds FROM regtune.charges c
            WHERE c.study_id = s.study_id) open
        WHERE abs(ended.seconds - sh.ended_seconds - open.seconds) > 1e-6 * ended.seconds""",
    "trials are not counted as they ended": """
        SELECT s.name, t.* FROM regtune.studies s JOIN regtune.shares sh USING (study_id), LATERAL (
            SELECT count(*) FILTER (WHERE state = 'complete') AS complete,
                   count(*) FILTER (WHERE state = 'pruned') AS pruned,
                   count(*) FILTER (WHERE state = 'failed') AS failed,
                   count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
                   coalesce(sum(epochs), 0) AS epochs, min(started_at) AS started_at
            FROM regtune.trials t
            WHERE t.study_id = s.study_id AND state NOT IN ('waiting', 'running')) t, LATERAL (
            SELECT coalesce(sum(complete), 0) AS complete, coalesce(sum(pruned), 0) AS pruned,
                   coalesce(sum(failed), 0) AS failed, coalesce(sum(cancelled), 0) AS cancelled,
                   coalesce(sum(epochs), 0) AS epochs, min(started_at) AS started_at
            FROM regtune.charges c WHERE c.study_id = s.study_id) c
        WHERE (t.complete, t.pruned, t.failed, t.cancelled, t.epochs) IS DISTINCT FROM
              (sh.complete + c.complete, sh.pruned + c.pruned, sh.failed + c.failed,
               sh.cancelled + c.cancelled, sh.ended_epochs + c.epochs)
           OR t.started_at IS DISTINCT FROM least(sh.started_at, c.started_at)""",
    "a study is over but its trials are not": """
        SELECT s.name, t.number, t.state FROM regtune.studies s JOIN regtune.trials t
        USING (study_id) WHERE s.state IN ('completed', 'stopped', 'cancelled', 'failed')
        AND t.state IN ('waiting', 'running')""",
}


def audit(engine: Engine) -> dict[str, list[tuple[object, ...]]]:
    """Return every finding with its rows; nothing, if all is well."""
    with engine.connect() as connection:
        found = {
            finding: [tuple(row) for row in connection.execute(text(query))]
            for finding, query in _FINDINGS.items()
        }
    return {finding: rows for finding, rows in found.items() if rows}
