# shellcheck shell=bash
# Source this: which PostgreSQL we build for, and how to run its programs.
#
#   PG=15 (default)   the major version; everything else follows from it
#   PG_BIN            the folder of its programs: Debian's, unless it is set, or what scripts/setup unpacked under target/

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PG=${PG:-15}

PG_BIN=${PG_BIN:-/usr/lib/postgresql/$PG/bin}
[ -x "$PG_BIN/pg_config" ] || PG_BIN=$ROOT/target/pgsql-$PG/bin
export PG_CONFIG=$PG_BIN/pg_config
export PATH=$PG_BIN:$PATH
command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

# With this set, neither build scripts nor cargo-pgrx need `cargo pgrx init`.
export PGRX_PG_CONFIG_PATH=$PG_CONFIG
# Else cargo-pgrx adds a linker flag of its own and compiles every crate a second time.
export CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1

sudo_if_needed() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# PostgreSQL refuses to run as root: as root, run the command as the OS user postgres.
as_postgres() {
    if [ "$(id -u)" = 0 ]; then
        setpriv --reuid postgres --regid postgres --clear-groups \
            env -u LC_ALL HOME="${TMPDIR:-/tmp}" USER=postgres LOGNAME=postgres LANG=C.UTF-8 "$@"
    else
        "$@"
    fi
}
