//! Real clusters for tests with several connections.
//!
//! A test binary shares one cluster ([`shared`]); every test has a database of its own with LiteLLM's schema,
//! made by LiteLLM's migrations. Tests that crash the server start a cluster for themselves. All clusters are
//! copies of one that was made once ([`original`]). A watchdog process stops each cluster and removes its
//! folder when the test binary ends, however it ends.
#![allow(dead_code, unused_imports)]

mod beside;
mod litellm;
mod sketches;

pub use beside::*;
pub use litellm::*;
use postgres::error::SqlState;
use postgres::{Client, NoTls, Row};
pub use sketches::*;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub const PORT: u16 = 54320;
const TEMPLATE: &str = "litellm_template";
/// Owns LiteLLM's tables, as in production: no superuser.
pub const LITELLM: &str = "litellm";

pub struct Cluster {
    pub dir: PathBuf,
    pub bin: PathBuf,
    /// The OS user that runs the server: PostgreSQL refuses root.
    user: Option<(u32, u32)>,
    postmaster: Mutex<Child>,
    _watchdog: Child,
}

/// The cluster of this test binary.
pub fn shared() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(&[]))
}

impl Cluster {
    /// A new cluster whose template database has LiteLLM's schema.
    pub fn start(settings: &[&str]) -> Cluster {
        let (bin, user) = (bin_dir(), server_user());
        let dir = new_dir(user);
        run(Command::new("cp").arg("-a").arg(original(&bin, user)).arg(dir.join("data")));
        let mut conf = String::from(
            "shared_preload_libraries = 'litellm_spend'\nmax_prepared_transactions = 50\n\
             max_worker_processes = 100\nmax_connections = 150\nshared_buffers = 64MB\n\
             log_line_prefix = '%m [%p] %b %d '\nlitellm_spend.merge_interval = '100ms'\n\
             litellm_spend.discovery_interval = '5s'\nautovacuum_naptime = '10s'\n",
        );
        settings.iter().for_each(|s| conf += &format!("{s}\n"));
        Cluster::run(dir, bin, user, &conf)
    }

    /// Starts the server of a data folder.
    fn run(dir: PathBuf, bin: PathBuf, user: Option<(u32, u32)>, conf: &str) -> Cluster {
        configure(&dir, conf);
        Cluster::begin(dir, bin, user)
    }

    /// The same as it is configured.
    fn begin(dir: PathBuf, bin: PathBuf, user: Option<(u32, u32)>) -> Cluster {
        let watchdog = watchdog(&dir, &bin, user);
        let postmaster = Mutex::new(spawn(&dir, &bin, user));
        let cluster = Cluster { dir, bin, user, postmaster, _watchdog: watchdog };
        cluster.wait_ready();
        cluster
    }

    fn make_template(&self) {
        let mut admin = self.connect("postgres");
        admin.batch_execute(&format!("CREATE ROLE {LITELLM} LOGIN")).unwrap();
        admin.batch_execute(&format!("CREATE DATABASE {TEMPLATE} OWNER {LITELLM}")).unwrap();
        self.connect(TEMPLATE).batch_execute(&format!("ALTER SCHEMA public OWNER TO {LITELLM}")).unwrap();
        for file in fixtures() {
            self.psql(
                TEMPLATE,
                &["-U", LITELLM, "-q", "-v", "ON_ERROR_STOP=1", "-f", file.to_str().unwrap()],
            );
        }
    }

