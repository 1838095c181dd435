# shellcheck shell=bash
# Source this after env.sh: throwaway PostgreSQL clusters.
#
#   dir=$(mktemp -d)
#   cluster_start "$dir" ['work_mem = 64MB' ...]    later settings win over those below
#   psql …                                          PGHOST, PGPORT, PGUSER, PGDATABASE are set
#   cluster_stop "$dir"                             stops that server only; the folder stays

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# The folder belongs to the OS user that runs the server; its path must not be long (Unix socket: 107 bytes).
cluster_start() {
    local dir=$1 port
    shift
    port=$(free_port)
    if [ "$(id -u)" = 0 ]; then chown postgres: "$dir"; fi
    chmod 755 "$dir"

    # From inside the folder: the current one may be closed to user postgres.
    (
        cd "$dir"
        as_postgres "$PG_BIN/initdb" -N -D data -U postgres -A trust -E UTF8 --locale=C.UTF-8 >initdb.log 2>&1 ||
            { cat initdb.log >&2; exit 1; }
        {
            echo "port = $port"
            echo "listen_addresses = '127.0.0.1'"
            echo "unix_socket_directories = '$dir'"
            echo "shared_preload_libraries = 'litellm_spend'"
            echo "shared_buffers = 512MB"
            echo "max_wal_size = 4GB"
            echo "checkpoint_timeout = 15min"
            echo "log_line_prefix = '%m [%p] %b %a '"
            [ $# = 0 ] || printf '%s\n' "$@"
        } >>data/postgresql.conf
        as_postgres "$PG_BIN/pg_ctl" -D "$dir/data" -l "$dir/server.log" -s -w -t 60 start </dev/null ||
            { tail -n 20 server.log >&2; exit 1; }
    ) || return

    export PGHOST=$dir PGPORT=$port PGUSER=postgres PGDATABASE=postgres
}

# Immediate success when it does not run (any more).
cluster_stop() {
    local dir=$1
    [ -f "$dir/data/postmaster.pid" ] || return 0
    (cd "$dir" && as_postgres "$PG_BIN/pg_ctl" -D "$dir/data" -s -m fast -w stop)
}
