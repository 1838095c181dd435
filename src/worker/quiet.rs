//! How a worker that has nothing to do notices that it has, without asking for everything each time.
//!
//! Its look is one statement, [`crate::state::news`]. A round of everything follows if that finds something,
//! or if somebody has told:
//!
//! | what makes work | who says so |
//! |---|---|
//! | numbers that were drawn, a sequence that was set back | the statement |
//! | a range to repair, a day to backfill, a view to switch, a conversion, a policy that is due, what a dump brought | the statement |
//! | a table, column, trigger, partition, index, view, its owner or grants | the server, which has all sessions forget what they keep of it |
//! | a role, a schema, a type, a function, an event trigger | the server |
//! | an index that is asked for; one that is to be tried again | who asks, in the server's way; the statement |
//! | a setting | nobody: the next look goes by it |
//! | what failed, and what else becomes due by time | a step that goes on until it has succeeded; else nobody, see [`LONGEST`] |
//! | DROP DATABASE, DROP EXTENSION | each look asks first |
//!
//! Nothing is missed. A session tells after its change can be seen, and we are told when our next transaction
//! begins. What we are told makes the looks at tables due that begin later, each in a transaction of its own:
//! they see the change. What we are told while they go on counts for the next ones. If too much was told to
//! be kept, the server says that everything has changed.

use pgrx::pg_sys;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Something was told since this was last asked.
static TOLD: AtomicBool = AtomicBool::new(true);

/// From here on the server tells this process, at the beginning of each transaction.
pub fn listen() {
    use pg_sys::SysCacheIdentifier::*;
    let nothing = pg_sys::Datum::from(0);
    // SAFETY: the callbacks only set a flag.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(on_relation), nothing);
        for cache in
            [AUTHOID, AUTHMEMROLEMEM, AUTHMEMMEMROLE, NAMESPACEOID, TYPEOID, PROCOID, EVENTTRIGGEROID]
        {
            pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(on_object), nothing);
        }
    }
}

unsafe extern "C-unwind" fn on_relation(_argument: pg_sys::Datum, _relation: pg_sys::Oid) {
    TOLD.store(true, Ordering::Relaxed);
}

unsafe extern "C-unwind" fn on_object(_argument: pg_sys::Datum, _cache: i32, _hash: u32) {
    TOLD.store(true, Ordering::Relaxed);
}

/// Whether something was told since the last call.
pub fn was_told() -> bool {
    TOLD.swap(false, Ordering::Relaxed)
}

/// Nothing is left alone for longer. By what was told it would not have to be: this bounds what somebody has
/// forgotten above.
pub const LONGEST: Duration = Duration::from_secs(60);

/// A look at something that takes more than the statement: due when there may be news of it, but not sooner
/// than `shortest` after the last one.
pub struct Look {
    shortest: Duration,
    last: Option<Instant>,
    news: bool,
}

impl Look {
    pub fn every(shortest: Duration) -> Look {
        Look { shortest, last: None, news: true }
    }

    pub fn is_due(&self) -> bool {
        let since = self.last.map(|last| last.elapsed());
        since.is_none_or(|since| since >= LONGEST || self.news && since >= self.shortest)
    }

    /// Whether it is due, and thus begins.
    pub fn begins(&mut self) -> bool {
        let due = self.is_due();
        if due {
            self.last = Some(Instant::now());
        }
        due
    }

    /// There may be news.
    pub fn expect(&mut self) {
        self.news = true;
    }

    /// The last look found that all is done.
    pub fn settle(&mut self) {
        self.news = false;
    }
}