    /// Runs psql; returns what it printed.
    pub fn psql(&self, database: &str, args: &[&str]) -> String {
        let output = Command::new(self.bin.join("psql"))
            .args([
                "-X",
                "-h",
                self.dir.to_str().unwrap(),
                "-p",
                &PORT.to_string(),
                "-U",
                "postgres",
                "-d",
                database,
            ])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "psql {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a file of LiteLLM's SQL without stopping at errors; returns what psql complained of.
    pub fn run_again(&self, database: &str, file: &str) -> String {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/litellm").join(file);
        let output = Command::new(self.bin.join("psql"))
            .args(["-X", "-q", "-h", self.dir.to_str().unwrap(), "-p", &PORT.to_string(), "-U", "postgres"])
            .args(["-d", database, "-f", file.to_str().unwrap()])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    pub fn program(&self, name: &str) -> Command {
        as_user(&self.bin.join(name), self.user)
    }

    /// What psql says beside the result of a statement: notices, warnings.
    pub fn notices(&self, database: &str, sql: &str) -> String {
        let mut psql = self.program("psql");
        psql.args(["-X", "-h", self.dir.to_str().unwrap(), "-p", &PORT.to_string(), "-U", "postgres"]);
        let output = psql.args(["-d", database, "-v", "ON_ERROR_STOP=1", "-c", sql]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{sql}: {text}");
        text
    }

    pub fn connect(&self, database: &str) -> Client {
        self.connect_as(database, "postgres")
    }

    pub fn connect_as(&self, database: &str, user: &str) -> Client {
        self.try_connect(database, user)
            .unwrap_or_else(|e| panic!("connect to {database}: {e}\n{}", self.log_tail()))
    }

    pub fn try_connect(&self, database: &str, user: &str) -> Result<Client, postgres::Error> {
        let mut config = Client::configure();
        config.host_path(&self.dir).port(PORT).user(user).dbname(database);
        // As window_wait: the worker keeps to the default of this one.
        config.options("-c litellm_spend.lock_timeout=5s");
        config.connect(NoTls)
    }

    fn wait_ready(&self) {
        eventually("the server answers", || self.try_connect("postgres", "postgres").is_ok());
    }

    /// Kills the postmaster with SIGKILL, waits until every process of the server is gone, and starts it
    /// again.
    pub fn crash_and_restart(&self) {
        let mut postmaster = self.postmaster.lock().unwrap();
        postmaster.kill().unwrap();
        postmaster.wait().unwrap();
        // Children notice at their next wait; those that compute are killed.
        let data = self.dir.join("data");
        eventually("the server's processes are gone", || {
            let left = processes_in(&data);
            left.iter().for_each(|pid| drop(Command::new("kill").args(["-9", pid]).status()));
            left.is_empty()
        });
        let _ = fs::remove_file(data.join("postmaster.pid"));
        let _ = fs::remove_file(self.dir.join(format!(".s.PGSQL.{PORT}.lock")));
        *postmaster = spawn(&self.dir, &self.bin, self.user);
        drop(postmaster);
        self.wait_ready();
    }

    /// Stops it with a signal: `-INT` as pg_ctl does, `-QUIT` at once.
    fn stop(&self, signal: &str) -> std::io::Result<()> {
        let mut postmaster = self.postmaster.lock().unwrap();
        if postmaster.try_wait()?.is_none() {
            Command::new("kill").args([signal, &postmaster.id().to_string()]).status()?;
            postmaster.wait()?;
        }
        Ok(())
    }

    /// A streaming standby of this cluster, in a cluster folder of its own.
    pub fn standby(&self) -> Cluster {
        let dir = PathBuf::from(format!("{}-standby", self.dir.display()));
        fs::create_dir_all(&dir).unwrap();
        if let Some((uid, gid)) = self.user {
            std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).unwrap();
        }
        let source = self.dir.to_str().unwrap();
        run(self.program("pg_basebackup").current_dir(&dir).args([
            "-h",
            source,
            "-p",
            &PORT.to_string(),
            "-U",
            "postgres",
            "-D",
            "data",
            "-R",
            "-X",
            "stream",
            "-c",
            "fast",
        ]));
        let path = dir.join("data/postgresql.conf");
        let conf = fs::read_to_string(&path).unwrap();
        fs::write(&path, conf + &format!("unix_socket_directories = '{}'\n", dir.display())).unwrap();
        Cluster::begin(dir, self.bin.clone(), self.user)
    }

    /// Stops it, and starts a new server, of the same version, to which pg_upgrade has brought its databases.
    /// Also returns what was logged by the servers that pg_upgrade ran.
    pub fn upgraded(&self) -> (Cluster, String) {
        self.stop("-INT").unwrap();
        let dir = new_dir(self.user);
        initdb(&dir, &self.bin, self.user);
        configure(
            &dir,
            "shared_preload_libraries = 'litellm_spend'\nlitellm_spend.merge_interval = '50ms'\n",
        );
        let path = |dir: &Path| dir.join("data").to_str().unwrap().to_string();
        let bin = self.bin.to_str().unwrap();
        run(as_user(&self.bin.join("pg_upgrade"), self.user).current_dir(&dir).args([
            "-b",
            bin,
            "-B",
            bin,
            "-d",
            &path(&self.dir),
            "-D",
            &path(&dir),
            "-U",
            "postgres",
            "--retain",
        ]));
        let logs = Command::new("find").arg(&dir).args(["-name", "pg_upgrade_server*.log"]).output().unwrap();
        let logs = String::from_utf8(logs.stdout).unwrap();
        let logged = logs.lines().map(|file| fs::read_to_string(file).unwrap()).collect();
        (Cluster::begin(dir, self.bin.clone(), self.user), logged)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("server.log")).unwrap_or_default()
    }

    pub fn log_tail(&self) -> String {
        let log = self.log();
        log.lines().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// A new database with LiteLLM's schema and the extension.
    pub fn database(&'static self) -> Database {
        let database = self.litellm_database();
        database.connect().batch_execute("CREATE EXTENSION litellm_spend").unwrap();
        database
    }

    /// A new database with LiteLLM's schema.
    pub fn litellm_database(&'static self) -> Database {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // One at a time: a template may be copied by one session only.
        static COPYING: Mutex<()> = Mutex::new(());
        let name = format!("litellm_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let _one = COPYING.lock().unwrap_or_else(|e| e.into_inner());
        let sql = format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER {LITELLM}");
        self.connect("postgres").batch_execute(&sql).unwrap();
        Database { cluster: self, name }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.stop("-QUIT");
    }
}

pub struct Database {
    pub cluster: &'static Cluster,
    pub name: String,
}

impl Database {
    pub fn connect(&self) -> Client {
        self.cluster.connect(&self.name)
    }

    /// What psql says beside the result of a statement.
    pub fn notices(&self, sql: &str) -> String {
        self.cluster.notices(&self.name, sql)
    }

    /// With rows that are there before the table is captured.
    pub fn with_rows(self, prefix: &str, n: u32, days: u32) -> Database {
        self.connect().batch_execute(&insert_rows(prefix, n, days)).unwrap();
        self
    }

    /// With the table captured, backfilled, and the view live.
    pub fn attached(self) -> Database {
        self.attached_by("SELECT spend_attach()")
    }

    /// The same, and with the reports.
    pub fn attached_with_reports(self) -> Database {
        self.attached_by("SELECT spend_attach(reports => true)")
    }

    fn attached_by(self, call: &str) -> Database {
        let mut client = self.connect();
        client.batch_execute(call).unwrap();
        wait_until_live(&mut client);
        self
    }

    /// Whether autovacuum of `table` ("schema.name") of this database was ever cancelled. Other tests' may
    /// be: attaching a table does that.
    pub fn autovacuum_was_cancelled(&self, table: &str) -> bool {
        let log = self.cluster.log();
        let context = format!("of table \"{}.{table}\"", self.name);
        log.split("canceling autovacuum task")
            .skip(1)
            .any(|after| after.lines().take(4).any(|line| line.contains(&context)))
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.cluster.log_tail());
            return;
        }
        // With its worker still connected: DROP DATABASE has to end it. It waits for five seconds, which a
        // process that ends may need on a busy machine.
        let sql = format!("DROP DATABASE {}", self.name);
        let mut admin = self.cluster.connect("postgres");
        eventually(&sql, || match admin.batch_execute(&sql) {
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => false,
            done => done.map(|_| true).unwrap(),
        });
    }
}

/// A new folder for a cluster, which belongs to the OS user that runs the server.
fn new_dir(user: Option<(u32, u32)>) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("spend-{}-{number}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    if let Some((uid, gid)) = user {
        std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).unwrap();
    }
    dir
}

