//! Sessions beside each other: who writes meanwhile, who waits for whom, who is killed.

use super::*;

/// The process that serves this session.
pub fn backend_pid(client: &mut Client) -> i32 {
    value(client, "SELECT pg_backend_pid()")
}

/// Runs `call` in a session of its own, and `meanwhile` once that waits for a lock, with its pid. Returns
/// what the call came to.
pub fn while_it_waits<T: Send>(
    db: &Database,
    call: impl FnOnce(&mut Client) -> T + Send,
    meanwhile: impl FnOnce(&mut Client, i32),
) -> T {
    let (mut caller, mut client) = (db.connect(), db.connect());
    // Longer than anything here takes; a call that waits without a limit ends nevertheless.
    caller.batch_execute("SET statement_timeout = '60s'").unwrap();
    let pid = backend_pid(&mut caller);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| call(&mut caller));
        eventually("it waits", || waits_for_a_lock(&mut client, pid) || running.is_finished());
        assert!(!running.is_finished(), "it has ended without waiting");
        meanwhile(&mut client, pid);
        running.join().unwrap()
    })
}

/// The same, of a call whose result is looked at only if it fails.
pub fn error_after_waiting(
    db: &Database,
    call: &str,
    meanwhile: impl FnOnce(&mut Client, i32),
) -> Option<postgres::error::DbError> {
    let outcome = while_it_waits(db, |caller| caller.batch_execute(call), meanwhile);
    outcome.err().map(|error| error.as_db_error().unwrap_or_else(|| panic!("{call}: {error}")).clone())
}

/// Whether the session with this pid waits for a lock.
pub fn waits_for_a_lock(client: &mut Client, pid: i32) -> bool {
    let sql = format!("SELECT bool_or(wait_event_type = 'Lock') FROM pg_stat_activity WHERE pid = {pid}");
    holds(client, &sql)
}

/// Runs `body` while `writers` connections insert `rows` rows at a time; they stop when it ends, also by a
/// panic. They pause for as long as a statement takes: all that they write is read by what the test does.
pub fn beside_writers<T>(db: &Database, writers: u32, rows: u32, days: u32, body: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..writers {
            let (db, stop) = (&db, &stop);
            scope.spawn(move || {
                let mut client = db.connect();
                for i in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    client.batch_execute(&insert_rows(&format!("w{writer}-{i}-"), rows, days)).unwrap();
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        let _stop = RaiseOnDrop(&stop);
        body()
    })
}

/// Raises a flag at the end of its scope, also when that is a panic.
pub struct RaiseOnDrop<'a>(pub &'a AtomicBool);

impl Drop for RaiseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Kills a process of a server with SIGKILL, and waits until its postmaster knows: it then ends all others.
pub fn kill(pid: i32) {
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    eventually("it is gone", || !Path::new(&format!("/proc/{pid}")).exists());
}
