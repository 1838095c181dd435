//! Tables that are divided by time: conversion and reversion, and the upkeep of partitions. Each module says
//! which locks it takes, and for how long. May call the engine and the rooms below it, and where a table is
//! captured LiteLLM's.

pub mod archive;
pub mod calendar;
pub mod convert;
pub mod copy;
pub mod create;
pub mod dependents;
pub mod drain;
pub mod expire;
pub mod layout;
pub mod maintain;
pub mod plan;
pub mod policy;
pub mod purge;
pub mod revert;
pub mod swap;
pub mod times;