/// LiteLLM's SQL, in the order in which it is run.
fn fixtures() -> [PathBuf; 2] {
    ["migrations.sql", "views.sql"].map(|file| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/litellm").join(file);
        assert!(file.exists(), "{} is missing: scripts/litellm_fixtures.py makes it", file.display());
        file
    })
}

/// The data folder of which clusters are copies, with the template database: made once for this server and
/// this SQL of LiteLLM's. initdb and 220 migrations take four times as long as the copy.
fn original(bin: &Path, user: Option<(u32, u32)>) -> PathBuf {
    static MAKING: Mutex<()> = Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    let mut hasher = DefaultHasher::new();
    let version = Command::new(bin.join("postgres")).arg("--version").output().unwrap().stdout;
    (bin, user, version, fixtures().map(|file| fs::read(file).unwrap())).hash(&mut hasher);
    let name = format!("cluster-{:016x}", hasher.finish());
    let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if !made.exists() {
        let dir = new_dir(user);
        initdb(&dir, bin, user);
        let conf = fs::read(dir.join("data/postgresql.conf")).unwrap();
        let cluster = Cluster::run(dir, bin.into(), user, "");
        cluster.make_template();
        cluster.stop("-INT").unwrap();
        fs::write(cluster.dir.join("data/postgresql.conf"), conf).unwrap();
        // Whoever else makes one at the same time makes the same.
        let copy = made.with_extension(std::process::id().to_string());
        run(Command::new("cp").arg("-a").arg(cluster.dir.join("data")).arg(&copy));
        if fs::rename(&copy, &made).is_err() {
            fs::remove_dir_all(&copy).unwrap();
        }
    }
    made
}

