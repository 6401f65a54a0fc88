//! SDK for policies.
