# Every target sets up what it needs, on a Debian machine with Rust. PG=17 make … for another PostgreSQL than 15.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup install fixtures demo demo-clean test test-citus bench fmt clippy

help:        ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \t\2/p' Makefile | expand -t 20

setup:       ## what is missing: Debian packages, cargo-pgrx
	@scripts/setup

install: setup ## build the extension and install it into that PostgreSQL
	@scripts/install

fixtures: setup
	@scripts/litellm_fixtures.py

demo: install fixtures ## LiteLLM's spend views before and after, on a throwaway PostgreSQL
	@scripts/demo

demo-clean:  ## stop and remove the demo's PostgreSQL
	@scripts/demo clean

test-citus: setup fixtures ## rollups of distributed tables, where the PostgreSQL of PG_BIN has Citus
	@NAME=citus TEST_THREADS=2 scripts/test

test: setup fixtures ## all tests; NAME=convert … those of one file
	@scripts/test

bench: install fixtures ## measure; results in bench/
	@bench/run

bench-%: install fixtures
	@bench/run $*

fmt:         ## format the code
	@cargo fmt

clippy: setup ## lint the code, warnings are errors
	@. scripts/env.sh && cargo clippy --all-targets --no-default-features --features pg$$PG -- -D warnings