fn initdb(dir: &Path, bin: &Path, user: Option<(u32, u32)>) {
    run(as_user(&bin.join("initdb"), user).current_dir(dir).args([
        "-N",
        "-D",
        "data",
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--locale=C.UTF-8",
    ]));
}

fn configure(dir: &Path, conf: &str) {
    let path = dir.join("data/postgresql.conf");
    // On a machine that is busy with other tests, who is asked to let go, the worker, an autovacuum or the
    // session that aborts a conversion, may need longer than the second that is waited by default.
    let own = format!(
        "port = {PORT}\nlisten_addresses = ''\nunix_socket_directories = '{}'\nfsync = off\n\
         timezone = 'UTC'\nlitellm_spend.window_wait = '5s'\n{conf}",
        dir.display()
    );
    fs::write(&path, fs::read_to_string(&path).unwrap() + &own).unwrap();
}

fn bin_dir() -> PathBuf {
    PathBuf::from(pg_config("--bindir"))
}

fn server_user() -> Option<(u32, u32)> {
    let id = |args: &[&str]| -> u32 {
        let output = Command::new("id").args(args).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    };
    if id(&["-u"]) == 0 { Some((id(&["-u", "postgres"]), id(&["-g", "postgres"]))) } else { None }
}

fn as_user(program: &Path, user: Option<(u32, u32)>) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C.UTF-8").env_remove("RUST_BACKTRACE");
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    command
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn spawn(dir: &Path, bin: &Path, user: Option<(u32, u32)>) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("server.log")).unwrap();
    as_user(&bin.join("postgres"), user)
        .current_dir(dir)
        .args(["-D", dir.join("data").to_str().unwrap()])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// Waits for the end of its standard input, which is the end of this process.
fn watchdog(dir: &Path, bin: &Path, user: Option<(u32, u32)>) -> Child {
    let script = format!(
        "trap '' INT TERM; read -r _; '{0}/pg_ctl' -D '{1}/data' -m immediate stop >/dev/null 2>&1; cd /; rm -rf '{1}'",
        bin.display(),
        dir.display()
    );
    as_user(Path::new("/bin/sh"), user).args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap()
}

/// Processes whose working directory is `dir`: the server's.
pub fn processes_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|e| fs::read_link(e.path().join("cwd")).is_ok_and(|cwd| cwd == dir))
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|name| name.chars().all(|c| c.is_ascii_digit()))
        .collect()
}

// ---- what tests say --------------------------------------------------------------------------------------

/// Asks until it is so. A question that costs much is asked seldom, so that whoever waits leaves the
/// machine to the others.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    // Nothing takes that long but a reversion of a million rows beside writers, on a busy machine.
    let deadline = Instant::now() + Duration::from_secs(1800);
    loop {
        let asked = Instant::now();
        if condition() {
            return;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep((5 * asked.elapsed()).clamp(Duration::from_millis(20), Duration::from_secs(1)));
    }
}

/// For a test that counts days from today more than once: waits until the day of UTC has some minutes left.
pub fn not_at_midnight() {
    eventually("the day has some minutes left", || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        now % 86_400 < 86_400 - 300
    });
}

pub fn value<T: for<'a> postgres::types::FromSql<'a>>(client: &mut Client, sql: &str) -> T {
    client.query_one(sql, &[]).unwrap_or_else(|e| panic!("{sql}: {e:?}")).get(0)
}

/// NULL is not true.
pub fn holds(client: &mut Client, sql: &str) -> bool {
    value::<Option<bool>>(client, sql) == Some(true)
}

/// The SQLSTATE, message, DETAIL and HINT that a statement fails with.
pub fn error(client: &mut Client, sql: &str) -> postgres::error::DbError {
    let error = client.batch_execute(sql).expect_err(sql);
    error.as_db_error().unwrap_or_else(|| panic!("{sql}: {error}")).clone()
}

/// Fails with `sqlstate`, and says what is wrong and what to do.
pub fn assert_refused(client: &mut Client, sql: &str, sqlstate: &str) {
    let error = error(client, sql);
    assert_eq!(error.code().code(), sqlstate, "{sql}: {error:?}");
    assert!(error.detail().is_some_and(|d| !d.is_empty()), "no DETAIL: {error:?}");
    assert!(error.hint().is_some_and(|h| !h.is_empty()), "no HINT: {error:?}");
    let message = error.message();
    assert!(!message.ends_with('.') && !message.starts_with(char::is_uppercase), "style: {message}");
}

