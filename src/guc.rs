//! The settings, `litellm_spend.*`. All take effect on reload; what ALTER DATABASE sets, in processes that
//! connect later.

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};
use std::time::Duration;

static MERGE_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(1000);
static MERGE_ROWS: GucSetting<i32> = GucSetting::<i32>::new(5_000);
static LOCK_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(1000);
static SWAP_LOCK_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(200);
static WINDOW_WAIT: GucSetting<i32> = GucSetting::<i32>::new(1000);
static MAX_WINDOW: GucSetting<i32> = GucSetting::<i32>::new(10_000_000);
static HASH_GROUPS: GucSetting<bool> = GucSetting::<bool>::new(true);
static HOURLY_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(400);
static MAINTAIN_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(600);
static DRAIN_ROWS: GucSetting<i32> = GucSetting::<i32>::new(20_000);
static DISCOVERY_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(60);

/// Time between two looks of a worker at its sources.
pub fn merge_interval() -> Duration {
    millis(&MERGE_INTERVAL)
}

/// New rows of a source that a worker merges at its next look. Live views are exact whatever it is: it bounds
/// their tail.
pub fn merge_rows() -> i64 {
    i64::from(MERGE_ROWS.get())
}

/// How long fewer rows than `merge_rows` wait to be merged: ten looks.
pub fn merge_delay() -> Duration {
    merge_interval() * 10
}

/// How long a lock is waited for, and which setting says so.
#[derive(Clone, Copy, Debug)]
pub struct LockLimit {
    pub setting: &'static str,
    pub time: Duration,
}

/// How long a statement of ours waits for a lock on a user's table or view before it gives up. Writers queue
/// behind a waiting lock, so this is also the longest stall that we can cause.
pub fn lock_timeout() -> LockLimit {
    LockLimit { setting: "litellm_spend.lock_timeout", time: millis(&LOCK_TIMEOUT) }
}

/// The same for the exclusive locks of a conversion, for which readers queue as well. Less than
/// deadlock_timeout: it is the conversion that gives way, and tries again.
pub fn swap_lock_timeout() -> LockLimit {
    LockLimit { setting: "litellm_spend.swap_lock_timeout", time: millis(&SWAP_LOCK_TIMEOUT) }
}

/// How long `spend_rollup_run()` waits for running writers. What is not safe by then is left to the next
/// call.
pub fn window_wait() -> Duration {
    millis(&WINDOW_WAIT)
}

/// Most sequence values merged in one transaction: bounds its time after an outage. The worker begins with
/// fewer, and takes as many as it merges in a second, or in some thirty while it is behind.
pub fn max_window() -> i64 {
    i64::from(MAX_WINDOW.get())
}

/// For how many days the reports keep hours, which then become days; 0: for ever. By default a year and a
/// month, so that last year's can be compared.
pub fn hourly_retention() -> i32 {
    HOURLY_RETENTION.get()
}

/// Time between two rounds of a worker over the partitions of a table; 0: it leaves them alone. Partitions
/// are made days ahead, so ten minutes only bound how long expired rows stay, and how soon DEFAULT is
/// drained.
pub fn maintain_interval() -> Duration {
    Duration::from_secs(MAINTAIN_INTERVAL.get() as u64)
}

/// Most rows of one time that leave DEFAULT at once, while everybody waits for the table. About a second, as
/// lock_timeout: 2,000 rows took 0.1 s (see `drain`).
pub fn drain_rows() -> i64 {
    i64::from(DRAIN_ROWS.get())
}

/// How often the launcher looks for databases that got the extension unnoticed (a restore, CREATE DATABASE
/// from a template). CREATE EXTENSION itself is noticed within a second.
pub fn discovery_interval() -> Duration {
    Duration::from_secs(DISCOVERY_INTERVAL.get() as u64)
}

/// Whether a merge groups rows in a hash table of ours, where that can be done, or in SQL.
pub fn hash_groups() -> bool {
    HASH_GROUPS.get()
}

fn millis(setting: &GucSetting<i32>) -> Duration {
    Duration::from_millis(setting.get() as u64)
}

pub fn register() {
    let (ms, s) = (GucFlags::UNIT_MS, GucFlags::UNIT_S);
    GucRegistry::define_int_guc(
        c"litellm_spend.merge_interval",
        c"Time between two looks of the worker at what is new.",
        c"Fewer new rows than litellm_spend.merge_rows are merged after ten looks.",
        &MERGE_INTERVAL,
        10,
        3_600_000,
        GucContext::Sighup,
        ms,
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.merge_rows",
        c"New rows of a source that the worker merges at its next look.",
        c"Live views are exact whatever this is: it bounds the number of rows that they add up themselves.",
        &MERGE_ROWS,
        1,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.lock_timeout",
        c"Longest wait for a lock on a user's table or view.",
        c"Writers queue behind a waiting lock, so this also bounds the stall that attach and detach can cause.",
        &LOCK_TIMEOUT,
        1,
        60_000,
        GucContext::Userset,
        ms,
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.swap_lock_timeout",
        c"Longest wait for an exclusive lock of the swap of a conversion or reversion.",
        c"Readers and writers queue behind it; a lock that is not got is tried for again later.",
        &SWAP_LOCK_TIMEOUT,
        1,
        60_000,
        GucContext::Userset,
        ms,
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.window_wait",
        c"Longest wait of spend_rollup_run() for running writers.",
        c"What is not safe to merge by then is left to the next call.",
        &WINDOW_WAIT,
        0,
        60_000,
        GucContext::Userset,
        ms,
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.max_window",
        c"Most sequence values merged in one transaction.",
        c"Bounds the time of a merge after an outage. The worker takes what it merges in 1 s; in up to 30 s while it is behind.",
        &MAX_WINDOW,
        1,
        i32::MAX,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"litellm_spend.hash_groups",
        c"Merges group rows in a hash table of ours where that can be done.",
        c"Off: PostgreSQL's aggregation groups them, which takes longer.",
        &HASH_GROUPS,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.hourly_retention",
        c"Days for which the hourly reports keep hours.",
        c"Then each day's hours are added up to the day. Zero keeps them for ever.",
        &HOURLY_RETENTION,
        0,
        36_500,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.maintain_interval",
        c"Time between two rounds of the worker over the partitions of a table.",
        c"Zero leaves them to calls of spend_partition_maintain().",
        &MAINTAIN_INTERVAL,
        0,
        86_400,
        GucContext::Sighup,
        s,
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.drain_rows",
        c"Most rows of one time that move from DEFAULT to their partition at once.",
        c"Everybody waits for the table meanwhile. Where there are more they stay, and are reported.",
        &DRAIN_ROWS,
        1,
        i32::MAX,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"litellm_spend.discovery_interval",
        c"Time between two searches for databases that have the extension.",
        c"CREATE EXTENSION is noticed at once; this is for restores and databases made from a template.",
        &DISCOVERY_INTERVAL,
        1,
        86_400,
        GucContext::Sighup,
        s,
    );
    #[cfg(not(feature = "pg14"))]
    // SAFETY: called once from _PG_init with a static, NUL-terminated string.
    unsafe {
        pgrx::pg_sys::MarkGUCPrefixReserved(c"litellm_spend".as_ptr());
    }
}
