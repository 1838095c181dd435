//! What there is to do for a worker, as far as our tables and the sequences say it: one statement that is
//! planned once, because most looks find nothing. What others do to tables, views and roles the server tells
//! ([`crate::worker::quiet`]).

use crate::error::Result;
use crate::server::spi::{self, value};
use crate::state::restore::HERE;

/// How it stands with a source that has rollups for us to merge.
pub struct Numbers {
    pub source: String,
    /// The last value that its sequence gave, if it has given any.
    pub last_value: Option<i64>,
    pub merged_to: i64,
    /// Rows that are merged everywhere are to be removed.
    pub trims: bool,
}

#[derive(Default)]
pub struct News {
    pub sources: Vec<Numbers>,
    /// A table is to be maintained.
    pub policies: bool,
    /// An index is to be tried again.
    pub indexes: bool,
    /// Something else of our state waits, or came out of a dump.
    pub other: bool,
}

pub fn look() -> Result<News> {
    let sql = format!(
        "SELECT s.name, pg_catalog.pg_sequence_last_value(q.seqrelid), min(r.watermark),
                s.name = 'change_log' AND s.trimmed_to < min(r.watermark), NULL::bool, NULL::bool, NULL::bool
         FROM litellm_spend.source s JOIN litellm_spend.rollup r ON r.source = s.name
         LEFT JOIN pg_catalog.pg_sequence q ON q.seqrelid = s.sequence
         WHERE r.definition IS NOT NULL AND s.origin = {HERE} GROUP BY s.name, q.seqrelid
         UNION ALL
         SELECT NULL, NULL, NULL, NULL,
                EXISTS (SELECT FROM litellm_spend.policy p JOIN pg_catalog.pg_class c ON c.oid = p.relation
                    AND c.relowner = p.owner,
                               CAST (pg_catalog.current_setting('litellm_spend.maintain_interval') AS interval) AS every
                        WHERE every > '0' AND (
                            least(coalesce(p.retry_at, 'infinity'), coalesce(p.maintained_at, '-infinity') + every)
                                <= clock_timestamp()
                            OR p.maintained_at > clock_timestamp())),
                EXISTS (SELECT FROM litellm_spend.index_failure
                        WHERE retry_at <= clock_timestamp() OR last_error_at > clock_timestamp()),
                EXISTS (SELECT FROM litellm_spend.capture, litellm_spend.dirty_range WHERE repaired_at IS NULL)
                OR EXISTS (SELECT FROM litellm_spend.capture c, litellm_spend.capture_failures f
                           WHERE f.is_called AND c.failures_seen <> f.last_value)
                OR EXISTS (SELECT FROM litellm_spend.source s JOIN litellm_spend.rollup r ON r.source = s.name
                           WHERE s.name = 'change_log' AND r.covered_from > '-infinity')
                OR EXISTS (SELECT FROM litellm_spend.public_view WHERE installed IS NULL)
                OR EXISTS (SELECT FROM litellm_spend.conversion WHERE NOT stopped
                    OR options @> '{{\"aborted\": true}}')
                OR EXISTS (SELECT origin FROM litellm_spend.source UNION ALL SELECT origin FROM litellm_spend.capture
                           UNION ALL SELECT origin FROM litellm_spend.policy UNION ALL SELECT origin
                               FROM litellm_spend.conversion
                           UNION ALL SELECT origin FROM litellm_spend.index_set
                           EXCEPT SELECT id FROM litellm_spend.installation)"
    );
    let mut news = News::default();
    let rows = spi::kept(&sql, &[], |r| {
        Ok(match r.get::<String>(1)? {
            Some(source) => {
                let (last_value, merged_to, trims) = (r.get(2)?, value(r, 3)?, value(r, 4)?);
                (Some(Numbers { source, last_value, merged_to, trims }), [false; 3])
            }
            None => (None, [value(r, 5)?, value(r, 6)?, value(r, 7)?]),
        })
    })?;
    for (numbers, [policies, indexes, other]) in rows {
        news.sources.extend(numbers);
        news.policies |= policies;
        news.indexes |= indexes;
        news.other |= other;
    }
    Ok(news)
}