/// Not preloaded: no worker runs, and what is done, and when, is the test's.
pub const NO_WORKER: &str = "shared_preload_libraries = ''";

/// A cluster for one test: with other settings, or because it is killed. The watchdog ends it.
pub fn own_cluster(settings: &[&str]) -> &'static Cluster {
    Box::leak(Box::new(Cluster::start(settings)))
}

/// A database in which nothing is merged but by a call.
pub fn without_worker() -> (Database, Client) {
    let db = own_cluster(&[NO_WORKER]).database();
    let client = db.connect();
    (db, client)
}

/// Waits until the worker has looked, and done what it found, in a look that began after the call.
pub fn wait_for_a_round(client: &mut Client) {
    let mut ends: Vec<String> = vec![value(client, "SELECT clock_timestamp()::text")];
    eventually("the worker has looked", || {
        let sql = "SELECT max(state_change)::text FROM pg_stat_activity WHERE datname = current_database()
                   AND backend_type = 'litellm_spend worker' AND state = 'idle' AND state_change > $1::text::timestamptz";
        // Of two ends, the first may be that of a round which had begun.
        ends.extend(client.query_one(sql, &[ends.last().unwrap()]).unwrap().get::<_, Option<String>>(0));
        ends.len() > 2
    });
}

/// Whether the server has MERGE: from PostgreSQL 15 on.
pub fn knows_merge(client: &mut Client) -> bool {
    holds(client, "SELECT current_setting('server_version_num')::int >= 150000")
}

pub fn assert_no_rows(rows: Vec<Row>, what: &str) {
    let text: Vec<String> =
        rows.iter().map(|r| (0..r.len()).map(|i| cell(r, i)).collect::<Vec<_>>().join(" | ")).collect();
    assert!(rows.is_empty(), "{what}:\n{}", text.join("\n"));
}

fn cell(row: &Row, i: usize) -> String {
    row.try_get::<_, Option<String>>(i)
        .map(|v| format!("{v:?}"))
        .or_else(|_| row.try_get::<_, Option<f64>>(i).map(|v| format!("{v:?}")))
        .or_else(|_| row.try_get::<_, Option<serde_json::Value>>(i).map(|v| format!("{v:?}")))
        .unwrap_or_else(|_| "?".into())
}

/// The example of the article "Scalable incremental data aggregation on Postgres and Citus" (2018): a table
/// of events, a rollup table, and the function that fills it, with our function's name.
pub const ARTICLE: &str = "
    CREATE TABLE page_views (
        site_id int,
        path text,
        client_ip inet,
        view_time timestamptz default now(),
        view_id bigserial
    );
    CREATE INDEX view_id_idx ON page_views USING BRIN (view_id);
    CREATE TABLE page_views_1min (
        site_id int,
        path text,
        period_start timestamptz,
        view_count bigint,
        primary key (site_id, path, period_start)
    );
    SELECT spend_rollup_register('page_views_1min_rollup', 'page_views', 'page_views_view_id_seq');
    CREATE OR REPLACE FUNCTION do_page_view_aggregation(OUT start_id bigint, OUT end_id bigint)
    RETURNS record
    LANGUAGE plpgsql
    AS $function$
    BEGIN
        /* determine which page views we can safely aggregate */
        SELECT window_start, window_end INTO start_id, end_id
        FROM spend_rollup_window('page_views_1min_rollup');

        /* exit early if there are no new page views to aggregate */
        IF start_id > end_id THEN RETURN; END IF;

        /* aggregate the page views, merge results if the entry already exists */
        INSERT INTO page_views_1min (site_id, path, period_start, view_count)
        SELECT site_id, path, date_trunc('minute', view_time), count(*) AS view_count
        FROM page_views
        WHERE view_id BETWEEN start_id AND end_id
        GROUP BY site_id, path, date_trunc('minute', view_time)
        ON CONFLICT (site_id, path, period_start) DO UPDATE
        SET view_count = page_views_1min.view_count + EXCLUDED.view_count;
    END;
    $function$;";

/// A folder of the server's.
pub fn pg_config(folder: &str) -> String {
    let program = std::env::var("PG_CONFIG").unwrap_or_else(|_| "pg_config".into());
    let output = Command::new(program).arg(folder).output().expect("pg_config");
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

/// Says that a test does nothing here, and why; scripts/test counts these. Not by eprintln!, whose output a
/// test that passes keeps to itself.
pub fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}
