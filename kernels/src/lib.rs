//! NF4 arithmetic.
