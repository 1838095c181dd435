-- What the extension adds to a database, and how it is marked.
LOAD 'litellm_spend';
\pset format unaligned
SELECT p.oid::regprocedure AS function,
       CASE p.provolatile WHEN 'v' THEN 'volatile' WHEN 's' THEN 'stable' ELSE 'immutable' END AS volatility,
       CASE p.proparallel WHEN 's' THEN 'safe' WHEN 'r' THEN 'restricted' ELSE 'unsafe' END AS parallel,
       p.proisstrict AS strict, p.prosecdef AS security_definer, p.proconfig AS settings
FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
WHERE d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend')
ORDER BY p.oid::regprocedure::text COLLATE "C";

SELECT c.relkind AS kind, c.oid::regclass AS relation
FROM pg_class c JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
WHERE d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'litellm_spend') AND c.relkind <> 'i'
ORDER BY c.oid::regclass::text COLLATE "C";

SELECT attname AS column, format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = 'spend_rollup_status'::regclass AND attnum > 0 ORDER BY attnum;

SELECT attname AS column, format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = 'spend_worker_status'::regclass AND attnum > 0 ORDER BY attnum;

SELECT name, boot_val, unit, context, min_val, max_val, short_desc FROM pg_settings WHERE name LIKE 'litellm\_spend.%' ORDER BY name;
